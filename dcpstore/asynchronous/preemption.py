"""Preemption: a signal of the scheduler is noted, and the state is saved once, where it is safe.

Invariants: the handler notes the signal and does nothing else, so that whatever it interrupts, even
a save, goes on undisturbed; all ranks decide in the same check, so that they save the same step;
and a forked process does not inherit the handler.
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
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_UNCATCHABLE = (signal.SIGKILL, signal.SIGSTOP)


def on_preemption(
    save: Callable[[], Any],
    signals: Iterable[int] = _SIGNALS,
    *,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
) -> Preemption:
    """Save once, on all ranks at one step, when a signal says that the run will be ended.

    From this call on the signals are only noted, on the rank that gets them. Every rank calls
    `check()` once a step. When any of them has got a signal, all call `save` in that check, and it
    returns True: leave the loop. A `with` block, or `close()`, restores the old handlers::

        with dcpstore.on_preemption(lambda: dcpstore.save(state, "ckpts", step=step)) as preemption:
            for step in range(first, last):
                train(step)
                if preemption.check():
                    break

    The current step, a running save and the last save together must fit in the time that the
    scheduler allows (Slurm's `--signal=USR1@120` allows 120 seconds).

    Args:
        save: saves the current state, with `dcpstore.save` or `async_save`.
        signals: which signals; each must be one that a process can catch.
        process_group: the ranks that take part; None is all.
        no_dist: watch this process alone, even if there is a process group.

    Raises:
        InvalidInputError: this is not the main thread, and only that may handle signals; or `save`
            is not a function, or a signal is invalid. All ranks raise it.
    """
    ranks = find_collectives(process_group, no_dist=no_dist)

    numbers: tuple[int, ...] = ()

    def check_arguments() -> None:
        nonlocal numbers
        if not callable(save):
            raise InvalidInputError(
                f"save={save!r} is not a function; pass one that saves, such as "
                "lambda: dcpstore.save(state, repo, step=step)."
            )
        if threading.current_thread() is not threading.main_thread():
            raise InvalidInputError(
                "on_preemption was called in another thread, and Python lets only the main thread "
                "handle signals; call it there, before the training loop."
            )
        numbers = _checked(signals)

    in_step(ranks, "watch for signals", check_arguments, lambda _: None)
    group = gloo_twin(process_group) if ranks.size > 1 else None
    return Preemption(save, numbers, group=group, leads=ranks.leads)


class Preemption:
    """The watch that `on_preemption` sets up; a context manager.

    Attributes:
        signal: the signal for which the state was saved, the same on every rank; None if there was
            none. If the scheduler requeues only failed jobs, call `sys.exit(128 + signal)`.
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
        self._noted = 0  # the first signal that arrived; 0 is none
        self._noted_at = 0.0
        self._latest: Any = None  # what `save` returned since the last check
        self._old_handlers: dict[int, Any] = {}
        _active.append(self)
        for number in signals:
            self._old_handlers[number] = signal.signal(number, self._note)
            # Restart system calls of C libraries after the signal, as Python does for its own.
            signal.siginterrupt(number, False)

    def check(self) -> bool:
        """Return whether the run must end; if so, the state has been saved, once.

        Every rank calls it once a step, at a place where its state is complete. The ranks wait for
        each other here, and exchange one number.

        Raises:
            DcpstoreError: the save failed, as `save` raises it, on all ranks; or a rank ended
                without calling `check`.
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
        """Restore the old signal handlers; a second call does nothing."""
        if self in _active:
            _active.remove(self)
        while self._old_handlers:
            number, handler = self._old_handlers.popitem()
            if signal.getsignal(number) == self._note:  # else the program has set another one
                # None is a handler that C code installed, which Python cannot set again
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
                self.check()  # for a signal that arrived after the last one
        finally:
            self.close()
        if self._noted and self.signal is None:
            _log.warning("%s arrived, and nothing was saved for it", _name(self._noted))

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; this may interrupt any code, so it does not log, wait or raise."""
        if not self._noted:
            self._noted_at = time.monotonic()
            self._noted = number

    def _agree(self) -> int:
        """Return the signal that any rank has got, the same on all of them; 0 is none."""
        if self._group is None:
            return self._noted
        noted = torch.tensor([self._noted], dtype=torch.int32, device="cpu")
        try:
            dist.all_reduce(noted, op=dist.ReduceOp.MAX, group=self._group)
        except RuntimeError as error:  # gloo's
            raise DcpstoreError(
                "the ranks could not agree whether a signal has arrived, because one of them has "
                f"ended or did not call check() ({error}); every rank must call it once a step."
            ) from error
        return int(noted)

    def _end(self, agreed: int, latest: Any) -> None:
        """Wait for the save of this step, if there was one; save now if not, or if it failed."""
        began = time.monotonic()
        saved = None
        if latest is not None:
            try:
                saved = _finished(latest)
            except DcpstoreError as error:
                _log.error("the save of this step failed, so it is saved again: %s", error)
        finish_running()  # logs the failure of an earlier save, which `save` would raise instead
        if saved is None:
            saved = _finished(self._save())
        if self._leads:
            seconds = time.monotonic() - began
            waited = f", {began - self._noted_at:.1f} s after the signal" if self._noted else ""
            _log.warning("%s arrived: saved %s in %.1f s%s", _name(agreed), saved, seconds, waited)


def _checked(signals: Iterable[int]) -> tuple[int, ...]:
    """Return the signals to watch for.

    Raises:
        InvalidInputError: there is none, or one that cannot be caught.
    """
    if not isinstance(signals, Iterable) or isinstance(signals, str):
        raise InvalidInputError(f"signals={signals!r}; give a list, such as [signal.SIGTERM].")
    numbers = tuple(dict.fromkeys(signals))
    catchable = signal.valid_signals() - {*_UNCATCHABLE}
    for number in numbers:
        if not isinstance(number, int) or number not in catchable:
            raise InvalidInputError(
                f"{number!r} is not a signal that a process can catch; give one such as "
                "signal.SIGTERM."
            )
    if not numbers:
        raise InvalidInputError("signals is empty; give at least one, such as signal.SIGTERM.")
    return numbers


def _finished(saved: Any) -> Any:
    """Return the result of a save, after waiting for an asynchronous one."""
    # torch's `async_save` returns a Future, or with a stager an AsyncSaveResponse
    result = getattr(getattr(saved, "upload_completion", saved), "result", None)
    return result() if callable(result) else saved


def _name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


_active: list[Preemption] = []
_forking = threading.local()  # for a thread that forks: the signals that it had blocked before


def _block_signals() -> None:
    """Before a fork: block the signals, so that the child never handles one as its parent does."""
    watched = {number for preemption in _active for number in preemption._old_handlers}
    _forking.blocked = signal.pthread_sigmask(signal.SIG_BLOCK, watched)


def _unblock_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.blocked)


def _restore_handlers() -> None:
    """In a forked process: let the signals end it, as they end any other process.

    The worker processes of a data loader, for example, are ended by SIGTERM.
    """
    for preemption in reversed([*_active]):
        preemption.close()
    _unblock_signals()


os.register_at_fork(
    before=_block_signals, after_in_parent=_unblock_signals, after_in_child=_restore_handlers
)
