"""The coordinator of a save: what it does with what the ranks send in each exchange.

Invariant: only the coordinator changes the catalog. Once it knows that the save failed, it aborts
the version that it began.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from torch.distributed.checkpoint.planner import SavePlanner

from dcpstore.catalog.read.dedup import find_chunks
from dcpstore.catalog.read.entries import load_entries
from dcpstore.catalog.read.ref_lookup import find_refs
from dcpstore.errors import InvalidInputError
from dcpstore.planning.save_planner import recorded_by
from dcpstore.records import ChunkDefaults, ChunkKey, EntryRecord, Version
from dcpstore.saving.chunk_writer import Written
from dcpstore.saving.commit import BegunVersion, SaveTarget, checked_planner_data, entries_of_parent
from dcpstore.saving.digest_exchange import (
    CHUNK_DIGEST,
    Sent,
    SentBefore,
    received,
    split,
)
from dcpstore.saving.plan_exchange import (
    GlobalPlan,
    PlanOffer,
    PlanReply,
    reply_to_offers,
    reply_to_plans,
    shares_tables,
)
from dcpstore.saving.rank_chunks import Digested
from dcpstore.saving.replicas import FINGERPRINT, list_names
from dcpstore.saving.request import SaveRequest
from dcpstore.saving.save_state import SaveState, has_other_grids

__all__ = [
    "Coordinator",
    "FirstDigests",
    "OpenRequest",
    "RankDigests",
    "RankResult",
    "Seconds",
    "WriteAssignment",
    "check_requests",
]

_log = logging.getLogger(__name__)

Seconds = dict[str, float]  # by phase

# A save of this many bytes per rank writes early: that saves more time than one exchange costs.
_EARLY = 64 << 20


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """What each rank sends in the first exchange; all but `keys` must be the same on all ranks."""

    repository: str
    request: SaveRequest
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WriteAssignment:
    """What a rank does next: compare entries of the parent with what it holds, or write.

    Attributes:
        write: indices of its chunks to write, without those that it has begun to write.
        compare: entries, the same for all ranks.
        version: the number of the version that holds these entries.
        wants_digests: whether the rank must send all its digests, because a difference cannot be
            used; the same for all ranks.
    """

    write: Sequence[int] = ()
    compare: Sequence[EntryRecord] = ()
    version: int = 0
    wants_digests: bool = False


@dataclass(frozen=True, slots=True)
class RankDigests:
    """What a rank sends once all its data is digested.

    Attributes:
        chunks: the digests of its chunks.
        digested: its values; the digests are left out.
        seconds: how long each phase has taken on this rank.
        replicas: the fingerprints of its replicas; None if `FirstDigests` had them.
    """

    chunks: Sent
    digested: Digested
    seconds: Seconds
    replicas: Sent | None


@dataclass(frozen=True, slots=True)
class FirstDigests:
    """What a rank sends before all its data is digested, in a save that writes early.

    Attributes:
        chunks: the digests of its first chunks.
        codecs: the codec of each of these, each name once.
        codec: [chunks], the number of its codec, one byte each.
        replicas: the fingerprints of its replicas.
    """

    chunks: Sent
    codecs: Sequence[str]
    codec: bytes
    replicas: Sent


@dataclass(frozen=True, slots=True)
class RankResult:
    """What a rank sends last: where its chunks are in packs, now durable; seconds by phase."""

    written: Written
    seconds: Seconds


class Coordinator:
    """The coordinator of one save; on the other ranks its methods are not called."""

    target: SaveTarget

    def __init__(self, planner: SavePlanner, size: int, *, is_whole: bool) -> None:
        self._planner = planner
        # False: this rank saves alone what it holds, perhaps only parts of tensors.
        self._is_whole = is_whole
        self._size = size
        self._writes_early = False
        self._begun: BegunVersion | None = None
        self._parent: Mapping[str, EntryRecord] | None = None  # the parent's entries by FQN
        self._plan: GlobalPlan | None = None
        self._first: Sequence[Sequence[int]] = [()] * size
        # By rank, the digests to which differences are; empty if the ranks send all.
        self._before: Sequence[SentBefore] = ()
        # By rank, those of this save: the digests of chunks, and the fingerprints of replicas.
        self._chunks: Sequence[bytes] = ()
        self._replicas: Sequence[bytes] | None = None

    @property
    def _chunk(self) -> ChunkDefaults:
        return self.target.catalog.repository.chunk

    def begin(self, requests: Sequence[OpenRequest]) -> tuple[str, list[str]]:
        """Check that the ranks agree and begin the version; return its uid and all ranks' keys."""
        check_requests(requests)
        self._begun = BegunVersion(self.target, requests[0].request, ranks=self._size)
        draft = self._begun.draft
        if not self._is_whole:
            self._warn_of_plain_branch(draft.branch)
        return draft.uid, sorted({key for request in requests for key in request.keys})

    def _warn_of_plain_branch(self, branch: str) -> None:
        """Warn if a load by the branch's plain name finds what all ranks saved together."""
        plain, _, _ = branch.rpartition("/rank-")
        if find_refs(self.target.catalog, [plain]):
            _log.warning(
                "%r was saved with collectives before, and a load of it finds that; what this rank "
                "saves now is %r: load it by this name, with no_dist=True, or save to a new branch",
                plain,
                branch,
            )

    def plan(self, offers: list[PlanOffer]) -> list[PlanReply]:
        """Make the global plan, or reuse that of an earlier save; give each rank its part.

        It is called twice if the first replies ask the ranks for their tables.
        """
        assert self._begun is not None
        if self._parent is None and not self._is_whole:
            # Another rank may have saved the parent: its chunk grids would not fit.
            self._parent_number, self._parent = 0, {}
        elif self._parent is None:
            self._parent_number, self._parent = entries_of_parent(self.target, self._begun.parent)
        if shares_tables(self._planner):
            self._plan, replies = reply_to_offers(
                offers,
                self.target.memory,
                chunk=self._chunk,
                parent=self._parent,
                to_lowest_rank=self._planner.dedup_save_to_lowest_rank,
                is_whole=self._is_whole,
            )
            if self._plan is not None:  # kept here: another save may replace the cached ones
                self._before = self.target.memory.gathered.get(self._plan.key) or ()
            return self._with_early_writes(replies)
        plans = [offer.plan for offer in offers if offer.plan is not None]
        parts, metadata = self._planner.create_global_plan(plans)
        # With torch's plan cache, an unchanged rank gets an empty plan (usable=False); the full one
        # is in `planner.global_plan`.
        is_cached = not all(plan.usable for plan in parts)
        whole = getattr(self._planner, "global_plan", parts) if is_cached else parts
        self._plan, replies = reply_to_plans(
            offers,
            parts,
            whole,
            chunk=self._chunk,
            parent=self._parent,
            is_whole=self._is_whole,
        )
        self._plan.paths, self._plan.planner_data = checked_planner_data(
            metadata.planner_data, recorded_by(self._planner)
        )
        return self._with_early_writes(replies)

    def choose_first(self, reports: Sequence[FirstDigests]) -> Sequence[Sequence[int]]:
        """Return which of its first chunks each rank writes now, by their indices.

        Raises:
            InvalidInputError: the ranks hold different contents of one item.
        """
        chunks = self._all_chunks([report.chunks for report in reports])
        if chunks is None or not self._take_replicas([report.replicas for report in reports]):
            return self._first  # nothing is written early; `look_up` asks for all digests
        # For each chunk the first rank that has it, and its index there.
        writers: dict[ChunkKey, tuple[int, int]] = {}
        for rank, (report, digests) in enumerate(zip(reports, chunks, strict=True)):
            for index, (codec, digest) in enumerate(
                zip(report.codec, split(digests, CHUNK_DIGEST), strict=True)
            ):
                writers.setdefault((report.codecs[codec], digest), (rank, index))
        # Ignore the codec: an unknown digest is surely new. A known one may still be reused as part
        # of a whole tensor, which may be stored with another codec.
        stored = find_chunks(self.target.catalog, {digest for _, digest in writers})
        chosen: list[list[int]] = [[] for _ in reports]
        for (_, digest), (rank, index) in writers.items():
            if digest not in stored:
                chosen[rank].append(index)
        self._first = chosen
        return chosen

    def look_up(self, reports: Sequence[RankDigests]) -> list[WriteAssignment]:
        """Find what the repository holds; ask for a comparison if digests cannot show it.

        Raises:
            InvalidInputError: the ranks hold different contents of one item.
        """
        assert self._plan is not None
        assert self._parent is not None
        chunks = self._all_chunks([report.chunks for report in reports])
        replicas = [report.replicas for report in reports if report.replicas is not None]
        if replicas:  # else `choose_first` took them
            self._take_replicas(replicas)
        if chunks is None or self._replicas is None:
            self._before = ()
            return [WriteAssignment(wants_digests=True)] * self._size
        self._chunks = chunks
        self._state = SaveState(
            self._plan.table,
            self._plan.layouts,
            [
                replace(report.digested, digests=digests)
                for report, digests in zip(reports, chunks, strict=True)
            ],
            paths=self._plan.paths,
            chunk=self._chunk,
            are_whole=self._is_whole,
            before=self.target.memory.contents.get(self._plan.key),
        )
        if self._plan.key:
            self.target.memory.contents.put(self._plan.key, self._state.contents)
        tree = self.target.memory.trees.get(self._parent_number)
        fqns = self._state.look_up(self.target.catalog, self._parent, tree)
        if not fqns:
            return self._assign_writes()
        # From the catalog, because the cached entries of a parent have no ids of tensors.
        self._compared = load_entries(self.target.catalog, self._parent_number, fqns)
        return [WriteAssignment(compare=self._compared, version=self._parent_number)] * self._size

    def take_changed(self, reports: Sequence[set[str]]) -> list[WriteAssignment]:
        """Take the FQNs that each rank found changed; return which chunks each rank writes."""
        # Each rank holds other boxes of a tensor: it is unchanged only if all of them say so.
        changed = set().union(*reports)
        self._state.take_unchanged(e for e in self._compared if e.fqn not in changed)
        return self._assign_writes()

    def _assign_writes(self) -> list[WriteAssignment]:
        chosen = self._state.choose_writes(self.target.catalog, self._first)
        return [WriteAssignment(write=places) for places in chosen]

    def _all_chunks(self, sent: Sequence[Sent]) -> list[bytes] | None:
        """Return the digests of each rank's chunks, or None if the ranks must send them all."""
        return received(sent, [(one.uid, one.chunks) for one in self._before], width=CHUNK_DIGEST)

    def _take_replicas(self, sent: Sequence[Sent]) -> bool:
        """Take and check the fingerprints; return False if the ranks must send them all."""
        before = [(one.uid, one.replicas) for one in self._before]
        self._replicas = received(sent, before, width=FINGERPRINT)
        if self._replicas is not None:
            self._check_replicas(self._replicas)
        return self._replicas is not None

    def _check_replicas(self, fingerprints: Sequence[bytes]) -> None:
        """Check that what several ranks hold is the same on all; log the buffers that differ."""
        assert self._plan is not None
        replicas, table = self._plan.replicas, self._plan.table
        differing = replicas.differing_buffers(fingerprints)
        if not differing:
            return
        # Buffers that belong together, such as mean and variance, must come from one rank.
        for number, rank in zip(table.rows.tensor.tolist(), table.rank.tolist(), strict=True):
            fqn = table.names[number].fqn
            if fqn in differing and rank != differing[fqn][0]:
                raise InvalidInputError(
                    f"the module buffer {fqn!r} differs between ranks, and the planner keeps that "
                    f"of rank {rank}; have it keep those of the lowest rank "
                    "(dedup_save_to_lowest_rank=True), or give dcpstore's planner."
                )
        new = sorted(differing.keys() - replicas.reported)
        replicas.reported.update(new)
        if new:
            _log.warning(
                "module buffers differ between ranks: %s; those of the lowest rank that holds them "
                "are saved, as DDP keeps those of rank 0",
                list_names([*map(repr, new)]),
            )

    def _with_early_writes(self, replies: list[PlanReply]) -> list[PlanReply]:
        """Let the ranks write early if the save is large and no parent tensor has another grid.

        If the chunk grid changed, all chunks look new although the tensor may be unchanged. Writing
        them early would then be useless.
        """
        assert self._parent is not None
        plan = self._plan
        self._writes_early = (
            plan is not None
            and plan.table.nbytes.sum() >= self._size * _EARLY
            and not any(
                has_other_grids(layout, self._parent.get(fqn))
                for fqn, layout in plan.layouts.items()
            )
        )
        if not self._writes_early:
            return replies
        return [replace(reply, writes_early=True) for reply in replies]

    def commit(self, reports: Sequence[RankResult]) -> Version:
        """Write the manifest and commit the version."""
        assert self._plan is not None
        assert self._begun is not None
        self._state.take_results([report.written for report in reports])
        version = self._begun.commit(
            self.target,
            self._state,
            packs=[pack for report in reports for pack in report.written.packs],
            # The slowest rank's time is how long the phase took.
            seconds={
                phase: max(report.seconds.get(phase, 0.0) for report in reports)
                for phase in ("plan", "digest", "compare", "write")
            },
            planner_data=self._plan.planner_data,
        )
        if self._plan.key and self._size > 1:  # one rank sends nothing
            assert self._replicas is not None
            sent = [
                SentBefore(version.uid, *both)
                for both in zip(self._chunks, self._replicas, strict=True)
            ]
            self.target.memory.gathered.put(self._plan.key, sent)
        return version

    def abort(self, error: BaseException) -> None:
        """Mark the version as aborted because of `error`, if it was begun."""
        if self._begun is not None:
            self._begun.abort_for(self.target.catalog, error)


