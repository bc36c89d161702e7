"""The coordinator of a save: what it does with what the ranks send in each exchange.

Invariant: it alone asks the catalog and changes it, and it never leaves a begun version pending
when it knows that the save has failed.
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
from dcpstore.saving.commit import BegunVersion, SaveTarget, entries_before, kept_planner_data
from dcpstore.saving.pack_writer import Written
from dcpstore.saving.plan_exchange import (
    GlobalPlan,
    PlanOffer,
    PlanReply,
    reply_to_offers,
    reply_to_plans,
    shares_tables,
)
from dcpstore.saving.rank_chunks import Digested
from dcpstore.saving.request import SaveRequest
from dcpstore.saving.save_state import SaveState, is_cut_otherwise

__all__ = [
    "Coordinator",
    "FirstDigests",
    "OpenRequest",
    "RankDigests",
    "RankResult",
    "Seconds",
    "WriteAssignment",
    "check_agreement",
]

_log = logging.getLogger(__name__)

Seconds = dict[str, float]  # by phase

_MUCH = 64 << 20  # bytes a rank that take longer to digest than one exchange more
_SHOWN = 8  # names in one message; more would bury the first


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """What each rank sends in the first exchange; all but `keys` must be the same on all ranks."""

    repository: str
    request: SaveRequest
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WriteAssignment:
    """What a rank is to do next: compare entries of a version with what it holds, or write.

    `write` are places among its chunks, less those that it writes already. All ranks are given the
    same entries to compare.
    """

    write: Sequence[int] = ()
    compare: Sequence[EntryRecord] = ()
    version: int = 0


@dataclass(frozen=True, slots=True)
class RankDigests:
    """What a rank found out about its data.

    Attributes:
        digested: its chunks and values.
        seconds: that each phase took it.
        alike: the digests of what other ranks hold too; empty where it reports them before.
    """

    digested: Digested
    seconds: Seconds
    alike: bytes


@dataclass(frozen=True, slots=True)
class FirstDigests:
    """What a rank sends before it has digested everything, in a save that writes early.

    Attributes:
        keys: of its first chunks.
        alike: the digests of what other ranks hold too.
    """

    keys: Sequence[ChunkKey]
    alike: bytes


@dataclass(frozen=True, slots=True)
class RankResult:
    """What a rank sends last: where its chunks lie, durable, and how long each phase took."""

    written: Written
    seconds: Seconds


class Coordinator:
    """The coordinator of one save; on the other ranks its methods are not called."""

    target: SaveTarget

    def __init__(self, planner: SavePlanner, size: int, *, is_whole: bool) -> None:
        self._planner = planner
        self._is_whole = is_whole  # else this rank alone saves its part, perhaps of tensors
        self._size = size
        self._splits = False  # whether the ranks write their first chunks early
        self._begun: BegunVersion | None = None
        self._before: Mapping[str, EntryRecord] | None = None
        self._plan: GlobalPlan | None = None
        self._first: Sequence[Sequence[int]] = [()] * size

    @property
    def _chunk(self) -> ChunkDefaults:
        return self.target.catalog.repository.chunk

    def begin(self, requests: Sequence[OpenRequest]) -> tuple[str, list[str]]:
        """Check that the ranks agree and begin the version; return its uid and all ranks' keys."""
        check_agreement(requests)
        self._begun = BegunVersion(self.target, requests[0].request, ranks=self._size)
        draft = self._begun.draft
        if not self._is_whole:
            self._report_shadow(draft.branch)
        return draft.uid, sorted({key for one in requests for key in one.keys})

    def _report_shadow(self, branch: str) -> None:
        """Warn where a load by the branch's plain name will find what all ranks saved together."""
        plain, _, _ = branch.rpartition("/rank-")
        if find_refs(self.target.catalog, [plain]):
            _log.warning(
                "%r was saved with collectives before, and a load of it finds that; what this rank "
                "saves now is %r: load it by this name, with no_dist=True, or save to a new branch",
                plain,
                branch,
            )

    def plan(self, offers: list[PlanOffer]) -> list[PlanReply]:
        """Make the global plan, or take that of an earlier save; give each rank its part."""
        assert self._begun is not None
        if self._before is None and not self._is_whole:
            self._before_number, self._before = 0, {}  # no grid of another part is of use
        elif self._before is None:
            self._before_number, self._before = entries_before(self.target, self._begun.draft)
        if shares_tables(self._planner):
            self._plan, replies = reply_to_offers(
                offers,
                self.target.memory,
                chunk=self._chunk,
                parent=self._before,
                to_lowest_rank=self._planner.dedup_save_to_lowest_rank,
                is_whole=self._is_whole,
            )
            return self._split(replies)
        plans = [offer.plan for offer in offers if offer.plan is not None]
        parts, described = self._planner.create_global_plan(plans)
        # torch's plan cache: a rank whose plan did not change gets an empty one
        is_cached = not all(plan.usable for plan in parts)
        whole = getattr(self._planner, "global_plan", parts) if is_cached else parts
        self._plan, replies = reply_to_plans(
            offers,
            parts,
            whole,
            chunk=self._chunk,
            parent=self._before,
            is_whole=self._is_whole,
        )
        self._plan.paths, self._plan.planner_data = kept_planner_data(
            described.planner_data, recorded_by(self._planner)
        )
        return self._split(replies)

    def choose_first(self, reports: Sequence[FirstDigests]) -> Sequence[Sequence[int]]:
        """Return which of its first chunks each rank is to write now, as places among them.

        A chunk that the repository does not hold by any codec is part of no tensor that it holds.

        Raises:
            InvalidInputError: the ranks hold different contents of one item.
        """
        self._compare([one.alike for one in reports])
        seen: dict[ChunkKey, tuple[int, int]] = {}
        for rank, one in enumerate(reports):
            for place, key in enumerate(one.keys):
                seen.setdefault(key, (rank, place))
        held = find_chunks(self.target.catalog, {digest for _, digest in seen})
        chosen: list[list[int]] = [[] for _ in reports]
        for (_, digest), (rank, place) in seen.items():
            if digest not in held:
                chosen[rank].append(place)
        self._first = chosen
        return chosen

    def look_up(self, reports: Sequence[RankDigests]) -> list[WriteAssignment]:
        """Find what the repository holds; ask for a comparison where digests cannot tell.

        Raises:
            InvalidInputError: the ranks hold different contents of one item.
        """
        assert self._plan is not None
        assert self._before is not None
        if not self._splits:
            self._compare([one.alike for one in reports])
        self._state = SaveState(
            self._plan.table,
            self._plan.layouts,
            [one.digested for one in reports],
            paths=self._plan.paths,
            chunk=self._chunk,
            are_whole=self._is_whole,
        )
        alike = self._state.look_up(self.target.catalog, self._before)
        if not alike:
            return self._writes()
        self._compared = load_entries(self.target.catalog, self._before_number, alike)
        return [WriteAssignment(compare=self._compared, version=self._before_number)] * self._size

    def take_changed(self, reports: Sequence[set[str]]) -> list[WriteAssignment]:
        """Take what each rank found changed; return which of its chunks each is to write."""
        changed = set().union(*reports)
        self._state.take_unchanged(e for e in self._compared if e.fqn not in changed)
        return self._writes()

    def _writes(self) -> list[WriteAssignment]:
        chosen = self._state.choose_writes(self.target.catalog, self._first)
        return [WriteAssignment(write=mine) for mine in chosen]

    def _compare(self, alike: Sequence[bytes]) -> None:
        """Check that what several ranks hold is the same on all; report buffers that differ."""
        assert self._plan is not None
        replicas, table = self._plan.replicas, self._plan.table
        differing = replicas.differing_buffers(alike)
        if not differing:
            return
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
            more = f" and {len(new) - _SHOWN} more" if len(new) > _SHOWN else ""
            _log.warning(
                "module buffers differ between ranks: %s%s; those of the lowest rank that holds "
                "them are saved, as DDP keeps those of rank 0",
                ", ".join(map(repr, new[:_SHOWN])),
                more,
            )

    def _split(self, replies: list[PlanReply]) -> list[PlanReply]:
        """Let the ranks write early if the save is large and no parent tensor has another grid."""
        assert self._before is not None
        plan = self._plan
        splits = (
            plan is not None
            and plan.table.nbytes.sum() >= self._size * _MUCH
            and not any(
                is_cut_otherwise(layout, self._before.get(fqn))
                for fqn, layout in plan.layouts.items()
            )
        )
        self._splits = splits
        return [replace(reply, splits=True) for reply in replies] if splits else replies

    def commit(self, reports: Sequence[RankResult]) -> Version:
        """Write the manifest and commit the version."""
        assert self._plan is not None
        assert self._begun is not None
        self._state.take_results([one.written for one in reports])
        return self._begun.commit(
            self.target,
            self._state,
            packs=[pack for one in reports for pack in one.written.packs],
            seconds={
                phase: max(one.seconds.get(phase, 0.0) for one in reports)
                for phase in ("plan", "digest", "compare", "write")
            },
            planner_data=self._plan.planner_data,
        )

    def give_up(self, error: BaseException) -> None:
        """Record why a begun save ended without a version."""
        if self._begun is not None:
            self._begun.abort_for(self.target.catalog, error)


