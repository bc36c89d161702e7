"""Disables cyclic garbage collection while a save or a load makes very many objects that all stay.

Each time the number of objects has grown by a quarter, the collector visits every object of the
process, those of the training program too; in a save of 5,000 tensors that took half of the time.
Reference counts still free what they can. Invariant: collection is off while at least one thread
pauses it, and on while all of those threads wait or move bytes.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["gc_allowed", "gc_paused"]

_FEW = 256 << 20  # bytes; every disk moves so few soon, and a collection costs more


class _Pauses:
    """Counts the threads that pause the collector, and remembers whether it was on before."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may save while this thread holds it
        self._count = 0
        self._was_on = False

    def enter(self) -> None:
        with self._lock:
            self._count += 1  # first: a signal handler that runs now must find it paused
            if self._count == 1:
                self._was_on = gc.isenabled()
                gc.disable()

    def leave(self) -> None:
        with self._lock:
            if self._count == 1 and self._was_on:
                gc.enable()
            self._count -= 1  # last, for the same reason

    def after_fork(self) -> None:
        """Count again in a forked process, where only the thread that forked still runs."""
        self._lock = threading.RLock()  # another thread may have held the old one
        if self._count:
            self._count = 1
            if not _is_pausing():
                self.leave()


_pauses = _Pauses()
_thread = threading.local()


@contextmanager
def gc_paused() -> Iterator[None]:
    """Disable cyclic garbage collection inside the block; nestable, and thread-safe."""
    with _thread_pausing(True):
        yield


@contextmanager
def gc_allowed(nbytes: int = _FEW) -> Iterator[None]:
    """Allow it again inside a block in which this thread waits, or moves `nbytes` bytes.

    For few bytes it does nothing.
    """
    with _thread_pausing(nbytes < _FEW and _is_pausing()):
        yield


@contextmanager
def _thread_pausing(pauses: bool) -> Iterator[None]:
    before = _is_pausing()
    _set(pauses)
    try:
        yield
    finally:
        _set(before)


def _is_pausing() -> bool:
    return getattr(_thread, "is_pausing", False)


def _set(pauses: bool) -> None:
    if pauses == _is_pausing():
        return
    _thread.is_pausing = pauses
    if pauses:
        _pauses.enter()
    else:
        _pauses.leave()


os.register_at_fork(after_in_child=_pauses.after_fork)