def check_requests(requests: Sequence[OpenRequest]) -> None:
    """Check that all ranks ask for the same save, of one repository.

    Raises:
        InvalidInputError: they differ; the error names the argument.
    """
    uids = [request.repository for request in requests]
    if len(set(uids)) > 1:
        odd = next(rank for rank, uid in enumerate(uids) if uid != uids[0])
        raise InvalidInputError(
            f"rank 0 saves to repository {uids[0]}, rank {odd} to {uids[odd]}; pass the same "
            "repository on every rank, on storage that all of them see."
        )
    # Without this check rank 0 would decide, and the other ranks would not notice.
    for name in (part.name for part in fields(SaveRequest)):
        if name in ("metrics", "labels") and requests[0].request.metrics_from == "rank0":
            continue
        values = [getattr(sent.request, name) for sent in requests]
        texts = [_comparable(value) for value in values]
        odd = next((rank for rank, text in enumerate(texts) if text != texts[0]), 0)
        if odd:
            raise InvalidInputError(
                f"the ranks disagree about {name}: rank 0 says {values[0]!r}, rank {odd} says "
                f"{values[odd]!r}; pass the same {name}= on every rank."
            )


def _comparable(value: object) -> str:
    """Return a text that is equal for equal arguments (NaN != NaN, so we compare texts)."""
    if isinstance(value, Mapping):
        value = sorted(value.items())
    elif isinstance(value, tuple):
        value = sorted(value)
    return repr(value)