def check_agreement(requests: Sequence[OpenRequest]) -> None:
    """Check that all ranks ask for the same save, of one repository.

    Raises:
        InvalidInputError: two do not, by the argument that differs.
    """
    uids = [one.repository for one in requests]
    if len(set(uids)) > 1:
        odd = next(rank for rank, uid in enumerate(uids) if uid != uids[0])
        raise InvalidInputError(
            f"rank 0 saves to repository {uids[0]}, rank {odd} to {uids[odd]}; pass the same "
            "repository on every rank, on storage that all of them see."
        )
    for name in (part.name for part in fields(SaveRequest)):
        if name in ("metrics", "labels") and requests[0].request.metrics_from == "rank0":
            continue
        values = [getattr(one.request, name) for one in requests]
        texts = [_text(value) for value in values]
        odd = next((rank for rank, text in enumerate(texts) if text != texts[0]), 0)
        if odd:
            raise InvalidInputError(
                f"the ranks disagree about {name}: rank 0 says {values[0]!r}, rank {odd} says "
                f"{values[odd]!r}; pass the same {name}= on every rank."
            )


def _text(value: object) -> str:
    """Return what tells two arguments apart: a NaN does not equal itself, a set has no order."""
    if isinstance(value, Mapping):
        value = sorted(value.items())
    elif isinstance(value, tuple):
        value = sorted(value)
    return repr(value)
