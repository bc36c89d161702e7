"""A save from end to end, as all ranks run it together.

After an opening, three exchanges: plans (each rank sends what it holds, and gets what it is to
write), digests (it gets the chunks to write), results (it gets the version). One more where there
is much to write, so that the first chunks are written while the others are digested; or one where
the chunk grid differs from the parent's, and only the bytes tell what changed. docs/design.md draws
each exchange. Packs, then the
manifest, are durable before one transaction makes the version visible (design, invariants 2 to 4).

Every rank publishes its progress; the coordinator collects it for the catalog. Invariant: whatever
can fail is done inside an exchange, so that every rank hears of it.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlanner

from dcpstore.catalog.maintenance.journal import changing_repository
from dcpstore.catalog.write.saves import kept_lease
from dcpstore.collectives import Collectives, alone_in_thread, in_step, in_turn
from dcpstore.core.gc_pause import gc_allowed, gc_paused
from dcpstore.core.progress import ProgressBar
from dcpstore.planning.save_planner import planner_of
from dcpstore.reading.box_reads import find_changed
from dcpstore.records import RankProgress, Version
from dcpstore.saving.commit import SaveTarget
from dcpstore.saving.coordinator import (
    Coordinator,
    FirstDigests,
    OpenRequest,
    RankDigests,
    RankResult,
    Seconds,
    WriteAssignment,
)
from dcpstore.saving.pack_writer import ChunkWriter
from dcpstore.saving.plan_exchange import LocalPlan, PlanOffer, PlanReply
from dcpstore.saving.rank_chunks import RankData, RawChunk, total_nbytes
from dcpstore.saving.replicas import fingerprints
from dcpstore.saving.request import SaveRequest
from dcpstore.state.buffers import buffer_names
from dcpstore.state.savable import check_state
from dcpstore.state.stateful import check_keys, take_state
from dcpstore.state.walk import nesting_checked

__all__ = ["Reports", "save_version"]


class Reports:
    """The reports of the ranks of one save."""

    def __init__(self, ranks: Collectives) -> None:
        self._ranks = ranks
        self._phase = ""
        self._since = ""

    def publish(self, phase: str, nbytes: int, total: int) -> None:
        """Report that this rank has done `nbytes` of `total` in a phase."""
        if phase != self._phase:
            self._phase, self._since = phase, datetime.now(UTC).isoformat()
        self._ranks.publish(json.dumps([phase, nbytes, total, self._since]))

    def progress_by_rank(self) -> list[RankProgress]:
        """Return what each rank reported last."""
        progress_by_rank = []
        for rank, text in self._ranks.progress_by_rank().items():
            phase, nbytes, total, since = json.loads(text)
            progress_by_rank.append(
                RankProgress(rank, phase, nbytes, total, datetime.fromisoformat(since))
            )
        return progress_by_rank


@gc_paused()
def save_version(
    state_dict: Mapping[str, Any],
    open_target: Callable[[], SaveTarget],
    request: Callable[[], SaveRequest],
    *,
    ranks: Collectives,
    planner: SavePlanner | None,
    allow_pickle: bool,
    buffers: Collection[str] = (),
    is_whole: bool = True,
) -> Version:
    """Save `state_dict`, of which this rank holds its part, as one version.

    Every rank of `ranks` calls it with its own state, and gets the same `Version`. `open_target`
    and `request` are called inside the first exchange, so that all ranks raise what they raise.
    Without a planner it is ours, which goes with all its records when the save ends. `buffers` are
    the FQNs of module buffers in a state that was staged, and so has no modules any more. Without
    `is_whole` this rank saves for itself, and what it holds need not be whole tensors.

    Raises:
        InvalidInputError: ranks disagree, or hold different contents of what they hold alike, or
            the plan does not tile its tensors.
        UnsafeDataError: an item is neither tensor nor value, and pickle is not allowed.
        ConflictError, AlreadyExistsError, NotFoundError: as the catalog finds the refs.
        ConflictError: this thread is saving to the repository already, further up its stack.
        RankFailure: some ranks failed; the repository shows nothing of the save.
    """
    planner = planner_of(planner, is_whole=is_whole)
    coordinator = Coordinator(planner, ranks.size, is_whole=is_whole)
    reports = Reports(ranks)

    def begin() -> OpenRequest:
        given = request(), check_keys(state_dict)  # first: for bad ones no repository is made
        coordinator.target = open_target()
        held.enter_context(changing_repository(coordinator.target.catalog))
        return OpenRequest(coordinator.target.catalog.repository.uid, *given)

    held = contextlib.ExitStack()
    held.enter_context(alone_in_thread(ranks))
    try:
        began = time.perf_counter()
        uid, keys = in_step(ranks, "open", begin, coordinator.begin)
        with (
            kept_lease(coordinator.target.catalog, uid, progress=reports.progress_by_rank)
            if ranks.leads
            else contextlib.nullcontext(),
            ChunkWriter(coordinator.target.storage, uid=uid, rank=ranks.rank) as writer,
            ProgressBar("save", shown=ranks.leads, publish=reports.publish) as bar,
        ):
            bar.begin("plan", 0)
            work = RankWork(
                planner,
                coordinator.target,
                writer=writer,
                bar=bar,
                allow_pickle=allow_pickle,
                buffers=buffers,
            )
            reply = in_turn(
                ranks, "plan", lambda: work.plan(state_dict, keys, ranks, uid=uid), coordinator.plan
            )
            if reply.asks:
                reply = in_turn(ranks, "plan", work.plan_whole, coordinator.plan)
            work.take(reply, seconds=time.perf_counter() - began)
            if reply.splits:
                work.begin_writing(
                    in_turn(ranks, "digest", work.digest_first, coordinator.choose_first)
                )
            assignment = in_turn(ranks, "digest", work.digest, coordinator.look_up)
            if assignment.compare:
                assignment = in_turn(
                    ranks, "compare", partial(work.compare, assignment), coordinator.take_changed
                )
            return in_step(ranks, "write", partial(work.write, assignment), coordinator.commit)
    except BaseException as error:
        coordinator.give_up(error)
        raise
    finally:
        held.close()


class RankWork:
    """One rank's own part of a save; asked in the order of a save.

    Args:
        planner: of this rank.
        target: what is saved to.
        writer: of this rank's packs; its pool digests and compares too.
        bar: hears how far the work is.
        allow_pickle: whether values may be kept that only a pickle can keep.
        buffers: FQNs of module buffers in a state that was staged, and so has no modules any more.
    """

    def __init__(
        self,
        planner: SavePlanner,
        target: SaveTarget,
        *,
        writer: ChunkWriter,
        bar: ProgressBar,
        allow_pickle: bool,
        buffers: Collection[str] = (),
    ) -> None:
        self._planner = planner
        self._buffers = buffers
        self._target = target
        self._pool = writer.pool
        self._writer = writer
        self._bar = bar
        self._allow_pickle = allow_pickle
        self._first: Sequence[RawChunk] = ()  # those that are written while others are digested
        self._data: RankData | None = None
        self._seconds: Seconds = {}

    def plan(
        self, state_dict: Mapping[str, Any], keys: Sequence[str], ranks: Collectives, *, uid: str
    ) -> PlanOffer:
        """Return what this rank sends of the plan of its state.

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
        """Keep the coordinator's reply to the plan; it came `seconds` after the save began."""
        self._reply = reply
        self._seconds["plan"] = seconds

    def digest_first(self) -> FirstDigests:
        """Return the keys of the first chunks, and the digests of what other ranks hold too."""
        with self._timed("digest"):
            data = self._resolved()
            alike = self._alike()
            return FirstDigests(data.digest_first(self._pool, self._bar.advance), alike)

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

    def write(self, assignment: WriteAssignment) -> RankResult:
        """Write what is left to write; return where all chunks of this rank lie, durable."""
        with self._timed("write"):
            every = self._resolved().chunks
            chunks = [every[i] for i in assignment.write]
            nbytes = total_nbytes(chunks) + total_nbytes(self._first)
            self._bar.begin("write", nbytes)
            with gc_allowed(nbytes):
                written = self._writer.finish(chunks, self._bar.advance)
                return RankResult(written, self._seconds)

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
    """Give a planner the state and the StorageMeta; planners from before torch 2.3 take none."""
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
