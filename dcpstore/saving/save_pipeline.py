"""A save from end to end, as all ranks run it together.

First the ranks open the version. Then there are three exchanges: plans (each rank sends what it
holds, and gets what it writes), digests (it gets the chunks to write), and results (it gets the
version). A large save has one more, so that the first chunks are written while the others are
digested. If the chunk grids differ from the parent's, digests cannot show what changed; one more
exchange compares bytes. docs/design.md draws each exchange. Packs, then the manifest, are durable
before one transaction makes the version visible (design, invariants 2 to 4).

Every rank publishes its progress; the coordinator collects it for the catalog. Invariant: whatever
can fail is done inside an exchange, so that every rank learns of it.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from dcpstore.saving.chunk_writer import ChunkWriter
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
from dcpstore.saving.digest_exchange import (
    CHUNK_DIGEST,
    Sent,
    SentBefore,
    to_send,
)
from dcpstore.saving.plan_exchange import LocalPlan, PlanOffer, PlanReply
from dcpstore.saving.rank_chunks import Digested, RankData, RawChunk, total_nbytes
from dcpstore.saving.replicas import FINGERPRINT, fingerprints
from dcpstore.saving.request import SaveRequest
from dcpstore.state.buffers import buffer_names
from dcpstore.state.savable import check_state
from dcpstore.state.stateful import check_keys, take_state
from dcpstore.state.walk import nesting_checked

__all__ = ["RankWork", "save_version"]


class _Progress:
    """The progress of the ranks of one save, which they publish as JSON."""

    def __init__(self, ranks: Collectives) -> None:
        self._ranks = ranks
        self._phase = ""
        self._since = ""

    def publish(self, phase: str, nbytes: int, total: int) -> None:
        """Publish that this rank has done `nbytes` of `total` in a phase."""
        if phase != self._phase:
            self._phase, self._since = phase, datetime.now(UTC).isoformat()
        self._ranks.publish(json.dumps([phase, nbytes, total, self._since]))

    def by_rank(self) -> list[RankProgress]:
        """Return what each rank published last."""
        found = []
        for rank, text in self._ranks.progress_by_rank().items():
            phase, nbytes, total, since = json.loads(text)
            found.append(RankProgress(rank, phase, nbytes, total, datetime.fromisoformat(since)))
        return found


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
    is_whole: bool,
) -> Version:
    """Save `state_dict`, of which this rank holds its part, as one version.

    Every rank of `ranks` calls it with its own state, and gets the same `Version`.

    Args:
        state_dict: of this rank.
        open_target, request: called inside the first exchange, so that every rank learns what they
            raise.
        ranks: that save together.
        planner: of the caller; None is a new one of ours.
        allow_pickle: whether values that need pickle may be stored.
        buffers: FQNs of the buffers, for a staged state: it holds no modules to ask.
        is_whole: whether the ranks hold the whole state together. False if this rank saves alone,
            perhaps only parts of tensors.

    Raises:
        InvalidInputError: ranks disagree, or hold different contents of one item, or the plan's
            boxes of a tensor overlap, leave a gap or reach outside it.
        UnsafeDataError: an item is neither tensor nor value, and `allow_pickle` is False.
        ConflictError, AlreadyExistsError, NotFoundError: a ref is not as the request needs it.
        ConflictError: this thread is already inside a save to the repository.
        RankFailure: some ranks failed; the repository shows nothing of the save.
    """
    planner = planner_of(planner, is_whole=is_whole)
    coordinator = Coordinator(planner, ranks.size, is_whole=is_whole)
    progress = _Progress(ranks)

    def begin() -> OpenRequest:
        # Before the target is opened: a call with bad arguments creates no repository.
        given = request(), check_keys(state_dict)
        coordinator.target = open_target()
        guards.enter_context(changing_repository(coordinator.target.catalog))
        return OpenRequest(coordinator.target.catalog.repository.uid, *given)

    guards = contextlib.ExitStack()
    guards.enter_context(alone_in_thread(ranks))
    try:
        began = time.perf_counter()
        uid, keys = in_step(ranks, "open", begin, coordinator.begin)
        with (
            # On the coordinator only, so that a save uses one connection to the database.
            kept_lease(coordinator.target.catalog, uid, progress=progress.by_rank)
            if ranks.leads
            else contextlib.nullcontext(),
            ChunkWriter(coordinator.target.storage, uid=uid, rank=ranks.rank) as writer,
            ProgressBar("save", shown=ranks.leads, publish=progress.publish) as bar,
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
            # `wants_table` is the same on all ranks: if the coordinator lacks the global plan and
            # some rank sent only a digest, it asks every rank for its whole plan.
            if reply.wants_table:
                reply = in_turn(ranks, "plan", work.plan_whole, coordinator.plan)
            work.take(reply, seconds=time.perf_counter() - began)
            if reply.writes_early:
                work.begin_writing(
                    in_turn(ranks, "digest", work.digest_first, coordinator.choose_first)
                )
            assignment = in_turn(ranks, "digest", work.digest, coordinator.look_up)
            if assignment.wants_digests:  # the same on all ranks
                assignment = in_turn(ranks, "digest", work.digest_whole, coordinator.look_up)
            if assignment.compare:
                assignment = in_turn(
                    ranks, "compare", partial(work.compare, assignment), coordinator.take_changed
                )
            version = in_step(ranks, "write", partial(work.write, assignment), coordinator.commit)
            if ranks.size > 1:  # one rank sends nothing
                work.remember(version.uid)
            return version
    except BaseException as error:  # an interrupt too: the version must not stay pending
        # Only the coordinator has begun a version; elsewhere this does nothing.
        coordinator.abort(error)
        raise
    finally:
        guards.close()


@dataclass(eq=False, slots=True)
class RankWork:
    """One rank's work in a save; the methods are called in the order in which they stand here.

    Attributes:
        planner: of this rank.
        target: what is saved to.
        writer: of this rank's packs; its thread pool is used for digests and comparisons too.
        bar: shows and publishes the progress.
        allow_pickle: whether values that need pickle may be stored.
        buffers: FQNs of the buffers, for a staged state: it holds no modules to ask.
    """

    planner: SavePlanner
    target: SaveTarget
    writer: ChunkWriter
    bar: ProgressBar
    allow_pickle: bool
    buffers: Collection[str]
    _plan: LocalPlan = field(init=False)
    _reply: PlanReply = field(init=False)
    _data: RankData | None = field(init=False, default=None)
    _first: Sequence[RawChunk] = field(init=False, default=())  # written while others are digested
    _digested: Digested = field(init=False)
    _fingerprints: bytes = field(init=False)
    _seconds: Seconds = field(init=False, default_factory=dict)

    def plan(
        self, state_dict: Mapping[str, Any], keys: Sequence[str], ranks: Collectives, *, uid: str
    ) -> PlanOffer:
        """Return what this rank sends of the plan of its state.

        `keys` are the keys of all ranks' states, and `uid` is that of the new version.
        """
        with nesting_checked():
            state = take_state(state_dict, keys, rank=ranks.rank)
            check_state(state)  # first: an error of ours names the FQN, a planner's may not
            meta = StorageMeta(self.target.location, uid)
            _set_up_planner(self.planner, state, meta, is_coordinator=ranks.leads)
        local = self.planner.create_local_plan()
        # With one rank there are no replicas, and nobody needs to know the buffers.
        buffers = {*self.buffers, *buffer_names(state_dict, state)} if ranks.size > 1 else ()
        self._plan = LocalPlan(local, self.planner, self.target.memory, buffers=buffers)
        return self._plan.offer()

    def plan_whole(self) -> PlanOffer:
        """Return the whole plan, if the coordinator does not have it from an earlier save."""
        return self._plan.offer(whole=True)

    def take(self, reply: PlanReply, *, seconds: float) -> None:
        """Keep the coordinator's reply; `seconds` is the time since the save began."""
        self._reply = reply
        self._seconds["plan"] = seconds

    def digest_first(self) -> FirstDigests:
        """Return codec and digest of the first chunks, and the fingerprints of replicas."""
        with self._timed("digest"):
            data = self._resolved()
            self._fingerprint()
            keys = data.digest_first(self.writer.pool, self.bar.advance)
            numbers = {codec: i for i, codec in enumerate(dict.fromkeys(c for c, _ in keys))}
            return FirstDigests(
                self._chunks_to_send(b"".join(digest for _, digest in keys)),
                tuple(numbers),
                bytes(numbers[codec] for codec, _ in keys),
                self._replicas_to_send(),
            )

    def begin_writing(self, indices: Sequence[int]) -> None:
        """Begin to write those of the first chunks that have these indices."""
        chunks = self._resolved().chunks
        self._first = [chunks[i] for i in indices]
        self.writer.begin(self._first)

    def digest(self) -> RankDigests:
        """Return the digests of all chunks and, if not sent yet, the fingerprints of replicas.

        Where the coordinator has those of an earlier version, what changed since is returned.
        """
        with self._timed("digest"):
            data = self._resolved()
            if not self._reply.writes_early:
                self._fingerprint()
            # Python's garbage collector may run here if there are many bytes: digesting takes long
            # and makes few objects, so it costs little.
            with gc_allowed(total_nbytes(data.chunks)):
                self._digested = data.digest(self.writer.pool, self.bar.advance)
            return RankDigests(
                self._chunks_to_send(self._digested.digests),
                replace(self._digested, digests=b""),
                self._seconds,
                None if self._reply.writes_early else self._replicas_to_send(),
            )

    def digest_whole(self) -> RankDigests:
        """Return all digests and fingerprints; the coordinator cannot use a difference."""
        values = replace(self._digested, digests=b"")
        return RankDigests(self._digested.digests, values, self._seconds, self._fingerprints)

    def compare(self, assignment: WriteAssignment) -> set[str]:
        """Return the FQNs of the stored entries whose bytes differ from this rank's."""
        with self._timed("compare"), gc_allowed():
            return find_changed(
                self._resolved().held(assignment.compare),
                self.target.catalog,
                self.target.storage,
                version=assignment.version,
                pool=self.writer.pool,
            )

    def write(self, assignment: WriteAssignment) -> RankResult:
        """Write this rank's remaining chunks.

        Returns the places of these and of its first chunks, once all of them are durable.
        """
        with self._timed("write"):
            data = self._resolved()
            chunks = [data.chunks[i] for i in assignment.write]
            nbytes = total_nbytes(chunks) + total_nbytes(self._first)
            self.bar.begin("write", nbytes)
            with gc_allowed(nbytes):
                written = self.writer.finish(chunks, self.bar.advance)
                return RankResult(written, self._seconds)

    def remember(self, uid: str) -> None:
        """Cache what this rank sent with the version of this uid, now that it is committed."""
        if self._plan.key:
            sent = SentBefore(uid, self._digested.digests, self._fingerprints)
            self.target.memory.sent.put(self._plan.key, sent)

    def _fingerprint(self) -> None:
        """Fingerprint the items that other ranks hold too; call `_resolved` first."""
        self._fingerprints = fingerprints(
            self._plan.compared, self.planner, self.writer.pool, allow_pickle=self.allow_pickle
        )

    def _chunks_to_send(self, digests: bytes) -> Sent:
        base = self._plan.base
        if base is None:
            return digests
        return to_send(digests, base.chunks, base=base.uid, width=CHUNK_DIGEST)

    def _replicas_to_send(self) -> Sent:
        base = self._plan.base
        if base is None:
            return self._fingerprints
        return to_send(self._fingerprints, base.replicas, base=base.uid, width=FINGERPRINT)

    def _resolved(self) -> RankData:
        """Return the data that this rank writes.

        The first call resolves it. That call is inside an exchange, because the planner may fail.
        """
        if self._data is None:
            plan, layouts = self._plan.take(self._reply)
            self._data = RankData(
                self.planner.finish_plan(plan),
                self.planner,
                dict(layouts),
                chunk=self.target.catalog.repository.chunk,
                allow_pickle=self.allow_pickle,
            )
            self.bar.begin("digest", total_nbytes(self._data.chunks))
        return self._data

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        taken = time.perf_counter() - began
        self._seconds[phase] = self._seconds.get(phase, 0.0) + taken


def _set_up_planner(
    planner: SavePlanner, state: dict[str, Any], meta: StorageMeta, *, is_coordinator: bool
) -> None:
    """Give a planner the state and the StorageMeta.

    A planner written for torch before 2.3 takes no StorageMeta.
    """
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
