"""Saving while training goes on: stage, then save in a thread with a process group of its own.

Invariants: what is saved is what the state was when `async_save` returned; and no failure stays
silent, for it is raised at `result()`, or else at the next save, at `close()`, or at exit.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from torch.distributed.checkpoint.staging import AsyncStager

from dcpstore.collectives import (
    Alone,
    Collectives,
    RankGroup,
    alone_in,
    alone_in_thread,
    gloo_twin,
    in_step,
)
from dcpstore.compat.torch_private import AsyncSaveResponse, make_stager
from dcpstore.core.reentry import refuse_inside_change
from dcpstore.errors import ConflictError, InvalidInputError
from dcpstore.records import Version
from dcpstore.state.buffers import buffer_names
from dcpstore.state.savable import (
    check_copies,
    check_state,
    resolved,
    storage_nbytes,
    with_closed_shards,
    with_open_shards,
)
from dcpstore.state.stateful import check_keys, take_state
from dcpstore.state.walk import nesting_checked

__all__ = ["Background", "IfBusy", "PendingSave", "find_saver", "finish_running", "raise_unseen"]

_log = logging.getLogger(__name__)

IfBusy = Literal["wait", "refuse"]
# Given the staged state, who saves it, and the FQNs of module buffers in it.
Background = Callable[[Mapping[str, Any], Collectives, frozenset[str]], Version]


class PendingSave(Future[Version], AsyncSaveResponse):
    """An asynchronous save that was begun: a `concurrent.futures.Future` of its version.

    It is torch's `AsyncSaveResponse` too, for callers that expect one: `staging_completion` is
    `staged`, and `upload_completion` is the pending save itself. It runs from the start, on all
    ranks, and one rank cannot cancel it. Its failure counts as seen when `result` or `exception`
    has given it to someone; `wait`, `as_completed` and a callback that asks neither do not.

    Attributes:
        staged: done when the state may be changed again, which it is when `async_save` returns,
            unless a stager of the caller's goes on staging.
    """

    # those of a Future: the dataclass would compare by its fields, and have no hash
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(self, staged: Future[None]) -> None:
        Future.__init__(self)
        self.staged = staged
        self._is_seen = False
        self.set_running_or_notify_cancel()

    @property
    def staging_completion(self) -> Future[None]:  # type: ignore[override]  # read only here
        """Torch's name of `staged`."""
        return self.staged

    @property
    def upload_completion(self) -> Future[Version]:  # type: ignore[override]  # torch's has no value
        """Torch's name of the save's own future, which is this one."""
        return self

    def result(self, timeout: float | None = None) -> Version:
        """Wait for the save to end, `timeout` seconds at most, and return the version.

        Raises:
            DcpstoreError: whatever made the save fail, as `save` raises it.
            TimeoutError: it has not ended yet.
        """
        self.exception(timeout)
        return super().result()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the save to end, and return its failure, or None.

        Raises:
            TimeoutError: it has not ended yet.
        """
        failure = super().exception(timeout)  # until it ends, its failure is not reported
        self._is_seen = True
        return failure

    def wait(self) -> None:
        """Wait for the save to end, well or not; a failure stays for someone to see."""
        super().exception()

    def take_unseen(self) -> BaseException | None:
        """Return the failure of an ended save that nobody has seen, once."""
        return None if self._is_seen or not self.done() else self.exception()


@dataclass(frozen=True, slots=True)
class _Staged:
    """What staging gave on this rank: a state, or a future of it.

    `ready` ends when a stager of the caller's has been asked to synchronize.
    """

    state: Any
    ready: Future[None] | None = None

    @property
    def goes_on(self) -> bool:
        """Whether staging may still go on when `async_save` returns."""
        return self.ready is not None or isinstance(self.state, Future)

    def ended(self) -> Future[None]:
        """Return a future that ends with staging."""
        if self.ready is not None:
            return self.ready
        end: Future[None] = Future()
        if isinstance(self.state, Future):
            self.state.add_done_callback(lambda state: _settle(end, state.result))
        else:
            end.set_result(None)
        return end

    def settled(self) -> Mapping[str, Any]:
        """Wait for the end of staging; return the staged state."""
        if self.ready is not None:
            self.ready.result()
        state = self.state.result() if isinstance(self.state, Future) else self.state
        if not isinstance(state, Mapping):
            raise InvalidInputError(
                f"stage() of the async_stager gave a {type(state).__name__}; have it return the "
                "staged state as a dict, or a Future of one."
            )
        return state


class _Saver:
    """The thread, the process group and the buffers of the asynchronous saves of one group."""

    def __init__(self, group: dist.ProcessGroup | None, alone: Alone | None) -> None:
        # torch's calls on one group must not overlap, so the thread has a group of its own
        self._asking: Collectives = alone or RankGroup(group)
        self._saving: Collectives = alone or RankGroup(gloo_twin(group))
        self._thread = ThreadPoolExecutor(1, "dcpstore-async-save")
        self._stager = make_stager()
        self._last: PendingSave | None = None

    def begin(
        self,
        state_dict: Mapping[str, Any],
        prepare: Callable[[Collectives], Background],
        *,
        if_busy: IfBusy,
        staging_limit: int | None,
        stager: AsyncStager | None = None,
    ) -> PendingSave:
        """Stage the state and hand it to the thread, once the save before has ended.

        `prepare` is called first; what it raises, all ranks raise, and nothing is begun. A `stager`
        of the caller's stages instead of ours, and is the caller's to close.
        """
        save: Background
        staged: _Staged
        fits: bool
        buffers: frozenset[str] = frozenset()

        def ask() -> tuple[bool, BaseException | None, tuple[str, ...]]:
            nonlocal save
            if if_busy not in ("wait", "refuse"):
                raise InvalidInputError(f"if_busy={if_busy!r}; write 'wait' or 'refuse'.")
            if not isinstance(staging_limit, int | float | None):
                raise InvalidInputError(f"staging_limit={staging_limit!r}; give bytes, or None.")
            if stager is not None and not callable(getattr(stager, "stage", None)):
                raise InvalidInputError(
                    f"async_stager={stager!r} has no stage(); pass an AsyncStager of torch's, such "
                    "as a DefaultStager()."
                )
            if stager is not None and staging_limit is not None:
                raise InvalidInputError(
                    "staging_limit bounds our own copy, and async_stager makes another; leave one "
                    "of them out."
                )
            names = check_keys(state_dict)
            save = prepare(self._asking)
            is_busy = self._last is not None and not self._last.done()
            if is_busy and if_busy == "wait":
                self.wait()
                is_busy = False
            return is_busy, self.take_unseen(), names

        def agree(requests: list[tuple[bool, BaseException | None, tuple[str, ...]]]) -> list[str]:
            failure = next((error for _, error, _ in requests if error is not None), None)
            if failure is not None:
                raise failure
            if any(is_busy for is_busy, _, _ in requests):
                raise ConflictError(
                    "the asynchronous save before is still running and if_busy='refuse'; wait for "
                    "its result(), or pass if_busy='wait'."
                )
            return sorted({key for _, _, keys in requests for key in keys})

        def stage() -> bool:
            nonlocal staged, fits, buffers
            with nesting_checked():
                taken = take_state(state_dict, keys, rank=self._asking.rank)
                check_state(taken)
                fits = staging_limit is None or storage_nbytes(taken) <= staging_limit
                if self._asking.size > 1:
                    buffers = buffer_names(state_dict, taken)
                if not fits:
                    staged = _Staged(taken)
                    return False
                # copies of storages have no bit that says that they are to be conjugated
                taken = resolved(taken)
                staged = _Staged(self._staged(taken)) if stager is None else _stage(stager, taken)
                return staged.goes_on

        with alone_in_thread(self._asking):
            keys = in_step(self._asking, "begin an asynchronous save", ask, agree)
            goes_on = in_step(self._asking, "stage", stage, any)
        pending = PendingSave(staged.ended())
        self._thread.submit(self._run, pending, save, staged, buffers=buffers, is_settling=goes_on)
        self._last = pending
        if stager is not None and staged.ready is not None:
            _settle(staged.ready, stager.synchronize_staging)
        if not fits:
            _log.info("the state exceeds staging_limit=%s; saving before returning", staging_limit)
            self.wait()
        return pending

    def _run(
        self,
        pending: PendingSave,
        save: Background,
        staged: _Staged,
        *,
        buffers: frozenset[str],
        is_settling: bool,
    ) -> None:
        """Save what was staged, once no rank stages any more, and end `pending` with it."""
        state: list[Mapping[str, Any]] = []

        try:
            if is_settling:
                in_step(
                    self._saving,
                    "stage",
                    lambda: state.append(staged.settled()),
                    lambda requests: None,
                )
            else:
                state.append(staged.settled())
            version = save(state.pop(), self._saving, buffers)
        except BaseException as error:
            pending.set_exception(error)
        else:
            pending.set_result(version)

    def _staged(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of a state in the buffers of the saves before."""
        given = with_open_shards(state)
        staged: Any
        try:
            staged = self._stager.stage(given)
        except AssertionError:  # torch's: a storage was resized, and does not fit its buffer
            self._stager = make_stager()
            staged = self._stager.stage(given)
        except Exception:
            check_copies(state)
            raise
        copied: dict[str, Any] = staged if given is state else with_closed_shards(state, staged)
        return copied

    def wait(self) -> None:
        """Wait for the running save to end; its failure stays for `take_unseen`."""
        if self._last is not None:
            self._last.wait()

    def take_unseen(self) -> BaseException | None:
        """Return the failure of the last save, if its result was never asked for."""
        return None if self._last is None else self._last.take_unseen()


