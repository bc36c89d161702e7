"""SIGKILL at every step of an operation, and loss of power at every step that touches the disk.

One run is recorded to find the steps; then, for each, a new copy of the repository is struck there,
and a new process looks: all versions load, bit for bit; what was killed is whole or unseen; the
next save succeeds; gc clears the rest.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from tests.torture.children import Ended, start
from tests.torture.kinds import DATABASES, Dialect, Ground, Outcome, Verdict
from tests.torture.loss import Disk
from tests.torture.operations import OPERATIONS, Operation, check
from tests.torture.sites import Mould, Site
from tests.torture.steps import Step, Steps, begun, done

__all__ = ["Kills", "Point", "kinds"]

# What is left of the disk: all that was written; of the last write, half; nothing that was not
# synced; or of that, a part.
Left = Literal["all", "torn", "synced", "some"]
PATIENCE = timedelta(seconds=3)  # of ranks for one another
LONG_PATIENCE = timedelta(seconds=30)
# How many points the short form tries.
SHORT = {
    ("save", "sqlite"): 6,
    ("save", "postgres"): 4,
    ("save on two ranks", "sqlite"): 4,
    ("first save", "sqlite"): 3,
    ("gc: repack", "postgres"): 3,
}


@dataclass(frozen=True, slots=True)
class Point:
    """A step to die at, of one rank, and what the disk keeps."""

    number: int
    what: str
    rank: int
    left: Left
    is_end: bool

    def __str__(self) -> str:
        return f"rank {self.rank} at step {self.number} ({self.what}), {self.left} left"


class Kills:
    """The kills of one operation, on one kind of database."""

    def __init__(self, ground: Ground, operation: Operation, dialect: Dialect) -> None:
        self._ground, self._operation, self._dialect = ground, operation, dialect
        self.name = f"kill: {operation.name}, {dialect}"
        # Each point works in processes of its own, and ranks mostly wait for a dead one.
        self.at_once = 2 if operation.ranks == 1 else 6

    @cached_property
    def _mould(self) -> Mould:
        return Mould(self._ground, self._dialect, self._prepare)

    def _prepare(self, site: Site) -> None:
        ended = start(self._operation.prepare, site).end()
        assert (ended.code, ended.error) == (0, ""), ended

    def points(self) -> Sequence[Point]:
        """Run the operation once, and return its steps."""
        site = self._mould.copy()
        ended = self._strike(site, None, LONG_PATIENCE)
        for one in ended:
            assert (one.code, one.error) == (0, ""), one
        points: list[Point] = []
        for rank, log in enumerate(self._logs(site)):
            disk = Disk(site.root, self._mould.before) if self._operation.ranks == 1 else None
            points += _points(begun(log), done([log]), rank, disk)
        self._mould.discard(site)
        return self._ground.pick(points, SHORT.get((self._operation.name, self._dialect), 1))

    def try_point(self, point: Point) -> Outcome:
        """Kill a rank there, leave what the disk keeps, and look."""
        site = self._mould.copy()
        struck = self._strike(site, point, PATIENCE)
        if self._operation.ranks > 1 and struck[point.rank].code != -signal.SIGKILL:
            # On a busy machine they may have waited in vain for one another before that.
            self._mould.discard(site)
            site = self._mould.copy()
            struck = self._strike(site, point, LONG_PATIENCE)
        for rank, ended in enumerate(struck):
            if ended.hung:
                return Outcome(Verdict.HUNG, f"rank {rank} waits")
            if rank == point.rank and ended.code != -signal.SIGKILL:
                return Outcome(Verdict.LOST, f"it did not come so far: {ended}")
            if rank != point.rank and ended.error and f"rank {point.rank}" not in ended.error:
                return Outcome(Verdict.LOST, f"rank {rank} does not say who died: {ended.error}")
        if point.left in ("synced", "some"):
            chance = random.Random(point.number)
            disk = Disk(site.root, self._mould.before)
            for step in done(self._logs(site)):
                disk.take(step)
            disk.lose_power(lambda: point.left == "some" and chance.random() < 0.5)
        looked = start(check, self._operation, site, point.is_end).end()
        if looked.hung:
            return Outcome(Verdict.HUNG, "the look afterwards waits")
        if looked.error or looked.code:
            last = "".join(looked.error.splitlines(keepends=True)[-8:])
            return Outcome(Verdict.LOST, f"exit code {looked.code}\n{last}")
        self._mould.discard(site)
        return Outcome(Verdict.SURVIVED)

    def _strike(self, site: Site, point: Point | None, patience: timedelta) -> list[Ended]:
        children = [
            start(_work, self._operation, site, rank, point, patience)
            for rank in range(self._operation.ranks)
        ]
        return [child.end() for child in children]

    def _logs(self, site: Site) -> list[Path]:
        return [_log(site, rank) for rank in range(self._operation.ranks)]


def kinds(ground: Ground) -> Iterator[Kills]:
    """Yield the kills of every operation on both databases; in the short form, of some."""
    for operation in OPERATIONS:
        for dialect in DATABASES:
            if ground.long or (operation.name, dialect) in SHORT:
                yield Kills(ground, operation, dialect)


def _points(
    steps: Sequence[Step], ended: Sequence[Step], rank: int, disk: Disk | None
) -> Iterator[Point]:
    """Yield the points of a rank; loss of power only where it changes something new.

    Where several ranks write, no one of them tells what is on the disk: `disk` is None.
    """
    finished = {step.number: step for step in ended}
    touched = True
    for step in steps:
        what = f"{step.what} {step.path.rsplit('/', 1)[-1]}".strip()
        lefts: list[Left] = ["all"]
        if step.what in ("write", "pwrite"):
            lefts.append("torn")
        is_end = step is steps[-1]  # then all that was promised must be there
        if disk is not None and (touched or is_end) and not disk.is_synced:
            lefts += ["synced", "some"]
        yield from (Point(step.number, what, rank, left, is_end) for left in lefts)
        touched = bool(step.path)
        if disk is not None and step.number in finished:
            disk.take(finished[step.number])


def _log(site: Site, rank: int) -> Path:
    return site.root.parent / f"steps-{rank}"


def _work(
    operation: Operation, site: Site, rank: int, point: Point | None, patience: timedelta
) -> None:
    """Do the operation as one rank, and die where the point says."""
    torch.set_num_threads(1)
    if operation.ranks > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        meeting = site.root.parent / "meeting"
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=operation.ranks,
            timeout=patience,
        )
    die_at, tear = None, False
    if point is not None and point.rank == rank:
        die_at, tear = point.number, point.left == "torn"
    steps = Steps(site.root, _log(site, rank), die_at=die_at, tear=tear)
    steps.watch()
    operation.act(site, rank)
    steps.take("end")
