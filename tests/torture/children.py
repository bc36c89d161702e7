"""Child processes that faults may strike: forked from one that has torch and dcpstore loaded.

The fork server has one thread and no process group when it forks, so each child is as a process
that was just started, for a hundredth of the time. Every child ends: by itself, or at its deadline.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

__all__ = ["DEADLINE", "Child", "Ended", "carry_out", "start"]

DEADLINE = 60.0  # seconds; who is not done by then hangs
LOADED = "tests.torture.loaded"
# Starting a process asks after all others, and their exit codes can be read only once.
_one_at_a_time = threading.Lock()


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended.

    Attributes:
        code: its exit code, negative for a signal, None where it had to be killed at its deadline.
        value: what its call returned.
        error: the traceback of what its call raised, else empty.
    """

    code: int | None
    value: Any = None
    error: str = ""

    @property
    def hung(self) -> bool:
        """Whether it was still at work at its deadline."""
        return self.code is None


class Child:
    """A call that runs in a process of its own."""

    def __init__(self, call: Callable[..., Any], arguments: Sequence[Any]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([LOADED])
        self._pipe, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(theirs, call, arguments))
        self._began = time.monotonic()
        with _one_at_a_time:
            self._process.start()
        theirs.close()

    def end(self, *, deadline: float = DEADLINE) -> Ended:
        """Wait until it ends, `deadline` seconds after its start at most; then it is killed."""
        until = self._began + deadline
        answer = None, ""
        try:
            if self._pipe.poll(max(until - time.monotonic(), 0)):
                answer = self._pipe.recv()
        except EOFError:  # it was killed before it could answer
            pass
        if wait([self._process.sentinel], max(until - time.monotonic(), 1)):
            self._join()
        code = self._process.exitcode
        self.kill()
        return Ended(code, *answer)

    def kill(self) -> None:
        """End it now."""
        self._process.kill()
        wait([self._process.sentinel])
        self._join()
        self._pipe.close()

    def _join(self) -> None:
        with _one_at_a_time:
            self._process.join()


def start(call: Callable[..., Any], *arguments: Any) -> Child:
    """Start `call(*arguments)` in a child; it must be importable by name."""
    return Child(call, arguments)


def carry_out(call: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `call(*arguments)` returns in a child; it must succeed."""
    ended = start(call, *arguments).end()
    assert (ended.code, ended.error) == (0, ""), ended
    return ended.value


def _work(pipe: Any, call: Callable[..., Any], arguments: Sequence[Any]) -> None:
    try:
        answer = (call(*arguments), "")
    except Exception:
        answer = (None, traceback.format_exc())
    pipe.send(answer)
