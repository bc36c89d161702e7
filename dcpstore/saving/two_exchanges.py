"""A save in two exchanges, plans and results: torch's own `save` has no others.

A rank does not learn the digests of the others. So each rank asks the catalog itself which of its
chunks are stored, and its report has the places of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from dcpstore.catalog.read.dedup import find_encoded
from dcpstore.catalog.write.saves import kept_lease
from dcpstore.planning.global_plan import check_agreement, check_tiling
from dcpstore.planning.plan_table import GlobalTable, PlanTable
from dcpstore.records import ChunkKey, ChunkPlace, ObjectPath, PackRecord, Version
from dcpstore.saving.chunk_writer import ChunkWriter
from dcpstore.saving.commit import BegunVersion, SaveTarget
from dcpstore.saving.layout import Layout, join_layouts
from dcpstore.saving.rank_chunks import Digested, RankData, first_indices
from dcpstore.saving.save_state import SaveState

__all__ = ["RankReport", "commit_reports", "write_plan"]


@dataclass(frozen=True, slots=True)
class RankReport:
    """What one rank wrote and found.

    `places` says where each of its chunks is stored; `nbytes` counts the raw bytes of the chunks
    that it wrote.
    """

    planned: PlanTable
    layouts: Mapping[str, Layout]
    digested: Digested
    places: Mapping[ChunkKey, ChunkPlace]
    packs: Sequence[PackRecord]
    nbytes: int

    @classmethod
    def empty(cls) -> RankReport:
        """Return the report of a rank that had nothing to write."""
        return cls(PlanTable.of(SavePlan([])), {}, Digested(b""), {}, (), 0)


def write_plan(
    plan: SavePlan,
    planner: SavePlanner,
    layouts: Mapping[str, Layout],
    target: SaveTarget,
    *,
    uid: str,
    rank: int,
    allow_pickle: bool,
) -> RankReport:
    """Write what this rank's plan says and the repository does not hold; durable on return.

    The first chunks are written while the others are digested.

    Args:
        plan: what this rank writes.
        planner: of this rank, which has its data.
        layouts: of the tensors of the plan.
        target: what is saved to.
        uid: under which the packs of this rank are stored.
        rank: of this process in the save.
        allow_pickle: whether values that need pickle may be stored.

    Raises:
        InvalidInputError: the planner's data do not match the plan.
        UnsafeDataError: an item is neither tensor nor value, and `allow_pickle` is False.
    """
    with ChunkWriter(target.storage, uid=uid, rank=rank) as writer:
        data = RankData(
            plan,
            planner,
            dict(layouts),
            chunk=target.catalog.repository.chunk,
            allow_pickle=allow_pickle,
        )
        # Equal chunks of this rank are looked up and written once.
        first = first_indices(data.digest_first(writer.pool))
        places = find_encoded(target.catalog, first)
        early = [key for key in first if key not in places]
        writer.begin([data.chunks[first[key]] for key in early])
        digested = data.digest(writer.pool)
        rest = {k: i for k, i in first_indices(data.keys).items() if k not in first}
        places |= find_encoded(target.catalog, rest)
        late = [key for key in rest if key not in places]
        written = writer.finish([data.chunks[rest[key]] for key in late])
    places.update(zip([*early, *late], written.places, strict=True))
    return RankReport(PlanTable.of(plan), layouts, digested, places, written.packs, written.nbytes)


def commit_reports(
    begun: BegunVersion,
    target: SaveTarget,
    table: GlobalTable,
    reports: Sequence[RankReport],
    *,
    paths: Mapping[str, ObjectPath],
    planner_data: str | None,
    is_whole: bool,
    is_cached: bool,
) -> Version:
    """Commit a begun version from the reports of all ranks; only the coordinator calls it.

    Args:
        begun: the version.
        target: what is saved to.
        table: the plans of all ranks.
        reports: by rank.
        paths: of the entries in the state, by FQN.
        planner_data: what the planner stores with the version, as typed JSON.
        is_whole: whether the reports are those of all ranks, so that each tensor must be complete.
        is_cached: whether torch's plan cache left out the plans of some ranks in the first
            exchange, so that only now the whole plan is known.

    Raises:
        InvalidInputError: the results are not those of the plan.
        ConflictError, AlreadyExistsError, NotFoundError: a ref is not as the request needs it.
    """
    layouts = {fqn: layout for report in reports for fqn, layout in report.layouts.items()}
    if is_whole and is_cached:  # else it was checked before anything was written
        check_agreement(table)
        check_tiling(table)
        layouts = join_layouts(table, [report.layouts for report in reports])
    state = SaveState(
        table,
        layouts,
        [report.digested for report in reports],
        paths=paths,
        chunk=target.catalog.repository.chunk,
        are_whole=is_whole,
    )
    state.look_up(target.catalog, {})  # without a parent, so that no comparison is asked for
    for report in reports:
        state.take_places(report.places, report.nbytes)
    with kept_lease(target.catalog, begun.draft.uid):
        return begun.commit(
            target,
            state,
            packs=[pack for report in reports for pack in report.packs],
            seconds={},
            planner_data=planner_data,
        )
