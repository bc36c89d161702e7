"""What each thread is changing, so that no change begins inside another one of the same thread.

Signal handlers, finalizers (`__del__`, weak references), callbacks of the garbage collector and the
callbacks that a save makes all interrupt what their thread is doing. A change that begins there
would wait for a lock that its own thread holds, until a timeout blames another process.

Invariant: such a change is refused at once, and the outer one goes on unharmed. Other threads do
not matter here: they wait for each other, as processes do.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dcpstore.errors import ConflictError

__all__ = ["changing", "refuse_inside_change"]


class _Thread(threading.local):
    """What this thread is changing: by process and key, the name to show in a message."""

    def __init__(self) -> None:
        # The process is part of the key: a child forked inside a change is not inside it.
        self.changes: dict[tuple[int, str], str] = {}


_thread = _Thread()


@contextmanager
def changing(key: str, *, shown: str) -> Iterator[None]:
    """Record that this thread changes what `key` stands for, until the block ends.

    Raises:
        ConflictError: it already does, further up its stack.
    """
    refuse_inside_change(key)
    # Keep this thread's mapping: the garbage collector may end this block in another thread.
    changes, mine = _thread.changes, (os.getpid(), key)
    try:
        changes[mine] = shown
        yield
    finally:
        changes.pop(mine, None)


def refuse_inside_change(key: str | None = None) -> None:
    """Raise if this thread is inside a change of what `key` stands for; None means any change.

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
            "for it would wait for itself. Call it when the other call has returned; to save when "
            "a signal arrives, use dcpstore.on_preemption."
        )