# One saver a process group, for as long as the process lives: its group and buffers are made once.
# And one for each rank that this process is where it saves alone.
_savers: dict[tuple[dist.ProcessGroup | None, int | None], _Saver] = {}
_of_parent: list[_Saver] = []  # in a process that was forked


def find_saver(
    group: dist.ProcessGroup | None, *, no_dist: bool, use_collectives: bool = True
) -> _Saver:
    """Return the saver of a group; the first call makes it, on all ranks of the group together.

    Without collectives it is that of this process alone.

    Raises:
        InvalidInputError: this process is not a member of the group.
        ConflictError: this thread is inside a save, for which the saver's thread might wait.
    """
    refuse_inside_change()
    alone = None
    if no_dist or not use_collectives or not dist.is_available() or not dist.is_initialized():
        alone = alone_in(group, no_dist=no_dist)
    # the group itself, not None: another job's default group may follow in the same process
    key = (None, alone.rank) if alone else (group or dist.group.WORLD, None)
    if key not in _savers:
        _savers[key] = _Saver(group, alone)
    return _savers[key]


def raise_unseen() -> None:
    """Wait for running saves and raise a failure that was not reported yet."""
    for saver in _savers.values():
        saver.wait()
        failure = saver.take_unseen()
        if failure is not None:
            raise failure


