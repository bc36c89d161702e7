"""Which ranks take part, and how bytes travel between them.

Invariant: no rank enters a collective before all ranks have arrived at it, so that a rank that is
late or has ended leaves no other rank waiting inside one.
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
    "has_process_group",
]

_log = logging.getLogger(__name__)
# Backends whose ranks share no store: torch's in-process fake, and MPI, which connects its ranks
# itself. Their exchanges run without a barrier.
_WITHOUT_STORE = ("fake", "mpi")
_WITH_OTHERS = "with other ranks"


class Collectives(Protocol):
    """The ranks that take part, and the three ways in which bytes travel between them.

    Each raises RankFailure if a rank does not arrive within the deadline or its connection breaks;
    `step` is the name of the step in the error.
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
        """Return the value that the coordinator gives for this rank."""

    def broadcast(self, value: bytes | None, *, step: str) -> bytes:
        """Return the coordinator's value."""

    def publish(self, progress: str) -> None:
        """Publish the progress of this rank; does not block."""

    def progress_by_rank(self) -> dict[int, str]:
        """Return what each rank published last, by rank; any thread may call it."""


class Alone:
    """One process that exchanges nothing; `rank` is its rank in a group whose ranks work alone."""

    size = 1
    leads = True

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self._progress: dict[int, str] = {}

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

    def publish(self, progress: str) -> None:
        """Keep the progress of this process."""
        self._progress = {self.rank: progress}

    def progress_by_rank(self) -> dict[int, str]:
        """Return what this process published last."""
        return self._progress


class RankGroup:
    """The ranks of a torch process group; `coordinator` is a rank inside the group.

    The deadline is the timeout that `init_process_group` was given. Every rank must create its
    `RankGroup` objects in the same order.

    Raises:
        InvalidInputError: this process is not a member of the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, coordinator: int = 0) -> None:
        self.group = group
        self._coordinator = coordinator
        self.rank = _rank_in(group)
        self.size = dist.get_world_size(group)
        self._barrier: StoreBarrier | None = None
        if self.size > 1 and dist.get_backend(group) not in _WITHOUT_STORE:
            members = group or dist.group.WORLD
            assert members is not None, "dist.get_world_size would have failed without a group"
            self._barrier = StoreBarrier(
                group_store(members), rank=self.rank, size=self.size, coordinator=coordinator
            )

    @property
    def leads(self) -> bool:
        """Whether this process is the coordinator."""
        return self.rank == self._coordinator

    def gather(self, value: bytes, *, step: str) -> list[bytes] | None:
        """Return every rank's value, by rank, on the coordinator, and None elsewhere."""
        values: list[bytes] | None = [b""] * self.size if self.leads else None
        with self._together(step):
            dist.gather_object(value, values, group=self.group, group_dst=self._coordinator)
        return values

    def scatter(self, values: Sequence[bytes] | None, *, step: str) -> bytes:
        """Return the value that the coordinator gives for this rank."""
        received = [b""]
        given = None if values is None else list(values)
        with self._together(step):
            dist.scatter_object_list(received, given, group=self.group, group_src=self._coordinator)
        return received[0]

    def broadcast(self, value: bytes | None, *, step: str) -> bytes:
        """Return the coordinator's value."""
        received = [value or b""]
        with self._together(step):
            dist.broadcast_object_list(received, group=self.group, group_src=self._coordinator)
        return received[0]

    def publish(self, progress: str) -> None:
        """Publish the progress of this rank; does not block."""
        if self._barrier is not None:
            self._barrier.publish(progress)

    def progress_by_rank(self) -> dict[int, str]:
        """Return what each rank published last, by rank."""
        return {} if self._barrier is None else self._barrier.progress_by_rank()

    @contextmanager
    def _together(self, step: str) -> Iterator[None]:
        """Wait for all ranks, then exchange; if a connection breaks, the error names the ranks."""
        with gc_allowed():
            if self._barrier is None:
                yield
                return
            self._barrier.wait(step)
            try:
                yield
            except RuntimeError as error:  # the base class of the errors of gloo and of c10d
                raise self._barrier.report_lost(step, error) from error


def find_collectives(
    group: dist.ProcessGroup | None, *, no_dist: bool, use_collectives: bool = True
) -> Collectives:
    """Return the ranks of `group` (None: all), or this process alone if there is no process group.

    Without collectives it is this process alone too, with its rank in the group.

    Raises:
        InvalidInputError: this process is not a member of the group.
        ConflictError: this thread is inside a save with other ranks. A nested call on one rank
            would be mistaken for that save's next exchange.
    """
    if no_dist or not use_collectives:
        return alone_in(group, no_dist=no_dist)
    if not has_process_group():
        _log.info("no process group is initialised; working in this process alone")
        return Alone()
    # Before StoreBarrier increments its counter on this rank: else the ranks would disagree.
    refuse_inside_change(_WITH_OTHERS)
    return RankGroup(group)


def has_process_group() -> bool:
    """Tell whether `init_process_group` was called in this process."""
    return dist.is_available() and dist.is_initialized()


def gloo_twin(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Return a new gloo group of the same ranks; every rank of the group calls it."""
    ranks = None if group is None else dist.get_process_group_ranks(group)
    twin: dist.ProcessGroup = dist.new_group(
        ranks, backend="gloo", use_local_synchronization=ranks is not None
    )
    return twin


def alone_in(group: dist.ProcessGroup | None, *, no_dist: bool = False) -> Alone:
    """Return this process alone, with its rank in `group` if there is one; exchanges nothing.

    Raises:
        InvalidInputError: this process is not a member of the group.
    """
    return Alone() if no_dist or not has_process_group() else Alone(_rank_in(group))


def _rank_in(group: dist.ProcessGroup | None) -> int:
    rank: int = dist.get_rank(group)
    if rank < 0:
        raise InvalidInputError(
            "this process is not a member of the process group that was given; call on the ranks "
            "of the group only, or give a group that has this rank."
        )
    return rank


def alone_in_thread(ranks: Collectives) -> AbstractContextManager[None]:
    """Refuse another exchange in this thread until the block ends, if there are other ranks."""
    if ranks.size == 1:
        return nullcontext()
    return changing(_WITH_OTHERS, shown="a repository with other ranks")
