"""Python's garbage collector, held off while very many records are made that all stay.

Each time the number of objects has grown by a quarter the collector walks through every one of
them, the training program's too; in a save of 5,000 tensors that took half of the time. Reference
counts still free what they can. Invariant: it is off while anybody holds it off, and never while
all who do are waiting.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collector_free", "collector_held"]

_FEW = 256 << 20  # bytes that any disk moves soon enough


class _Holders:
    """How many threads hold the collector off, and whether it was on before the first of them."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may save, too
        self._count = 0
        self._was_on = False

    def enter(self) -> None:
        with self._lock:
            self._count += 1  # first, so that who interrupts here finds it held
            if self._count == 1:
                self._was_on = gc.isenabled()
                gc.disable()

    def leave(self) -> None:
        with self._lock:
            if self._count == 1 and self._was_on:
                gc.enable()
            self._count -= 1  # last, for the same reason

    def keep_own(self) -> None:
        """In a process that was forked: of all threads only this one is there."""
        self._lock = threading.RLock()
        if self._count:
            self._count = 1
            if not _is_holding():
                self.leave()


_holders = _Holders()
_thread = threading.local()


@contextmanager
def collector_held() -> Iterator[None]:
    """Hold the collector off; threads may do so at once, and the last one lets it go on."""
    with _thread_holding(True):
        yield


@contextmanager
def collector_free(nbytes: int = _FEW) -> Iterator[None]:
    """Let the collector go on, for all that this thread wants, while it waits or moves bytes.

    It does not pay for few bytes, which are moved soon.
    """
    with _thread_holding(nbytes < _FEW and _is_holding()):
        yield


@contextmanager
def _thread_holding(holds: bool) -> Iterator[None]:
    before = _is_holding()
    _hold(holds)
    try:
        yield
    finally:
        _hold(before)


def _is_holding() -> bool:
    return getattr(_thread, "is_holding", False)


def _hold(holds: bool) -> None:
    if holds == _is_holding():
        return
    _thread.is_holding = holds
    if holds:
        _holders.enter()
    else:
        _holders.leave()


if hasattr(os, "register_at_fork"):  # there is no fork on Windows
    os.register_at_fork(after_in_child=_holders.keep_own)
