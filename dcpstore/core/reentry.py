"""What each thread is changing, so that no change begins inside another one of its own thread.

Signal handlers, finalizers (`__del__`, weak references), callbacks of the garbage collector and the
callbacks that a save makes all run on top of what their thread is doing. A change that begins there
would wait for a lock that its own thread holds, until a timeout blames another process.

Invariant: such a change is refused at once, and leaves the one around it as it is. Other threads
are not looked at: they wait for one another, as processes do.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dcpstore.errors import ConflictError

__all__ = ["changing", "refuse_inside_change"]


class _Thread(threading.local):
    """What this thread is changing: what each key stands for, as people may see it."""

    def __init__(self) -> None:
        # With the process, for one that is forked inside a change is not in it.
        self.changes: dict[tuple[int, str], str] = {}


_thread = _Thread()


@contextmanager
def changing(key: str, *, shown: str) -> Iterator[None]:
    """Hold that this thread changes what `key` stands for, until the block ends.

    Raises:
        ConflictError: it does already, further up its stack.
    """
    refuse_inside_change(key)
    # This thread's own mapping, for a collector may end this block in another one.
    changes, mine = _thread.changes, (os.getpid(), key)
    try:
        changes[mine] = shown
        yield
    finally:
        changes.pop(mine, None)


def refuse_inside_change(key: str | None = None) -> None:
    """Raise where this thread is inside a change of what `key` stands for; None is any change.

    Raises:
        ConflictError: it is.
    """
    process = os.getpid()
    found = [
        shown
        for (of_process, held), shown in _thread.changes.items()
        if of_process == process and key in (None, held)
    ]
    if found:
        raise ConflictError(
            f"this thread is already saving to {found[0]}, or changing it, and this call comes "
            "from inside that: from a signal handler, a finalizer or a callback. It was refused, "
            "for it would wait for itself. Call it when the other has returned; to save when a "
            "signal comes, use dcpstore.on_preemption."
        )
