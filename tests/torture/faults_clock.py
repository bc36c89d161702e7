"""Clocks that jump, and clocks that are apart, by hours: a day is past, or has not come yet.

A clock jumps at a step of an operation; or a save, or a load, stands still at a step while another
process expires and collects by a clock of its own, that may jump too. Whatever a clock says, no
committed version is lost; a save that was taken for crashed fails, and says so.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, tzinfo
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from tests.torture.children import carry_out, start
from tests.torture.faults_disk import told, verdict_of
from tests.torture.faults_read import load
from tests.torture.kinds import DATABASES, Dialect, Ground, Outcome, Verdict
from tests.torture.operations import (
    OPERATIONS,
    Operation,
    save,
    untagged,
)
from tests.torture.sites import Mould, Site
from tests.torture.steps import PAIRS, PATHS, Step, Steps, begun

__all__ = ["Apart", "Clock", "Jumps", "kinds"]

PAST_LEASE, PAST_GRACE = 2.0, 30.0  # hours
HOURS = (PAST_LEASE, PAST_GRACE, -PAST_LEASE, -PAST_GRACE)
LONG_AFTER = 1000.0  # hours; then all that clocks may have kept for longer may go
WAIT = 40.0  # seconds that a child stands still at most
SHORT = ("clock jumps: tend",)


class Clock:
    """What time it is, as dcpstore reads it in this process; `ahead` hours from what is right."""

    def __init__(self, ahead: float = 0.0) -> None:
        self.ahead = ahead
        import_module("dcpstore.maintenance.gc")  # loaded late, and it is whose clock matters
        clock, time_ns = self, time.time_ns

        class IsDatetime(type):
            def __instancecheck__(cls, one: object) -> bool:
                return isinstance(one, datetime)

        class Shifted(datetime, metaclass=IsDatetime):
            def __new__(cls, *given: Any, **said: Any) -> Any:
                return datetime(*given, **said)

            @classmethod
            def now(cls, tz: tzinfo | None = None) -> Any:
                return datetime.now(tz) + timedelta(hours=clock.ahead)

        for name, module in list(sys.modules.items()):
            if name.startswith("dcpstore") and vars(module).get("datetime") is datetime:
                vars(module)["datetime"] = Shifted
        time.time_ns = lambda: time_ns() + int(clock.ahead * 3600 * 1_000_000_000)


@dataclass(frozen=True, slots=True)
class Jump:
    """By how many hours a clock jumps, at which step; or is wrong from the start, at step 0."""

    number: int
    what: str
    hours: float

    def __str__(self) -> str:
        return f"{self.hours:+.0f} h at step {self.number} ({self.what})"


class At(Steps):
    """Counts steps as `Steps` does, and does something at one of them, before it is taken."""

    def __init__(self, root: Path, log: Path, number: int | None, act: Callable[[], None]) -> None:
        super().__init__(root, log, die_at=None)
        self._number, self._act = number, act

    def meet(self, number: int, what: str, path: str) -> None:
        """Do it at the step of the number."""
        if number == self._number:
            self._act()


class Jumps:
    """A clock that jumps amid one operation."""

    at_once = 2

    def __init__(self, ground: Ground, operation: Operation) -> None:
        self._ground, self._operation = ground, operation
        self.name = f"clock jumps: {operation.name}"

    @cached_property
    def _mould(self) -> Mould:
        return Mould(self._ground, "sqlite", self._operation.prepare)

    def points(self) -> Sequence[Jump]:
        """Run the operation once, and return the ends of its transactions and its file steps."""
        site = self._mould.copy()
        steps = recorded(self._operation.act, site)
        self._mould.discard(site)
        points = [Jump(step.number, step.what, hours) for step in turns(steps) for hours in HOURS]
        return self._ground.pick(points, 1, 24)

    def try_point(self, point: Jump) -> Outcome:
        """Let the clock jump there, and look."""
        site = self._mould.copy()
        ended = start(do, self._operation, site, point, None).end()
        return verdict_of(ended, self._operation, site, self._mould)


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where an operation stands still, by a clock `hours` wrong, and the clock of who tends."""

    stop: int
    what: str
    hours: float
    theirs: Jump

    def __str__(self) -> str:
        mine = f"{self.hours:+.0f} h, still at step {self.stop} ({self.what})"
        return f"{mine}; gc {self.theirs}"


