"""A disk that fails while an operation works: full or read-only from some step on, broken at one.

The steps are those of a kill, found by recording one run; at a step that touches a file the system
call fails instead. A second kind caps the length of files in the kernel, which SQLite meets too.
The operation succeeds, or says in our words that it did not; then all must hold that holds of a
kill.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from dcpstore.errors import DcpstoreError
from tests.torture.children import Ended, start
from tests.torture.kinds import DATABASES, Dialect, Ground, Outcome, Verdict
from tests.torture.operations import OPERATIONS, Operation, check
from tests.torture.sites import Mould, Site
from tests.torture.steps import FILES, PAIRS, PATHS, SYNCS, Step, Steps, begun

__all__ = ["Disk", "kinds", "told", "verdict_of"]

ON_FILES = {*PATHS, *PAIRS, *FILES, *SYNCS, "create", "open"}
FILLING = {"mkdir", "create", *FILES, *PAIRS}  # what needs space
CHANGING = {*FILLING, *PATHS, "open"}  # what a filesystem refuses that turned read-only
LIMITS = (0, 100, 1000, 4095, 20_000, 65_536, 300_000, 1_000_000)  # bytes of a file
SHORT = {("save", "sqlite"): 2, ("save", "postgres"): 1, ("gc: repack", "sqlite"): 1}


@dataclass(frozen=True, slots=True)
class Break:
    """From which step on what fails: this one alone, all that need space, or all that change."""

    number: int
    what: str
    how: Literal["broken", "full", "read-only"]

    def __str__(self) -> str:
        return f"{self.how} at step {self.number} ({self.what})"

    def error(self, number: int, what: str) -> int | None:
        """Return the code that a step fails with, if it does."""
        match self.how:
            case "broken":
                return errno.EIO if number == self.number else None
            case "full":
                return errno.ENOSPC if number >= self.number and what in FILLING else None
            case "read-only":
                return errno.EROFS if number >= self.number and what in CHANGING else None


class Failing(Steps):
    """Counts steps as `Steps` does, and lets those on files fail."""

    def __init__(self, root: Path, log: Path, at: Break | None) -> None:
        super().__init__(root, log, die_at=None)
        self._at = at

    def meet(self, number: int, what: str, path: str) -> None:
        """Raise what the disk would where it is to fail."""
        if self._at is not None and path:
            code = self._at.error(number, what)
            if code is not None:
                raise OSError(code, os.strerror(code), path)


class Disk:
    """The failures of the disk under one operation, on one kind of database."""

    at_once = 2

    def __init__(self, ground: Ground, operation: Operation, dialect: Dialect) -> None:
        self._ground, self._operation, self._dialect = ground, operation, dialect
        self.name = f"disk: {operation.name}, {dialect}"

    @cached_property
    def _mould(self) -> Mould:
        return Mould(self._ground, self._dialect, self._operation.prepare)

    def points(self) -> Sequence[Break | int]:
        """Run the operation once; return its steps on files, and the longest that files may be."""
        site = self._mould.copy()
        ended = start(_work, self._operation, site, None).end()
        assert (ended.code, ended.value, ended.error) == (0, None, ""), ended
        steps = [step for step in begun(_log(site)) if step.path and step.what in ON_FILES]
        self._mould.discard(site)
        points: list[Break | int] = [*_breaks(steps), *LIMITS]
        return self._ground.pick(points, SHORT.get((self._operation.name, self._dialect), 1))

    def try_point(self, point: Break | int) -> Outcome:
        """Let the disk fail there, mend it, and look."""
        site = self._mould.copy()
        ended = start(_work, self._operation, site, point).end()
        return verdict_of(ended, self._operation, site, self._mould)


def verdict_of(ended: Ended, operation: Operation, site: Site, mould: Mould) -> Outcome:
    """Return what came of an operation that was to succeed or to fail in our words.

    A site where all is well is discarded.
    """
    if ended.hung:
        return Outcome(Verdict.HUNG, "it waits")
    if ended.error or ended.code:
        last = "".join(ended.error.splitlines(keepends=True)[-8:])
        return Outcome(Verdict.LOST, f"no error of ours: exit code {ended.code}\n{last}")
    looked = start(check, operation, site, ended.value is None).end()
    if looked.hung:
        return Outcome(Verdict.HUNG, "the look afterwards waits")
    if looked.error or looked.code:
        last = "".join(looked.error.splitlines(keepends=True)[-8:])
        return Outcome(Verdict.LOST, f"it said {ended.value!r}, and then:\n{last}")
    mould.discard(site)
    return Outcome(Verdict.SURVIVED)


def told(operation: Operation, site: Site) -> str | None:
    """Do an operation; return the error of ours that it raised, if any."""
    logging.disable(logging.WARNING)  # what is only logged is looked for afterwards
    try:
        operation.act(site, 0)
    except DcpstoreError as error:
        return f"{type(error).__name__}: {error}"
    return None


def kinds(ground: Ground) -> Iterator[Disk]:
    """Yield the failures of the disk under every operation of one rank."""
    for operation in OPERATIONS:
        for dialect in DATABASES:
            if operation.ranks == 1 and (ground.long or (operation.name, dialect) in SHORT):
                yield Disk(ground, operation, dialect)


def _work(operation: Operation, site: Site, point: Break | int | None) -> str | None:
    """Do the operation on a disk that fails."""
    torch.set_num_threads(1)
    if isinstance(point, int):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (point, resource.RLIM_INFINITY))
    else:
        Failing(site.root, _log(site), point).watch()
    said = told(operation, site)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    return said


def _log(site: Site) -> Path:
    return site.root.parent / "steps"


def _breaks(steps: Sequence[Step]) -> Iterator[Break]:
    for step in steps:
        yield Break(step.number, step.what, "broken")
        if step.what in FILLING:
            yield Break(step.number, step.what, "full")
        if step.what in CHANGING:
            yield Break(step.number, step.what, "read-only")
