"""How the ranks come to one plan: tables the first time, digests from then on.

A repository that a process has open remembers the local plans it offered, with what it was
assigned to write of them, and on the coordinator the global plans. An unchanged topology then costs
64 bytes a rank. Invariant: what is remembered is used only where every rank's local plan and the
chunk grids of the parent are as they were.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from dcpstore.core.digests import hasher
from dcpstore.core.lru import LruCache
from dcpstore.errors import InvalidInputError
from dcpstore.geometry.box_table import Ints
from dcpstore.planning.global_plan import (
    check_agreement,
    check_names,
    check_tiling,
    plan_globally,
)
from dcpstore.planning.plan_table import GlobalTable, PlanTable
from dcpstore.planning.save_planner import DefaultSavePlanner
from dcpstore.records import ChunkDefaults, EntryRecord, ObjectPath
from dcpstore.saving.layout import Layout, kept_grids, lay_out
from dcpstore.saving.replicas import Replicas

__all__ = [
    "GlobalPlan",
    "LocalPlan",
    "PlanMemory",
    "PlanOffer",
    "PlanReply",
    "checked_table",
    "reply_to_offers",
    "reply_to_plans",
    "shares_tables",
]

_MOST = 8  # plans remembered: of a model, of its optimizer, of what is saved beside them
_VERSIONS = 2  # whose entries are remembered, by number: the parents of the next saves


@dataclass(frozen=True, slots=True)
class RankShare:
    """What one rank is to write: items of its plan, by place, and how their tensors are cut.

    `compared` are the places of those that other ranks hold too.
    """

    kept: Ints
    layouts: Mapping[str, Layout]
    compared: Ints


@dataclass(frozen=True, slots=True)
class PlanOffer:
    """What a rank sends of its local plan.

    Attributes:
        digest: of its table.
        held: the key of the share that it was given for this plan last.
        table: the plan; left out where a share is held, until it is asked for.
        plan: the plan in torch's form, instead, where the planner makes the global plan itself.
        buffers: the FQNs of module buffers, beside such a plan; a table marks them.
    """

    digest: bytes = b""
    held: bytes = b""
    table: PlanTable | None = None
    plan: SavePlan | None = None
    buffers: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class PlanReply:
    """What the coordinator answers to the plan of one rank.

    Attributes:
        key: names the share that it is given, or holds.
        kept: which items of its plan it writes, by place.
        layouts: of their tensors by FQN, pickled; ranks with the same ones share the bytes.
        compared: which items of its plan other ranks hold too, by place; it sends their digests.
        plan: its part of the global plan, where the planner made that.
        splits: whether it sends the digests of its first chunks first, and writes those early.
    """

    key: bytes = b""
    kept: Ints | None = None
    layouts: bytes | None = None
    compared: Ints | None = None
    plan: SavePlan | None = None
    splits: bool = False

    @property
    def asks(self) -> bool:
        """Whether the rank is asked for its table."""
        return not self.key and self.plan is None


@dataclass(eq=False)
class GlobalPlan:
    """What all ranks write, and how it is cut; `paths` and `planner_data` are kept with a version.

    Attributes:
        replicas: what several ranks hold, and must hold alike.
        key: names what follows from the local plans and the layouts.
    """

    table: GlobalTable
    replicas: Replicas
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    paths: Mapping[str, ObjectPath] = field(default_factory=dict)
    planner_data: str | None = None
    key: bytes = b""


class PlanMemory:
    """What one process remembers of its saves to one repository."""

    def __init__(self) -> None:
        self.shares: LruCache[bytes, tuple[bytes, RankShare]] = LruCache(_MOST)
        self.plans: LruCache[tuple[bytes, ...], GlobalPlan] = LruCache(_MOST)
        self.entries: LruCache[int, Mapping[str, EntryRecord]] = LruCache(_VERSIONS)


class LocalPlan:
    """A rank's own plan, as it is offered and as it is carried out."""

    def __init__(
        self,
        plan: SavePlan,
        planner: SavePlanner,
        memory: PlanMemory,
        *,
        buffers: Collection[str] = (),
    ) -> None:
        self._plan = plan
        self._memory = memory
        self._table = PlanTable.of(plan, buffers) if shares_tables(planner) else None
        self._buffers = buffers
        self._digest = b"" if self._table is None else self._table.digest

    def offer(self, *, whole: bool = False) -> PlanOffer:
        """Return what to send of the plan; with `whole` the table too, even if a share is held."""
        if self._table is None:
            return PlanOffer(plan=self._plan, buffers=frozenset(self._buffers))
        key, _ = self._memory.shares.get(self._digest) or (b"", None)
        return PlanOffer(self._digest, key, self._table if whole or not key else None)

    def take(self, reply: PlanReply) -> tuple[SavePlan, Mapping[str, Layout]]:
        """Return what this rank is to write, and remember it; `compared` is known from then on."""
        if reply.plan is not None:
            assert reply.layouts is not None
            assert reply.compared is not None
            self.compared = [self._plan.items[i] for i in reply.compared.tolist()]
            return reply.plan, pickle.loads(reply.layouts)
        if reply.layouts is not None:
            assert reply.kept is not None
            assert reply.compared is not None
            share = RankShare(reply.kept, pickle.loads(reply.layouts), reply.compared)
            self._memory.shares.put(self._digest, (reply.key, share))
        else:
            held = self._memory.shares.get(self._digest)
            assert held is not None, f"assigned to write {reply.key!r}, which is not held"
            assert held[0] == reply.key, f"assigned to write {reply.key!r}, holding {held[0]!r}"
            share = held[1]
        self.compared = [self._plan.items[i] for i in share.compared.tolist()]
        items = [self._plan.items[i] for i in share.kept.tolist()]
        return dataclasses.replace(self._plan, items=items), share.layouts


