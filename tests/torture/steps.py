"""Every step of a process towards disk, database and other ranks; and its death at one of them.

What a child does through Python's files, `os`, SQL and torch's collectives is counted and written
to a log, each step before it is taken and again when it is done. So one run finds the steps, and
another dies at the step of a number, by SIGKILL. Nothing in dcpstore knows of it: the functions
that dcpstore calls are wrapped, in a child that ends anyway.
"""

from __future__ import annotations

import builtins
import fcntl
import io
import json
import os
import re
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psycopg
import torch.distributed as dist
from sqlalchemy import Engine, event
from torch.distributed import distributed_c10d

__all__ = ["Step", "Steps", "begun", "done"]

PATHS = ("mkdir", "rmdir", "unlink", "remove", "truncate")  # os functions of one path
PAIRS = ("rename", "replace", "link", "symlink")  # of two
FILES = ("write", "pwrite", "writev", "pwritev", "ftruncate", "posix_fallocate")  # of a descriptor
SYNCS = ("fsync", "fdatasync")
COLLECTIVES = (
    "all_gather",
    "all_gather_object",
    "all_reduce",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "irecv",
    "isend",
    "monitored_barrier",
    "new_group",
    "recv",
    "reduce",
    "scatter",
    "scatter_object_list",
    "send",
)
STORES = ("add", "check", "compare_set", "delete_key", "get", "multi_get", "set", "wait")


@dataclass(frozen=True, slots=True)
class Step:
    """A line of a log: a step that was begun, or one that was done.

    Attributes:
        number: its place among all of its process, from 0.
        what: the function, or the statement.
        path: the file that it is about, and `target` the other; else empty.
        saved: where the bytes lie that a sync made durable; else empty.
        done: whether the line was written after it.
        at: the time, in nanoseconds of one clock for all processes.
    """

    number: int
    what: str
    path: str
    target: str
    saved: str
    done: bool
    at: int


