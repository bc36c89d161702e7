"""Saving while training goes on: stage, then save in a thread with a process group of its own.

To stage a state is to copy it where training does not change it. Invariants: what is saved is the
state as it was when `async_save` returned; and no failure is lost, because it is raised by
`result()`, or else by the next save or by `close()`, or logged at exit.
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
    has_process_group,
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

__all__ = [
    "Background",
    "IfBusy",
    "PendingSave",
    "Saver",
    "find_saver",
    "finish_running",
    "raise_unseen",
]

_log = logging.getLogger(__name__)

IfBusy = Literal["wait", "refuse"]
# Saves a staged state; it gets the state, the ranks, and the FQNs of module buffers in the state.
Background = Callable[[Mapping[str, Any], Collectives, frozenset[str]], Version]


class PendingSave(Future[Version], AsyncSaveResponse):
    """An asynchronous save that was begun: a `concurrent.futures.Future` of its version.

    It is torch's `AsyncSaveResponse` too, for callers that expect one: `staging_completion` is
    `staged`, and `upload_completion` is the pending save itself. It runs from the start, on all
    ranks, and one rank cannot cancel it. Its failure counts as seen once `result` or `exception`
    has returned or raised it; `wait`, `as_completed` and callbacks that call neither do not count.

    Attributes:
        staged: done when the state may be changed again. That is when `async_save` returns, unless
            a stager of the caller's stages in the background.
    """

    # Those of a Future. AsyncSaveResponse is a dataclass, which compares fields and has no hash.
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
        """Torch's name of the future of the save, which is this object."""
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
        failure = super().exception(timeout)
        self._is_seen = True  # not before: after a TimeoutError the failure has not been seen
        return failure

    def wait(self) -> None:
        """Wait for the save to end, even if it fails; the failure still counts as not seen."""
        super().exception()

    def take_unseen(self) -> BaseException | None:
        """Return the failure of an ended save if it was not seen; then it counts as seen."""
        return None if self._is_seen or not self.done() else self.exception()


@dataclass(frozen=True, slots=True)
class _Staged:
    """The result of staging on this rank: a state, or a future of it.

    `synchronized` ends when the caller's stager has been synchronized, if torch's protocol asks for
    that.
    """

    state: Any
    synchronized: Future[None] | None = None

    @property
    def is_running(self) -> bool:
        """Whether staging may go on after `async_save` has returned."""
        return self.synchronized is not None or isinstance(self.state, Future)

    def ended(self) -> Future[None]:
        """Return a future that ends when staging ends."""
        if self.synchronized is not None:
            return self.synchronized
        end: Future[None] = Future()
        if isinstance(self.state, Future):
            self.state.add_done_callback(lambda state: _settle(end, state.result))
        else:
            end.set_result(None)
        return end

    def result(self) -> Mapping[str, Any]:
        """Wait for the end of staging; return the staged state.

        Raises:
            InvalidInputError: the caller's stager gave something else.
        """
        if self.synchronized is not None:
            self.synchronized.result()
        state = self.state.result() if isinstance(self.state, Future) else self.state
        if not isinstance(state, Mapping):
            raise InvalidInputError(
                f"stage() of the async_stager gave a {type(state).__name__}; have it return the "
                "staged state as a dict, or a Future of one."
            )
        return state


@dataclass(frozen=True, slots=True)
class _BeginRequest:
    """What each rank sends before a state is staged.

    Attributes:
        keys: of its state.
        is_busy: whether its last save is still running.
        failure: of its last save, if it was not seen.
    """

    keys: tuple[str, ...]
    is_busy: bool
    failure: BaseException | None


