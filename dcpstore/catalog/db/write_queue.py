"""The queue in which the writers of one SQLite file wait for their turn.

SQLite lets one writer work at a time, and those that wait look again and again; who looks at the
right moment is next. With dozens of writers some are never, and give up. Here each writer takes a
place in a queue, and asks SQLite when nobody is before it.

A place is a lock on one byte of the folder in which the file lies, at an offset that grows with the
time at which it was taken. So there is no file to keep, and nothing to repair: the kernel releases
the lock of a process that ends in any way. Threads of a process wait for each other first, so that
none of them takes its own process for another one.

Invariant: the queue decides who is next, never who may write. SQLite's own lock does that, so where
the queue does not work (a filesystem without such locks, another operating system, a program that
writes without it), writers are only less fairly served. Nobody waits forever: a writer that has the
same one before it for `seconds` goes on to ask SQLite, which reports what is wrong.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["WriteQueue"]

_FLOCK = struct.Struct("hhqqi4x")  # type, whence, start, length, process: as 64-bit Linux has it
# Locks of an open file, not of a process: each thread has its own, and closing another file of the
# folder releases none. They are Linux's; elsewhere there is no queue.
_SET = getattr(fcntl, "F_OFD_SETLK", None)
_GET = getattr(fcntl, "F_OFD_GETLK", None)
_NAME_BITS = 15  # of an offset, so that catalogs of one folder have queues of their own
_TIME_BITS = 48  # microseconds of nine years, counted from the start of the machine
_NEXT, _LATER = 0.001, 0.02  # seconds between two looks of the writer that is next, and of others


class WriteQueue:
    """The queue before one SQLite file.

    Args:
        file: of the database.
        seconds: how long one writer before this one is waited for.
    """

    def __init__(self, file: Path, *, seconds: float) -> None:
        self._file, self._seconds = file, seconds
        self._passed = 0  # the greatest offset of a place that was waited for too long
        self._process, self._inside = os.getpid(), threading.Lock()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until it is this thread's turn to write; the next one's comes when the block ends.

        The block must not wait for another turn of the same thread.
        """
        with self._own_threads():
            folder = self._take_place()
            try:
                yield
            finally:
                if folder is not None:
                    _release(folder)

    def _own_threads(self) -> threading.Lock:
        if self._process != os.getpid():
            # In a forked child, a thread that the parent alone has may hold the lock forever.
            self._process, self._inside = os.getpid(), threading.Lock()
        return self._inside

    def _take_place(self) -> int | None:
        """Wait until nobody is before this writer; return the descriptor that holds its place.

        None means that there is no queue here.
        """
        if _SET is None or _GET is None:
            return None
        path = os.path.realpath(self._file)
        try:
            folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            first = (zlib.crc32(os.path.basename(path).encode()) >> (32 - _NAME_BITS)) << _TIME_BITS
            own = first + (time.monotonic_ns() // 1000) % (1 << _TIME_BITS)
            # A lock to read needs no right to write; it is seen by those who ask what would stop a
            # lock to write.
            fcntl.fcntl(folder, _SET, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, own, 1, 0))
            self._wait(folder, first, own)
        except OSError:  # no such locks on this filesystem
            _release(folder)
            return None
        except BaseException:  # an interrupt
            _release(folder)
            raise
        return folder

    def _wait(self, folder: int, first: int, own: int) -> None:
        """Wait until no place between two offsets is taken, or the same one for too long."""
        before: int | None = None
        until = 0.0
        while (found := _first_taken(folder, max(first, self._passed + 1), own)) is not None:
            now = time.monotonic()
            if found != before:
                before, until = found, now + self._seconds
            elif now > until:
                # Not waited for again. Its process may have been killed, and a child live on that
                # it had forked in its turn.
                self._passed = found
                return
            is_next = _first_taken(folder, found + 1, own) is None
            time.sleep(_NEXT if is_next else _LATER)


def _release(folder: int) -> None:
    """Give a place up. A child that was forked meanwhile has the same open file, and keeps it."""
    assert _SET is not None
    with suppress(OSError):
        fcntl.fcntl(folder, _SET, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))
    os.close(folder)


def _first_taken(folder: int, start: int, end: int) -> int | None:
    """Return the offset of the first place that another writer has taken in a range."""
    assert _GET is not None
    first = None
    while start < end:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, end - start, 0)
        kind, _, found, _, _ = _FLOCK.unpack(fcntl.fcntl(folder, _GET, asked))
        if kind == fcntl.F_UNLCK:
            break
        first = end = found
    return first
