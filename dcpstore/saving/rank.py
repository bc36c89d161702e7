"""What each rank of a save does by itself, from one exchange to the next.

Invariant: whatever can fail is done inside an exchange, so that every rank hears of it.
"""

from __future__ import annotations

import contextlib
import inspect
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlanner

from dcpstore.collectives import Collectives
from dcpstore.core.gc_pause import gc_allowed
from dcpstore.core.progress import ProgressBar
from dcpstore.reading.box_reads import find_changed
from dcpstore.saving.commit import SaveTarget
from dcpstore.saving.coordinator import RankDigests, Seconds, WriteAssignment
from dcpstore.saving.pack_writer import ChunkWriter, Written
from dcpstore.saving.plan_exchange import LocalPlan, PlanOffer, PlanReply
from dcpstore.saving.rank_chunks import ChunkKey, RankData, RawChunk, total_nbytes
from dcpstore.saving.replicas import fingerprints
from dcpstore.state.buffers import buffer_names
from dcpstore.state.savable import check_state, nesting_checked
from dcpstore.state.stateful import take_state

__all__ = ["RankWork"]


class RankWork:
    """One rank's own part of a save; asked in the order of a save.

    Args:
        planner: of this rank.
        target: what is saved to.
        pool: digests and compares.
        writer: of this rank's packs.
        bar: hears how far the work is.
        allow_pickle: whether values may be kept that only a pickle can keep.
        buffers: FQNs of module buffers in a state that was staged, and so has no modules any more.
    """

    def __init__(
        self,
        planner: SavePlanner,
        target: SaveTarget,
        *,
        pool: Executor,
        writer: ChunkWriter,
        bar: ProgressBar,
        allow_pickle: bool,
        buffers: Collection[str] = (),
    ) -> None:
        self._planner = planner
        self._buffers = buffers
        self._target = target
        self._pool = pool
        self._writer = writer
        self._bar = bar
        self._allow_pickle = allow_pickle
        self._first: Sequence[RawChunk] = ()  # those that are written while others are digested
        self._data: RankData | None = None
        self._seconds: Seconds = {}

    def plan(
        self, state_dict: Mapping[str, Any], keys: Sequence[str], ranks: Collectives, *, uid: str
    ) -> PlanOffer:
        """Return what to tell of this rank's plan of its state.

        `keys` are those of all ranks, and `uid` that of the version to be.
        """
        with nesting_checked():
            state = take_state(state_dict, keys, rank=ranks.rank)
            check_state(state)
            meta = StorageMeta(self._target.location, uid)
            _set_up(self._planner, state, meta, is_coordinator=ranks.leads)
        local = self._planner.create_local_plan()
        buffers = {*self._buffers, *buffer_names(state_dict, state)} if ranks.size > 1 else ()
        self._plan = LocalPlan(local, self._planner, self._target.memory, buffers=buffers)
        return self._plan.offer()

    def plan_whole(self) -> PlanOffer:
        """Return the whole plan, where the coordinator does not know it."""
        return self._plan.offer(whole=True)

    def take(self, reply: PlanReply, *, seconds: float) -> None:
        """Note what the coordinator said to the plan, and how long it was until then."""
        self._reply = reply
        self._seconds["plan"] = seconds

    def digest_first(self) -> tuple[list[ChunkKey], bytes]:
        """Return the keys of the first chunks, and the digests of what other ranks hold too."""
        with self._timed("digest"):
            data = self._resolved()
            alike = self._alike()
            return data.digest_first(self._pool, self._bar.advance), alike

    def begin_writing(self, places: Sequence[int]) -> None:
        """Begin to write those of the first chunks that stand at these places."""
        chunks = self._resolved().chunks
        self._first = [chunks[i] for i in places]
        self._writer.begin(self._first)

    def digest(self) -> RankDigests:
        """Return the digests of all chunks and, if still needed, of what other ranks hold too."""
        with self._timed("digest"):
            data = self._resolved()
            alike = b"" if self._reply.splits else self._alike()
            with gc_allowed(total_nbytes(data.chunks)):
                return RankDigests(data.digest(self._pool, self._bar.advance), self._seconds, alike)

    def compare(self, assignment: WriteAssignment) -> set[str]:
        """Return the FQNs of those entries that differ from what this rank holds of them."""
        with self._timed("compare"), gc_allowed():
            return find_changed(
                self._resolved().held(assignment.compare),
                self._target.catalog,
                self._target.storage,
                version=assignment.version,
                pool=self._pool,
            )

    def write(self, assignment: WriteAssignment) -> tuple[Written, Seconds]:
        """Write what is left to write; return where all chunks of this rank lie, durable."""
        with self._timed("write"):
            every = self._resolved().chunks
            chunks = [every[i] for i in assignment.write]
            nbytes = total_nbytes(chunks) + total_nbytes(self._first)
            self._bar.begin("write", nbytes)
            with gc_allowed(nbytes):
                return self._writer.finish(chunks, self._bar.advance), self._seconds

    def _alike(self) -> bytes:
        """Return the digests of what this rank holds and others too, once its data are resolved."""
        return fingerprints(
            self._plan.compared, self._planner, self._pool, allow_pickle=self._allow_pickle
        )

    def _resolved(self) -> RankData:
        """Return the data of what this rank is to write, which its planner is asked for once."""
        if self._data is None:
            plan, layouts = self._plan.take(self._reply)
            self._data = RankData(
                self._planner.finish_plan(plan),
                self._planner,
                dict(layouts),
                chunk=self._target.catalog.repository.chunk,
                allow_pickle=self._allow_pickle,
            )
            self._bar.begin("digest", total_nbytes(self._data.chunks))
        return self._data

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        taken = time.perf_counter() - began
        self._seconds[phase] = self._seconds.get(phase, 0.0) + taken


def _set_up(
    planner: SavePlanner, state: dict[str, Any], meta: StorageMeta, *, is_coordinator: bool
) -> None:
    """Give a planner the state, and what torch calls this save; one of before torch 2.3 cannot."""
    taken = inspect.signature(planner.set_up_planner).parameters.values()
    if any(arg.name == "storage_meta" or arg.kind is arg.VAR_KEYWORD for arg in taken):
        planner.set_up_planner(state, storage_meta=meta, is_coordinator=is_coordinator)
    else:
        warnings.warn(
            f"{type(planner).__name__}.set_up_planner takes no storage_meta; have it take one, as "
            "torch's SavePlanner does.",
            stacklevel=2,
        )
        planner.set_up_planner(state, is_coordinator)  # type: ignore[arg-type]  # as torch calls it