class Saver:
    """The thread, the process group and the staging buffers of the asynchronous saves of a group.

    The calling thread uses one group, and the saving thread another, because calls of torch on one
    group must not overlap.
    """

    def __init__(self, group: dist.ProcessGroup | None, alone: Alone | None) -> None:
        self._calling_ranks: Collectives = alone or RankGroup(group)
        self._saving_ranks: Collectives = alone or RankGroup(gloo_twin(group))
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
        """Stage the state and pass it to the thread, once the save before has ended.

        Args:
            state_dict: of this rank.
            prepare: called first, with the ranks; what it raises, all ranks raise, and nothing is
                begun. It returns the function that saves the staged state.
            if_busy: whether to wait for a save that is still running, or to raise ConflictError.
            staging_limit: bytes; a larger state is not copied, and is saved before this returns.
            stager: of the caller, used instead of ours; the caller closes it.
        """
        ranks = self._calling_ranks
        save: Background
        staged: _Staged
        fits: bool
        buffers: frozenset[str] = frozenset()

        def request() -> _BeginRequest:
            nonlocal save
            _check_arguments(if_busy, staging_limit, stager)
            keys = check_keys(state_dict)
            save = prepare(ranks)
            is_busy = self._last is not None and not self._last.done()
            if is_busy and if_busy == "wait":
                self.wait()
                is_busy = False
            return _BeginRequest(keys, is_busy, self.take_unseen())

        def stage() -> bool:
            nonlocal staged, fits, buffers
            with nesting_checked():
                taken = take_state(state_dict, keys, rank=ranks.rank)
                check_state(taken)
                fits = staging_limit is None or storage_nbytes(taken) <= staging_limit
                if ranks.size > 1:
                    # The copy has no modules, from which the buffers are known.
                    buffers = buffer_names(state_dict, taken)
                if not fits:
                    staged = _Staged(taken)
                    return False
                # A copied storage has no conjugate bit or negative bit of the tensor over it.
                taken = resolved(taken)
                staged = _Staged(self._copied(taken)) if stager is None else _stage(stager, taken)
                return staged.is_running

        with alone_in_thread(ranks):
            keys = in_step(ranks, "begin an asynchronous save", request, _agreed_keys)
            is_any_running = in_step(ranks, "stage", stage, any)
        pending = PendingSave(staged.ended())
        self._thread.submit(
            self._run, pending, save, staged, buffers=buffers, waits_for_stagers=is_any_running
        )
        self._last = pending
        if stager is not None and staged.synchronized is not None:
            _settle(staged.synchronized, stager.synchronize_staging)
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
        waits_for_stagers: bool,
    ) -> None:
        """Save what was staged, once staging has ended on all ranks, and end `pending`."""
        state: Mapping[str, Any]

        def take_staged() -> None:
            nonlocal state
            state = staged.result()

        try:
            if waits_for_stagers:
                in_step(self._saving_ranks, "stage", take_staged, lambda _: None)
            else:
                take_staged()
            version = save(state, self._saving_ranks, buffers)
        except BaseException as error:
            pending.set_exception(error)
        else:
            pending.set_result(version)

    def _copied(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of a state, in buffers that all saves reuse."""
        given = with_open_shards(state)
        staged: Any
        try:
            staged = self._stager.stage(given)
        except AssertionError:  # torch's: a storage was resized, and does not fit its buffer
            self._stager = make_stager()
            staged = self._stager.stage(given)
        except Exception:
            check_copies(state)  # raises an error with the FQN of what cannot be copied
            raise
        copied: dict[str, Any] = staged if given is state else with_closed_shards(state, staged)
        return copied

    def wait(self) -> None:
        """Wait for the running save to end; `take_unseen` then returns its failure."""
        if self._last is not None:
            self._last.wait()

    def take_unseen(self) -> BaseException | None:
        """Return the failure of the last save if it was not seen; then it counts as seen."""
        return None if self._last is None else self._last.take_unseen()


# One saver per process group, as long as the process lives: its group and buffers are made once.
# And, for saves of this process alone, one per rank that it has had.
_savers: dict[tuple[dist.ProcessGroup | None, int | None], Saver] = {}
_of_parent: list[Saver] = []  # in a forked process: kept, so that their groups are not destroyed


def find_saver(
    group: dist.ProcessGroup | None, *, no_dist: bool, use_collectives: bool = True
) -> Saver:
    """Return the saver of a group; the first call makes it, on all ranks of the group together.

    Without collectives it is that of this process alone.

    Raises:
        InvalidInputError: this process is not a member of the group.
        ConflictError: this thread is inside a save, for which the saver's thread might wait.
    """
    refuse_inside_change()
    is_alone = no_dist or not use_collectives or not has_process_group()
    alone = alone_in(group, no_dist=no_dist) if is_alone else None
    # The group itself, not None: a process may end its default group and begin another one.
    key = (None, alone.rank) if alone else (group or dist.group.WORLD, None)
    if key not in _savers:
        _savers[key] = Saver(group, alone)
    return _savers[key]


def raise_unseen() -> None:
    """Wait for running saves, and raise a failure that was not seen."""
    for saver in _savers.values():
        saver.wait()
        failure = saver.take_unseen()
        if failure is not None:
            raise failure


def finish_running() -> None:
    """Wait for running saves, and log failures that were not seen: for when no caller is left."""
    for saver in _savers.values():
        saver.wait()
        failure = saver.take_unseen()
        if failure is not None:
            _log.error("an asynchronous save failed: %s", failure)


def _forget_savers() -> None:
    """In a forked process: do not wait for the threads, which only the parent has."""
    _of_parent.extend(_savers.values())
    _savers.clear()


# Not atexit: Python ends its thread pools before that, and a running save needs one.
threading._register_atexit(finish_running)  # type: ignore[attr-defined]  # no stubs
os.register_at_fork(after_in_child=_forget_savers)


def _check_arguments(
    if_busy: IfBusy, staging_limit: int | None, stager: AsyncStager | None
) -> None:
    if if_busy not in ("wait", "refuse"):
        raise InvalidInputError(f"if_busy={if_busy!r}; write 'wait' or 'refuse'.")
    if not isinstance(staging_limit, int | float | None):
        raise InvalidInputError(f"staging_limit={staging_limit!r}; give bytes, or None.")
    if stager is not None and not callable(getattr(stager, "stage", None)):
        raise InvalidInputError(
            f"async_stager={stager!r} has no stage(); pass an AsyncStager of torch's, such as a "
            "DefaultStager()."
        )
    if stager is not None and staging_limit is not None:
        raise InvalidInputError(
            "staging_limit bounds our own copy, and async_stager makes another; leave one of them "
            "out."
        )


def _agreed_keys(requests: list[_BeginRequest]) -> list[str]:
    """Return the keys of all ranks, if a save may begin; only the coordinator calls it."""
    failure = next((sent.failure for sent in requests if sent.failure is not None), None)
    if failure is not None:
        raise failure
    if any(sent.is_busy for sent in requests):
        raise ConflictError(
            "the asynchronous save before is still running and if_busy='refuse'; wait for its "
            "result(), or pass if_busy='wait'."
        )
    return sorted({key for sent in requests for key in sent.keys})


def _stage(stager: AsyncStager, state: dict[str, Any]) -> _Staged:
    """Stage a state with the caller's stager, by torch's protocol."""
    given: Any = stager.stage(state)
    needs_synchronize = not isinstance(given, Future) and getattr(
        stager, "should_synchronize_after_execute", False
    )
    staged = _Staged(given, Future() if needs_synchronize else None)
    if not staged.is_running:
        staged.result()  # an invalid one is then refused on all ranks, before a save is begun
    return staged


def _settle(future: Future[None], call: Callable[[], object]) -> None:
    """Call, and end a future with the error or without one."""
    try:
        call()
    except BaseException as error:
        future.set_exception(error)
        if not isinstance(error, Exception):  # an interrupt is for the caller too
            raise
    else:
        future.set_result(None)