class Apart:
    """An operation that stands still while another process expires and collects."""

    at_once = 2

    def __init__(self, ground: Ground, operation: Operation, dialect: Dialect) -> None:
        self._ground, self._operation = ground, operation
        self._dialect: Dialect = dialect
        self.name = f"clocks apart: {operation.name}, {dialect}"

    @cached_property
    def _mould(self) -> Mould:
        return Mould(self._ground, self._dialect, self._operation.prepare)

    def points(self) -> Sequence[Meeting]:
        """Run both once; return where one may stand still, with where the other's clock jumps."""
        site = self._mould.copy()
        steps = recorded(self._operation.act, site)
        # not amid a transaction, where the other would wait for it; who only reads may anywhere
        stops = [step for step in steps if step.path] or steps
        self._mould.discard(site)
        site = self._mould.copy()
        hours = itertools.cycle((PAST_LEASE, PAST_GRACE))
        jumps = [
            Jump(step.number, step.what, next(hours))
            for step in turns(recorded(TEND.act, site))[::3]
        ]
        self._mould.discard(site)
        wrong = [Jump(0, "start", hours) for hours in HOURS]
        points = [
            Meeting(stop.number, stop.what, mine, theirs)
            for stop in stops[:: -(-len(stops) // 4)]
            for mine, theirs in (
                *((jump.hours, Jump(0, "start", 0.0)) for jump in wrong),
                *((0.0, jump) for jump in (*wrong, *jumps)),
            )
        ]
        return self._ground.pick(points, 1, 24)

    def try_point(self, point: Meeting) -> Outcome:
        """Stop the one there, let the other do its work, and look at what both came to."""
        site = self._mould.copy()
        waiting = start(do, self._operation, site, Jump(0, "start", point.hours), point.stop)
        until = time.monotonic() + WAIT
        while not still(site).exists() and time.monotonic() < until:
            time.sleep(0.005)
        tended = start(do, TEND, site, point.theirs, None).end()
        go(site).touch()
        ended = waiting.end()
        if tended.hung:
            return Outcome(Verdict.HUNG, "gc waits")
        if tended.code or tended.error:
            return Outcome(Verdict.LOST, f"gc: {tended}")
        return verdict_of(ended, self._operation, site, self._mould)


def kinds(ground: Ground) -> Iterator[Jumps | Apart]:
    """Yield the clocks that jump, and those that are apart; in the short form, some."""
    for operation in JUMPING:
        kind = Jumps(ground, operation)
        if ground.long or kind.name in SHORT:
            yield kind
    for operation in STANDING:
        for dialect in DATABASES:
            apart = Apart(ground, operation, dialect)
            chosen = dialect == "sqlite" or operation.name == "save"
            if apart.name in SHORT or (ground.long and chosen):
                yield apart


def recorded(act: Callable[[Site, int], None], site: Site) -> list[Step]:
    """Do something in a child; return its steps."""
    carry_out(_record, act, site)
    return begun(_log(site, "record"))


def turns(steps: Sequence[Step]) -> list[Step]:
    """Return the ends of transactions, and what changes files by name: little lies in between."""
    return [one for one in steps if one.what in ("COMMIT", *PAIRS, *PATHS)]


def do(operation: Operation, site: Site, jump: Jump, stop: int | None) -> str | None:
    """Do an operation by a clock that jumps; where it is to, stand still at a step."""
    torch.set_num_threads(1)
    clock = Clock(0.0 if jump.number else jump.hours)

    def act() -> None:
        if stop is None:
            clock.ahead = jump.hours
            return
        still(site).touch()
        until = time.monotonic() + WAIT
        while not go(site).exists():
            assert time.monotonic() < until, "nobody said go"
            time.sleep(0.005)

    name = "jump" if stop is None else "stop"
    At(site.root, _log(site, name), jump.number if stop is None else stop, act).watch()
    return told(operation, site)


def still(site: Site) -> Path:
    """Return the file that is there once an operation stands still."""
    return site.root.parent / "still"


def go(site: Site) -> Path:
    """Return the file that lets it go on."""
    return site.root.parent / "go"


def _record(act: Callable[[Site, int], None], site: Site) -> None:
    torch.set_num_threads(1)
    Steps(site.root, _log(site, "record"), die_at=None).watch()
    act(site, 0)


def _log(site: Site, name: str) -> Path:
    return site.root.parent / f"steps-{name}"


def _long_after(site: Site) -> None:
    """Look by a clock that is far ahead."""
    Clock(LONG_AFTER)


def _tend(site: Site, rank: int) -> None:
    with site.open() as repo:
        repo.expire(keep_last=1)
        repo.gc()
        repo.gc(grace="3h")


def _save_next(site: Site, rank: int) -> None:
    save(site, 5)


def _named(name: str) -> Operation:
    return next(one for one in OPERATIONS if one.name == name)


_FOUR, _LAST = frozenset({1, 2, 3, 4}), frozenset({4})
TEND = Operation("tend", untagged, _tend, _FOUR, _LAST, mend=_long_after)
JUMPING = [
    replace(_named("save"), mend=_long_after),
    replace(_named("async save"), mend=_long_after),
    TEND,
]
STANDING = [
    Operation("save", untagged, _save_next, _LAST, _LAST | {5}, mend=_long_after),
    Operation("load", untagged, load, _LAST, _LAST, mend=_long_after),
    Operation("tend", untagged, _tend, _LAST, _LAST, mend=_long_after),
]
