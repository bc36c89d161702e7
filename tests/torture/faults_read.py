"""Files that cannot be read: the disk fails at some reading, or a pack is cut while it is mapped.

Each way to read a file of the repository is counted in one run; then one of them fails with EIO, or
as one that this user may not take. What was asked for comes right, bit for bit, or an error of ours
does. Of a pack that is cut while a load has it mapped the kernel says so by SIGBUS, which nothing
in Python can turn into an error: then the process may die, and never hands out other bytes.
"""

from __future__ import annotations

import builtins
import errno
import io
import mmap
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.torture.children import carry_out, start
from tests.torture.faults_disk import told, verdict_of
from tests.torture.kinds import Ground, Outcome, Verdict
from tests.torture.operations import OPERATIONS, Operation, check_versions, three_versions
from tests.torture.sites import Mould, Site
from tests.torture.steps import path_of

__all__ = ["LOAD", "Cuts", "Reads", "kinds", "load"]

CODES = (errno.EIO, errno.EACCES)


class Reading:
    """Counts the readings of this process below a folder, and lets one fail."""

    def __init__(self, root: Path, fail_at: int | None, code: int) -> None:
        self._root, self._fail_at, self._code = str(root), fail_at, code
        self._lock = threading.Lock()
        self.count = 0

    def watch(self) -> None:
        """Wrap what dcpstore may call, for as long as this process lives."""
        for module, name in ((os, "stat"), (os, "scandir"), (os, "lstat")):
            self._wrap(module, name)
        reading = self
        original = mmap.mmap

        class Mapped(original):  # type: ignore[misc, valid-type]
            def __new__(cls, descriptor: int, *given: Any, **said: Any) -> Any:
                if descriptor >= 0:
                    reading.take(path_of(descriptor))
                return original(descriptor, *given, **said)

        mmap.mmap = Mapped  # type: ignore[misc]
        original_open = open

        def opened(file: Any, mode: str = "r", *given: Any, **said: Any) -> Any:
            if isinstance(file, str | os.PathLike) and not set(mode) & set("wax+"):
                reading.take(os.fspath(file))
            found = original_open(file, mode, *given, **said)
            if isinstance(found, io.FileIO) and not found.writable():
                reading.take(path_of(found.fileno()))  # its bytes come next
            return found

        io.open = builtins.open = opened  # type: ignore[assignment]

    def take(self, path: str) -> None:
        """Count a reading; raise what the disk would where it is to fail."""
        if not os.path.abspath(path).startswith(self._root):
            return
        with self._lock:
            number = self.count
            self.count += 1
        if number == self._fail_at:
            raise OSError(self._code, os.strerror(self._code), path)

    def _wrap(self, module: Any, name: str) -> None:
        original = getattr(module, name)

        def wrapped(path: Any = ".", *given: Any, **said: Any) -> Any:
            if isinstance(path, str | os.PathLike):
                self.take(os.fspath(path))
            return original(path, *given, **said)

        setattr(module, name, wrapped)


@dataclass(frozen=True, slots=True)
class Unread:
    """Which reading fails, and with which code."""

    number: int
    code: int

    def __str__(self) -> str:
        return f"{errno.errorcode[self.code]} at reading {self.number}"


class Reads:
    """The failures of the readings of one operation."""

    at_once = 2

    def __init__(
        self, ground: Ground, operation: Operation, mould: Callable[[Operation], Mould]
    ) -> None:
        self._ground, self._operation, self._mould = ground, operation, mould
        self.name = f"unreadable: {operation.name}"

    def points(self) -> Sequence[Unread]:
        """Run the operation once, and count its readings."""
        site = self._mould(self._operation).copy()
        count = carry_out(_count, self._operation, site)
        self._mould(self._operation).discard(site)
        points = [Unread(number, code) for number in range(count) for code in CODES]
        return self._ground.pick(points, 1, 24)

    def try_point(self, point: Unread) -> Outcome:
        """Let the reading fail, and look."""
        site = self._mould(self._operation).copy()
        ended = start(_read, self._operation, site, point).end()
        return verdict_of(ended, self._operation, site, self._mould(self._operation))


class Cuts:
    """A pack is cut while a load has it mapped."""

    name = "unreadable: a pack is cut while it is read"

    def __init__(self, ground: Ground, mould: Callable[[Operation], Mould]) -> None:
        self._ground, self._mould = ground, mould

    def points(self) -> Sequence[tuple[int, int]]:
        """Return which pack that is mapped is cut, and to how many thousandths."""
        return self._ground.pick([(n, kept) for n in range(3) for kept in (999, 500, 1, 0)], 1)

    def try_point(self, point: tuple[int, int]) -> Outcome:
        """Cut the pack, and see what the load says."""
        site = self._mould(LOAD).copy()
        ended = start(_cut, site, *point).end()
        self._mould(LOAD).discard(site)
        if ended.hung:
            return Outcome(Verdict.HUNG, "the load waits")
        if ended.code == -signal.SIGBUS:
            return Outcome(Verdict.SURVIVED, "it died, as docs/guarantees.md says")
        if ended.error or ended.code or ended.value is None:
            return Outcome(Verdict.LOST, f"it gave out other bytes, or none: {ended}")
        return Outcome(Verdict.SURVIVED)


def kinds(ground: Ground) -> Iterator[Reads | Cuts]:
    """Yield the failures of every operation of one rank; in the short form, of a load."""

    @cache
    def mould(operation: Operation) -> Mould:
        return Mould(ground, "sqlite", operation.prepare)

    for operation in (LOAD, VERIFY, *OPERATIONS):
        if operation.ranks == 1 and (ground.long or operation is LOAD):
            yield Reads(ground, operation, mould)
    yield Cuts(ground, mould)


def _count(operation: Operation, site: Site) -> int:
    torch.set_num_threads(1)
    reading = Reading(site.root, None, 0)
    reading.watch()
    operation.act(site, 0)
    return reading.count


def _read(operation: Operation, site: Site, point: Unread) -> str | None:
    torch.set_num_threads(1)
    Reading(site.root, point.number, point.code).watch()
    return told(operation, site)


def _cut(site: Site, number: int, kept: int) -> str | None:
    """Load, and cut a pack in the moment after it was mapped."""
    torch.set_num_threads(1)
    count = 0
    original = mmap.mmap

    class Mapped(original):  # type: ignore[misc, valid-type]
        def __new__(cls, descriptor: int, *given: Any, **said: Any) -> Any:
            nonlocal count
            mapped = original(descriptor, *given, **said)
            if descriptor >= 0 and path_of(descriptor).endswith(".pack"):
                count += 1
                if count == number + 1:
                    os.truncate(path_of(descriptor), len(mapped) * kept // 1000)
            return mapped

    mmap.mmap = Mapped  # type: ignore[misc]
    return told(LOAD, site)


def load(site: Site, rank: int) -> None:
    """Load every version; what comes must be right."""
    with site.open() as repo:
        check_versions(repo)


def look(site: Site, rank: int) -> None:
    """Look for damage."""
    with site.open() as repo:
        repo.verify(deep=True)


_THREE = frozenset({1, 2, 3})
LOAD = Operation("load", three_versions, load, _THREE, _THREE)
VERIFY = Operation("verify", three_versions, look, _THREE, _THREE)