def finish_running() -> None:
    """Let running saves end, and log what failed: for when raising it would reach nobody."""
    for saver in _savers.values():
        saver.wait()
        failure = saver.take_unseen()
        if failure is not None:
            _log.error("an asynchronous save failed: %s", failure)


def _leave_to_parent() -> None:
    """In a process that was forked: wait for no thread of the parent's, and let no group go."""
    _of_parent.extend(_savers.values())
    _savers.clear()


# not atexit: by then no thread pool of Python's takes work, and a save needs one
threading._register_atexit(finish_running)  # type: ignore[attr-defined]  # no stubs
if hasattr(os, "register_at_fork"):  # there is no fork on Windows
    os.register_at_fork(after_in_child=_leave_to_parent)


def _stage(stager: AsyncStager, state: dict[str, Any]) -> _Staged:
    """Have a stager of the caller's stage a state, by torch's protocol."""
    given: Any = stager.stage(state)
    asks = not isinstance(given, Future) and getattr(
        stager, "should_synchronize_after_execute", False
    )
    staged = _Staged(given, Future() if asks else None)
    if not staged.goes_on:
        staged.settled()  # so that what is no state is refused on all ranks, before a save
    return staged


def _settle(future: Future[None], call: Callable[[], object]) -> None:
    """End a future with how a call ends."""
    try:
        call()
    except BaseException as error:
        future.set_exception(error)
        if not isinstance(error, Exception):  # an interrupt is for the caller too
            raise
    else:
        future.set_result(None)
