"""Who takes part, and how bytes travel between them.

Invariant: no rank enters a collective before all have come to it, so that a rank which is late or
gone leaves nobody in one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch.distributed as dist

from dcpstore.collectives.barrier import StoreBarrier
from dcpstore.compat.torch_private import group_store
from dcpstore.core.gc_pause import gc_allowed
from dcpstore.core.reentry import changing, refuse_inside_change
from dcpstore.errors import InvalidInputError

__all__ = [
    "Alone",
    "Collectives",
    "RankGroup",
    "alone_in",
    "alone_in_thread",
    "find_collectives",
    "gloo_twin",
]

_log = logging.getLogger(__name__)
# Groups whose ranks share no store: in-process stand-ins, and MPI, which finds its ranks itself.
_WITHOUT_STORE = ("fake", "mpi")
_WITH_OTHERS = "with other ranks"


class Collectives(Protocol):
    """Who takes part, and the three ways in which bytes travel.

    Each raises RankFailure where a rank does not come within the deadline or is lost on the way;
    `step` is what people read of it.
    """

    @property
    def rank(self) -> int:
        """This process among `size`, from 0."""

    @property
    def size(self) -> int:
        """The number of processes that take part."""

    @property
    def leads(self) -> bool:
        """Whether this process is the coordinator."""

    def gather(self, value: bytes, *, step: str) -> list[bytes] | None:
        """Return every rank's value, by rank, on the coordinator, and None elsewhere."""

    def scatter(self, values: Sequence[bytes] | None, *, step: str) -> bytes:
        """Return this rank's one of the values that the coordinator gives."""

    def broadcast(self, value: bytes | None, *, step: str) -> bytes:
        """Return the coordinator's value."""

    def publish(self, said: str) -> None:
        """Publish the progress of this rank; does not block."""

    def progress_by_rank(self) -> dict[int, str]:
        """Return what each rank published last, by rank; any thread may call it."""


class Alone:
    """One process that asks nobody; `rank` is its own among those that each work alone."""

    size = 1
    leads = True

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self._said: dict[int, str] = {}

    def gather(self, value: bytes, *, step: str) -> list[bytes]:
        """Return the one value."""
        return [value]

    def scatter(self, values: Sequence[bytes] | None, *, step: str) -> bytes:
        """Return the one value."""
        assert values is not None
        return values[0]

    def broadcast(self, value: bytes | None, *, step: str) -> bytes:
        """Return the value."""
        assert value is not None
        return value

    def publish(self, said: str) -> None:
        """Keep the word."""
        self._said = {self.rank: said}

    def progress_by_rank(self) -> dict[int, str]:
        """Return the word."""
        return self._said


class RankGroup:
    """The ranks of a torch process group; the coordinator is counted inside the group.

    The deadline is the timeout with which the job's process group was made. All ranks make theirs
    on a group in the same order.

    Raises:
        InvalidInputError: this process is no member of the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, coordinator: int = 0) -> None:
        self._group = group
        self._coordinator = coordinator
        self.rank = _rank_in(group)
        self.size = dist.get_world_size(group)
        self._barrier: StoreBarrier | None = None
        if self.size > 1 and dist.get_backend(group) not in _WITHOUT_STORE:
            whole = group or dist.group.WORLD
            assert whole is not None, "a group was initialised, or it would have no size"
            store = group_store(whole)
            self._barrier = StoreBarrier(
                store, rank=self.rank, size=self.size, coordinator=coordinator
            )

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Torch's own group; None is that of all ranks."""
        return self._group

    @property
    def leads(self) -> bool:
        """Whether this process is the coordinator."""
        return self.rank == self._coordinator

    def gather(self, value: bytes, *, step: str) -> list[bytes] | None:
        """Return every rank's value, by rank, on the coordinator, and None elsewhere."""
        values: list[bytes] | None = [b""] * self.size if self.leads else None
        with self._together(step):
            dist.gather_object(value, values, group=self._group, group_dst=self._coordinator)
        return values

    def scatter(self, values: Sequence[bytes] | None, *, step: str) -> bytes:
        """Return this rank's one of the values that the coordinator gives."""
        mine = [b""]
        given = None if values is None else list(values)
        with self._together(step):
            dist.scatter_object_list(mine, given, group=self._group, group_src=self._coordinator)
        return mine[0]

    def broadcast(self, value: bytes | None, *, step: str) -> bytes:
        """Return the coordinator's value."""
        box = [value or b""]
        with self._together(step):
            dist.broadcast_object_list(box, group=self._group, group_src=self._coordinator)
        return box[0]

    def publish(self, said: str) -> None:
        """Publish the progress of this rank."""
        if self._barrier is not None:
            self._barrier.publish(said)

    def progress_by_rank(self) -> dict[int, str]:
        """Return what each rank published last, by rank."""
        return {} if self._barrier is None else self._barrier.progress_by_rank()

    @contextmanager
    def _together(self, step: str) -> Iterator[None]:
        """Wait for all ranks, then exchange; a connection that breaks names who is gone."""
        with gc_allowed():
            if self._barrier is None:
                yield
                return
            self._barrier.wait(step)
            try:
                yield
            except RuntimeError as error:  # gloo's, and all of torch.distributed's own
                raise self._barrier.report_lost(step, error) from error


def find_collectives(
    group: dist.ProcessGroup | None, *, no_dist: bool, use_collectives: bool = True
) -> Collectives:
    """Return the ranks of `group` (None: all), or this process alone where torch runs no group.

    Without collectives it is this process alone too, with its rank in the group.

    Raises:
        InvalidInputError: this process is not a member of the group.
        ConflictError: this thread is in the middle of a save with other ranks, which a second call
            on this rank alone would bring out of step.
    """
    if no_dist or not use_collectives:
        return alone_in(group, no_dist=no_dist)
    if not dist.is_available() or not dist.is_initialized():
        _log.info("no process group is initialised; working in this process alone")
        return Alone()
    refuse_inside_change(_WITH_OTHERS)  # before the ranks count one call more
    return RankGroup(group)


def gloo_twin(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Return a new gloo group of the same ranks; every rank of the group calls it."""
    ranks = None if group is None else dist.get_process_group_ranks(group)
    twin: dist.ProcessGroup = dist.new_group(
        ranks, backend="gloo", use_local_synchronization=ranks is not None
    )
    return twin


def alone_in(group: dist.ProcessGroup | None, *, no_dist: bool = False) -> Alone:
    """Return this process alone, with its rank in `group` where torch runs one; calls nobody.

    Raises:
        InvalidInputError: this process is not a member of the group.
    """
    if no_dist or not dist.is_available() or not dist.is_initialized():
        return Alone()
    return Alone(_rank_in(group))


def _rank_in(group: dist.ProcessGroup | None) -> int:
    rank: int = dist.get_rank(group)
    if rank < 0:
        raise InvalidInputError(
            "this process is no member of the process group that was given; call on the ranks of "
            "the group alone, or give one that has this rank."
        )
    return rank


def alone_in_thread(ranks: Collectives) -> AbstractContextManager[None]:
    """Hold that this thread works with other ranks, and can begin nothing else with any."""
    if ranks.size == 1:
        return nullcontext()
    return changing(_WITH_OTHERS, shown="a repository with other ranks")