def shares_tables(planner: SavePlanner) -> TypeGuard[DefaultSavePlanner]:
    """Tell whether the global plan is ours to make: a planner with its own needs torch's form."""
    return (
        isinstance(planner, DefaultSavePlanner)
        and type(planner).create_global_plan is DefaultSavePlanner.create_global_plan
    )


def reply_to_offers(
    offers: Sequence[PlanOffer],
    memory: PlanMemory,
    *,
    chunk: ChunkDefaults,
    parent: Mapping[str, EntryRecord],
    to_lowest_rank: bool,
    is_whole: bool = True,
) -> tuple[GlobalPlan | None, list[PlanReply]]:
    """Return the global plan, and the reply to each rank; no plan yet where tables are asked for.

    `is_whole` says whether the offers are those of all ranks: one alone may hold parts of tensors.

    Raises:
        InvalidInputError: ranks disagree about an FQN or their planners, or the boxes of a tensor
            do not tile its shape.
    """
    if any(offer.plan is not None for offer in offers):
        raise InvalidInputError(
            "some ranks use a planner with a global plan of its own and some do not; pass the same "
            "planner on every rank."
        )
    how = (b"lowest" if to_lowest_rank else b"", b"" if is_whole else b"alone")
    digests = (*(offer.digest for offer in offers), *how)
    plan = memory.plans.get(digests)
    if plan is None:
        tables = [offer.table for offer in offers if offer.table is not None]
        if len(tables) < len(offers):
            return None, [PlanReply()] * len(offers)
        held = GlobalTable.of(tables)
        table = plan_globally(held, to_lowest_rank=to_lowest_rank, is_whole=is_whole)
        plan = GlobalPlan(table, Replicas.of(held), paths=table.paths)
    if not plan.key or any(
        grids != layout.grids
        for fqn, layout in plan.layouts.items()
        if (grids := kept_grids(parent.get(fqn), layout.dtype, layout.shape))
    ):
        layouts = lay_out(plan.table, chunk=chunk, parent=parent, are_whole=is_whole)
        key = hasher(b"".join(digests) + pickle.dumps(layouts)).digest()
        plan = dataclasses.replace(plan, layouts=layouts, key=key)
        memory.plans.put(digests, plan)
    return plan, _replies(plan, offers)


def _replies(plan: GlobalPlan, offers: Sequence[PlanOffer]) -> list[PlanReply]:
    table, encoded = plan.table, _EncodedLayouts(plan)
    replies = []
    for rank, offer in enumerate(offers):
        if offer.held == plan.key:
            replies.append(PlanReply(plan.key))
        else:
            layouts = encoded.of(table.numbers_of(rank))
            compared = plan.replicas.of_rank(rank)
            replies.append(PlanReply(plan.key, table.kept(rank), layouts, compared))
    return replies


class _EncodedLayouts:
    """Layouts as bytes, made once for all ranks that write the same tensors."""

    def __init__(self, plan: GlobalPlan) -> None:
        self._plan = plan
        self._made: dict[bytes, bytes] = {}

    def of(self, numbers: Ints) -> bytes:
        """Return the pickled layouts of these names."""
        key = numbers.tobytes()
        if key not in self._made:
            names = (self._plan.table.names[number] for number in dict.fromkeys(numbers.tolist()))
            self._made[key] = pickle.dumps(
                {name.fqn: self._plan.layouts[name.fqn] for name in names if name.dtype is not None}
            )
        return self._made[key]


def checked_table(plans: Sequence[SavePlan], *, is_whole: bool) -> GlobalTable:
    """Return the table of what all ranks write, by plans that a planner of torch's form made.

    Raises:
        InvalidInputError: no catalog can keep an FQN, or ranks disagree about one; or the plans
            are those of all ranks, and do not tile its shape.
    """
    table = GlobalTable.of([PlanTable.of(plan) for plan in plans])
    check_names(table)
    check_agreement(table)
    if is_whole:
        check_tiling(table)
    return table


def reply_to_plans(
    offers: Sequence[PlanOffer],
    parts: Sequence[SavePlan],
    whole: Sequence[SavePlan],
    *,
    chunk: ChunkDefaults,
    parent: Mapping[str, EntryRecord],
    is_whole: bool = True,
) -> tuple[GlobalPlan, list[PlanReply]]:
    """Do the same for the global plan that a planner of the caller's made.

    Args:
        offers: by rank, with its local plan.
        parts: the plan of each rank, by rank.
        whole: what they are to write: where torch caches plans, those of an earlier save.
        chunk: the repository's defaults.
        parent: the entries of the parent version by FQN.
        is_whole: whether the plans are those of all ranks.
    """
    table = checked_table(whole, is_whole=is_whole)
    held = GlobalTable.of([PlanTable.of(one.plan or SavePlan([]), one.buffers) for one in offers])
    layouts = lay_out(table, chunk=chunk, parent=parent, are_whole=is_whole)
    plan = GlobalPlan(table, Replicas.of(held), layouts)
    encoded = _EncodedLayouts(plan)
    return plan, [
        PlanReply(
            layouts=encoded.of(table.numbers_of(rank)),
            compared=plan.replicas.of_rank(rank),
            plan=mine,
        )
        for rank, mine in enumerate(parts)
    ]
