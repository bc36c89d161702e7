"""A run that a scheduler ends: the signal is noted, and the state is saved once, where it is safe.

Invariants: the handler notes the signal and does nothing else, so whatever it interrupts, a save
above all, goes on as if nothing had come; all ranks decide in the same check, so they save one step
together; and a process that is forked does not inherit the handler.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from dcpstore.collectives import find_collectives, gloo_twin, in_step
from dcpstore.errors import DcpstoreError, InvalidInputError
from dcpstore.saving.staging import finish_running

__all__ = ["Preemption", "on_preemption"]

_log = logging.getLogger(__name__)
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


def on_preemption(
    save: Callable[[], Any],
    signals: Iterable[int] = _SIGNALS,
    *,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
) -> Preemption:
    """Save once, on all ranks at one step, when a signal says that the run will be ended.

    From this call on the signals are only noted, on the rank that gets them. Every rank calls
    `check()` once a step; when any of them has had a signal, all call `save` in that check, and it
    returns True: leave the loop. A `with` block, or `close()`, gives the signals back::

        with dcpstore.on_preemption(lambda: dcpstore.save(state, "ckpts", step=step)) as preemption:
            for step in range(first, last):
                train(step)
                if preemption.check():
                    break

    The step that runs, the save that runs and the last save must fit in the time that the scheduler
    leaves (Slurm's `--signal=USR1@120` leaves 120 seconds).

    Args:
        save: saves the state as it is when it is called, by `dcpstore.save` or `async_save`.
        signals: which signals; none that cannot be caught.
        process_group: the ranks that take part; None is all.
        no_dist: watch this process alone, though a process group is there.

    Raises:
        InvalidInputError: this is not the main thread, which alone may handle signals; or `save` or
            a signal is not one. All ranks raise it.
    """
    ranks = find_collectives(process_group, no_dist=no_dist)

    def check_arguments() -> tuple[int, ...]:
        if not callable(save):
            raise InvalidInputError(
                f"save={save!r} is not a function; pass one that saves, such as "
                "lambda: dcpstore.save(state, repo, step=step)."
            )
        if threading.current_thread() is not threading.main_thread():
            raise InvalidInputError(
                "on_preemption was called in a thread, and Python lets the main thread alone "
                "handle signals; call it there, before the training loop."
            )
        return _checked(signals)

    wanted: list[tuple[int, ...]] = []
    in_step(ranks, "watch for signals", lambda: wanted.append(check_arguments()), lambda _: None)
    group = gloo_twin(process_group) if ranks.size > 1 else None
    return Preemption(save, wanted[0], group=group, leads=ranks.leads)


class Preemption:
    """The watch that `on_preemption` sets up; a context manager.

    Attributes:
        signal: the signal for which the state was saved, on every rank; None if there was none. A
            scheduler that runs a job again only if it failed wants `sys.exit(128 + signal)`.
    """

    def __init__(
        self,
        save: Callable[[], Any],
        signals: tuple[int, ...],
        *,
        group: dist.ProcessGroup | None,
        leads: bool,
    ) -> None:
        self.signal: int | None = None
        self._save = save
        self._group = group
        self._leads = leads
        self._noted = 0  # the first signal that came; 0 is none
        self._came = 0.0
        self._latest: Any = None  # what `save` returned since the last check
        self._before: dict[int, Any] = {}
        _watching.append(self)
        for number in signals:
            self._before[number] = signal.signal(number, self._note)
            # C code that waits in a call to the system goes on waiting, as Python's does
            signal.siginterrupt(number, False)

    def check(self) -> bool:
        """Tell whether the run is to end; if so, the state has been saved, once.

        A safe point: every rank calls it once a step, where its state is whole. The ranks wait for
        each other here; it costs one number from each of them.

        Raises:
            DcpstoreError: whatever made the save fail, as `save` raises it, on all ranks; or a rank
                ended without coming here.
        """
        if self.signal is not None:
            return True
        latest, self._latest = self._latest, None
        agreed = self._agree()
        if not agreed:
            return False
        self._end(agreed, latest)
        self.signal = agreed
        return True

    def save(self) -> Any:
        """Save now, with the function that was given, and return what it returns.

        A check in the same step then does not save the step again, whether the save was
        asynchronous or not.
        """
        self._latest = self._save()
        return self._latest

    def close(self) -> None:
        """Give the signals back to the handlers of before; a second time does nothing."""
        if self in _watching:
            _watching.remove(self)
        while self._before:
            number, handler = self._before.popitem()
            if signal.getsignal(number) == self._note:
                # None is a handler that Python did not set, and cannot set again
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def __enter__(self) -> Preemption:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.check()  # for a signal that came after the last one
        finally:
            self.close()
        if self._noted and self.signal is None:
            _log.warning("%s came, and nothing was saved for it", _name(self._noted))

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; this runs on top of anything, so it neither logs, waits nor raises."""
        if not self._noted:
            self._came = time.monotonic()
            self._noted = number

    def _agree(self) -> int:
        """Return the signal that any rank has had, the same on all of them; 0 is none."""
        if self._group is None:
            return self._noted
        noted = torch.tensor([self._noted], dtype=torch.int32, device="cpu")
        try:
            dist.all_reduce(noted, op=dist.ReduceOp.MAX, group=self._group)
        except RuntimeError as error:  # gloo's
            raise DcpstoreError(
                "the ranks could not agree whether a signal has come, for one of them has ended or "
                f"did not call check() ({error}); every rank must call it once a step."
            ) from error
        return int(noted)

    def _end(self, agreed: int, latest: Any) -> None:
        """Have the state saved: by the save of this step, if there was one, or else now."""
        began = time.monotonic()
        saved = None
        if latest is not None:
            try:
                saved = _finished(latest)
            except DcpstoreError as error:
                _log.error("the save of this step failed, so it is saved again: %s", error)
        finish_running()  # a save before that failed must not keep this one from being made
        if saved is None:
            saved = _finished(self._save())
        if self._leads:
            now = time.monotonic()
            waited = f" and {began - self._came:.1f} s before it" if self._noted else ""
            _log.warning("%s came: saved %s in %.1f s%s", _name(agreed), saved, now - began, waited)


def _checked(signals: Iterable[int]) -> tuple[int, ...]:
    """Return the signals to watch for.

    Raises:
        InvalidInputError: there is none, or one that cannot be caught.
    """
    if not isinstance(signals, Iterable) or isinstance(signals, str):
        raise InvalidInputError(f"signals={signals!r}; give a list, such as [signal.SIGTERM].")
    numbers = tuple(dict.fromkeys(signals))
    bad = {getattr(signal, name, None) for name in ("SIGKILL", "SIGSTOP")}
    for number in numbers:
        if not isinstance(number, int) or number not in signal.valid_signals() or number in bad:
            raise InvalidInputError(
                f"{number!r} is not a signal that a process can catch; give such as signal.SIGTERM."
            )
    if not numbers:
        raise InvalidInputError("signals is empty; give at least one, such as signal.SIGTERM.")
    return numbers


def _finished(saved: Any) -> Any:
    """Return what a save came to, once an asynchronous one has ended."""
    result = getattr(getattr(saved, "upload_completion", saved), "result", None)  # a stager's, too
    return result() if callable(result) else saved


def _name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


_watching: list[Preemption] = []
_forking = threading.local()  # of a thread that forks: the signals that it had blocked before


def _hold_back() -> None:
    """Before a fork: let signals wait, for the child must not take them as its parent does."""
    watched = {number for watch in _watching for number in watch._before}
    _forking.blocked = signal.pthread_sigmask(signal.SIG_BLOCK, watched)


def _let_come() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.blocked)


def _leave_to_parent() -> None:
    """In a process that was forked: end by a signal as any other process does.

    Who starts data loaders ends them by SIGTERM, and waits for them.
    """
    for watch in reversed([*_watching]):
        watch.close()
    _let_come()


if hasattr(os, "register_at_fork"):  # there is no fork on Windows
    os.register_at_fork(
        before=_hold_back, after_in_parent=_let_come, after_in_child=_leave_to_parent
    )