class Steps:
    """Counts the steps of this process; one lock, for a save has threads.

    Args:
        root: the folder whose files count.
        log: a file outside of it.
        die_at: the number of the step to die at, before it; None is never.
        tear: whether a write that it dies at leaves its first half.
        turns: a file by which processes take file steps in turns, so that the times in their logs
            tell the order of all; None lets them be.
        fellows: processes that die with this one.
    """

    def __init__(
        self,
        root: Path,
        log: Path,
        *,
        die_at: int | None,
        tear: bool = False,
        turns: Path | None = None,
        fellows: Sequence[int] = (),
    ) -> None:
        self._root, self._log = str(root), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._saved = log.with_suffix(f".{os.getpid()}")
        self._die_at, self._tear = die_at, tear
        self._turns = None if turns is None else os.open(turns, os.O_RDWR | os.O_CREAT)
        self._fellows = fellows
        self._lock = threading.RLock()
        self._count = self._depth = 0
        self._write = os.write

    def watch(self) -> None:
        """Wrap what dcpstore may call, for as long as this process lives."""
        for name in PATHS:
            self._wrap(os, name, lambda path, *_, **__: (os.fspath(path), ""))
        for name in PAIRS:
            self._wrap(os, name, lambda path, target, **_: (os.fspath(path), os.fspath(target)))
        for name in FILES:
            self._wrap(os, name, lambda descriptor, *_: (path_of(descriptor), ""))
        for name in SYNCS:
            self._wrap_sync(name)
        self._wrap_open()
        self._wrap_collectives()
        self._trace_sqlite()
        self._trace_copies()
        event.listen(Engine, "do_connect", self._connect)
        for moment in ("before_cursor_execute", "commit", "rollback"):
            event.listen(Engine, moment, self._sql(moment))

    @contextmanager
    def step(
        self, what: str, path: str = "", target: str = "", *, half: Any = None
    ) -> Iterator[Callable[[str], None]]:
        """Count a step; where it is the one to die at, do `half` of it, if anything, and die.

        Yields a function that notes where the bytes lie that the step made durable.
        """
        saved: list[str] = []
        with self._in_turn(path):
            with self._lock:
                number = self._count
                self._count += 1
                said = Step(number, what, path, target, "", False, time.monotonic_ns())
                self._say(said)
                if number == self._die_at:
                    if self._tear and half is not None:
                        half()
                    for process in (*self._fellows, os.getpid()):
                        with suppress(ProcessLookupError):
                            os.kill(process, signal.SIGKILL)
            self.meet(number, what, path)
            yield saved.append
            now = time.monotonic_ns()
            self._say(replace(said, saved="".join(saved), done=True, at=now))

    def meet(self, number: int, what: str, path: str) -> None:
        """Do what a subclass has befall a step that is about to be taken."""

    def take(self, what: str) -> None:
        """Count a step of which only the beginning is seen."""
        with self.step(what):
            pass

    @contextmanager
    def _in_turn(self, path: str) -> Iterator[None]:
        """Keep other threads and processes from a file step meanwhile, where they take turns."""
        if self._turns is None or not path:
            yield
            return
        with self._lock:
            if not self._depth:
                fcntl.flock(self._turns, fcntl.LOCK_EX)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if not self._depth:
                    fcntl.flock(self._turns, fcntl.LOCK_UN)

    def _say(self, said: Step) -> None:
        self._write(self._log, (json.dumps(asdict(said)) + "\n").encode())

    def _watches(self, *paths: str) -> bool:
        return any(os.path.abspath(path).startswith(self._root) for path in paths if path)

    def _wrap(self, module: Any, name: str, paths_of: Callable[..., tuple[str, str]]) -> None:
        original = getattr(module, name)

        def wrapped(*given: Any, **said: Any) -> Any:
            path, target = paths_of(*given, **said)
            if not self._watches(path, target):
                return original(*given, **said)
            half = None
            if name in ("write", "pwrite"):
                torn = memoryview(given[1]).cast("B")
                half = lambda: original(given[0], torn[: len(torn) // 2], *given[2:])  # noqa: E731
            with self.step(name, path, target, half=half):
                return original(*given, **said)

        setattr(module, name, wrapped)

    def _wrap_sync(self, name: str) -> None:
        original = getattr(os, name)

        def wrapped(descriptor: Any) -> None:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            path = path_of(number)
            if not self._watches(path):
                original(descriptor)
                return
            with self.step(name, path) as note:
                original(descriptor)
                if not os.path.isdir(path):
                    note(self._keep(path))

        setattr(os, name, wrapped)

    def _keep(self, path: str) -> str:
        """Keep the bytes that are durable now: the file may be written to again, or go."""
        kept = f"{self._saved}-{self._count}"
        with original_open(path, "rb") as file, original_open(kept, "wb") as copy:
            copy.write(file.read())
        return kept

    def _wrap_open(self) -> None:
        steps, original = self, os.open

        def opened(path: Any, flags: int, *rest: Any, **said: Any) -> int:
            writes = flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR)
            if not writes or not steps._watches(os.fspath(path)):
                return original(path, flags, *rest, **said)
            with steps.step("create" if flags & os.O_CREAT else "open", os.fspath(path)):
                return original(path, flags, *rest, **said)

        def opened_file(file: Any, mode: str = "r", *rest: Any, **said: Any) -> Any:
            path = path_of(file) if isinstance(file, int) else os.fspath(file)
            if not set(mode) & set("wax+") or not steps._watches(path):
                return original_open(file, mode, *rest, **said)
            buffering = said.pop("buffering", rest[0] if rest else -1)
            assert "b" in mode, "dcpstore writes bytes"
            assert "+" not in mode, "dcpstore writes from the beginning"
            raw_mode = mode.replace("b", "")
            if isinstance(file, int):
                raw = CountedFile(steps, file, raw_mode)
            else:
                with steps.step("create", path):
                    raw = CountedFile(steps, file, raw_mode)
            if buffering == 0:
                return raw
            return io.BufferedWriter(raw, buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE)

        os.open = opened
        io.open = builtins.open = opened_file

    def _wrap_collectives(self) -> None:
        for name in COLLECTIVES:
            original = getattr(distributed_c10d, name)

            def wrapped(
                *given: Any, _original: Any = original, _name: str = name, **said: Any
            ) -> Any:
                with self.step(_name):
                    return _original(*given, **said)

            setattr(distributed_c10d, name, wrapped)
            setattr(dist, name, wrapped)
        for name in STORES:
            original = getattr(distributed_c10d.Store, name, None)
            if original is not None:

                def asked(*given: Any, _original: Any = original, _name: str = name) -> Any:
                    with self.step(f"store.{_name}"):
                        return _original(*given)

                setattr(distributed_c10d.Store, name, asked)

    def _trace_sqlite(self) -> None:
        """Have SQLite tell of every statement that it begins, COMMIT and PRAGMA too."""
        original = sqlite3.connect

        def connect(*given: Any, **said: Any) -> sqlite3.Connection:
            with self.step("connect"):
                connection: sqlite3.Connection = original(*given, **said)
            connection.set_trace_callback(lambda statement: self.take(shown(statement)))
            return connection

        sqlite3.connect = connect  # type: ignore[assignment]

    def _trace_copies(self) -> None:
        """Have psycopg tell of each COPY, of which SQLAlchemy knows nothing."""
        original = psycopg.Cursor.copy

        def copy(cursor: Any, statement: Any, *given: Any, **said: Any) -> Any:
            self.take(shown(statement))
            return original(cursor, statement, *given, **said)

        psycopg.Cursor.copy = copy

    def _connect(self, dialect: Any, *_: Any) -> None:
        if dialect.name == "postgresql":
            self.take("connect")

    def _sql(self, moment: str) -> Callable[..., None]:
        def heard(
            connection: Any, _: Any = None, statement: str = moment.upper(), *__: Any
        ) -> None:
            if connection.dialect.name == "postgresql":  # SQLite tells by itself
                self.take(shown(statement))

        return heard


class CountedFile(io.FileIO):
    """A file each of whose writes to the operating system is a step."""

    def __init__(self, steps: Steps, file: Any, mode: str) -> None:
        super().__init__(file, mode)
        self._steps = steps

    def write(self, data: Any, /) -> int:
        """Write bytes, as the buffer above hands them on."""
        torn = memoryview(data).cast("B")
        write = super().write
        with self._steps.step(
            "write", path_of(self.fileno()), half=lambda: write(torn[: len(torn) // 2])
        ):
            return write(data)


original_open = open


def path_of(descriptor: int) -> str:
    """Return what an open file is called now."""
    return os.readlink(f"/proc/self/fd/{descriptor}")


def shown(statement: str) -> str:
    """Return a statement short, and without what differs from run to run."""
    return re.sub(r"'[^']*'|\d+", "?", " ".join(statement.split()))[:80]


def begun(log: Path) -> list[Step]:
    """Return the steps of a process that came so far."""
    return [step for step in _read(log) if not step.done]


def done(logs: Iterable[Path]) -> list[Step]:
    """Return the steps that processes finished, in the order of time."""
    return sorted((s for log in logs for s in _read(log) if s.done), key=lambda step: step.at)


def _read(log: Path) -> list[Step]:
    return [Step(**json.loads(line)) for line in log.read_text().splitlines()]
