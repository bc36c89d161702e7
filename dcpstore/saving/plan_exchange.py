"""How the ranks agree on one plan: they send tables the first time, and digests from then on.

While a process has a repository open, each rank caches its local plans and its share of each: the
items that it was assigned to write. The coordinator also caches the global plans. If a rank's plan
is cached, the rank sends only its digest, the key of the share, and the uid of the version whose
digests it has cached: about a hundred bytes. Invariant: a cached
global plan is used only if every rank's local plan and the chunk grids of the parent are the same.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

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
from dcpstore.planning.save_planner import KNOWN_ITEMS, DefaultSavePlanner
from dcpstore.records import ChunkDefaults, EntryRecord, EntryTree, ObjectPath
from dcpstore.saving.digest_exchange import SentBefore
from dcpstore.saving.layout import Layout, kept_grids, lay_out
from dcpstore.saving.replicas import Replicas
from dcpstore.saving.save_state import Contents

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

_PLANS = 8  # cached plans: a program may save a model, an optimizer and other states in turn
_VERSIONS = 2  # versions whose entries are cached: the parents of the next saves


@dataclass(frozen=True, slots=True)
class RankShare:
    """What one rank writes of its local plan.

    Attributes:
        kept: the indices in the plan of the items that it writes.
        layouts: by FQN, how the tensors of these items are cut into chunks.
        compared: the indices of the items that other ranks hold too.
    """

    kept: Ints
    layouts: Mapping[str, Layout]
    compared: Ints


@dataclass(frozen=True, slots=True)
class PlanOffer:
    """What a rank sends of its local plan.

    Attributes:
        digest: of its table.
        held: the key of the share that the rank has cached for this plan, or b"".
        table: the plan. It is left out if a share is cached, until the coordinator asks for it.
        plan: the plan in torch's form, instead of a table, if the caller's planner makes the global
            plan.
        buffers: the FQNs of module buffers, for a plan in torch's form; a table marks them.
        base: the uid of the version whose digests the rank has cached, sent under that share.
    """

    digest: bytes = b""
    held: bytes = b""
    table: PlanTable | None = None
    plan: SavePlan | None = None
    buffers: frozenset[str] = frozenset()
    base: str = ""


@dataclass(frozen=True, slots=True)
class PlanReply:
    """What the coordinator answers to the plan of one rank.

    Attributes:
        key: identifies the share that this reply gives, or that the rank has cached.
        kept: the indices in its plan of the items that it writes.
        layouts: of their tensors by FQN, pickled; ranks with the same layouts share the bytes.
        compared: the indices of the items that other ranks hold too; it sends their fingerprints.
        plan: its part of the global plan, if the caller's planner made that.
        writes_early: whether the rank digests its first chunks, and begins to write them, before
            it digests the others.
        base: the uid of the version to which the rank sends its digests as a difference; "" if it
            sends all.
    """

    key: bytes = b""
    kept: Ints | None = None
    layouts: bytes | None = None
    compared: Ints | None = None
    plan: SavePlan | None = None
    writes_early: bool = False
    base: str = ""

    @property
    def wants_table(self) -> bool:
        """Whether the rank must send its table."""
        return not self.key and self.plan is None


@dataclass(eq=False)
class GlobalPlan:
    """What all ranks write, and how it is cut.

    Attributes:
        table: the items that are written, with their ranks.
        replicas: the items that several ranks hold, which must be the same on all of them.
        layouts: of the tensors, by FQN.
        paths, planner_data: stored with the version.
        key: identifies the local plans and the layouts together.
    """

    table: GlobalTable
    replicas: Replicas
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    paths: Mapping[str, ObjectPath] = field(default_factory=dict)
    planner_data: str | None = None
    key: bytes = b""


class PlanMemory:
    """What one process caches of its saves to one repository.

    Attributes:
        shares: by the digest of a local plan, the rank's last share of it, with the share's key.
        plans: by the digests of all local plans, the global plan; on the coordinator.
        entries: by version number, the entries by FQN; on the coordinator.
        trees: likewise the trees of these entries.
        contents: by the key of a global plan, the tensors of its last save; on the coordinator.
        sent: by the key of a share, the digests that the rank sent with its last version of it.
        gathered: by the key of a global plan, the same of all ranks; on the coordinator.
        tables: by the ids of the items of a local plan, these items and their table.
    """

    def __init__(self) -> None:
        self.shares: LruCache[bytes, tuple[bytes, RankShare]] = LruCache(_PLANS)
        self.plans: LruCache[tuple[bytes, ...], GlobalPlan] = LruCache(_PLANS)
        self.entries: LruCache[int, Mapping[str, EntryRecord]] = LruCache(_VERSIONS)
        self.trees: LruCache[int, EntryTree] = LruCache(_VERSIONS)
        self.contents: LruCache[bytes, Contents] = LruCache(_VERSIONS)
        self.sent: LruCache[bytes, SentBefore] = LruCache(_PLANS)
        self.gathered: LruCache[bytes, Sequence[SentBefore]] = LruCache(_PLANS)
        # The items are held so that their ids stay theirs.
        self.tables: LruCache[object, tuple[Sequence[WriteItem], PlanTable]] = LruCache(_VERSIONS)


class LocalPlan:
    """One rank's local plan: what the rank sends of it, and which items it then writes.

    Attributes:
        compared: the items that other ranks hold too; known after `take`.
        key: of its share; known after `take`, and b"" if the share is never cached.
        base: the digests to which the coordinator wants the difference; known after `take`.
    """

    def __init__(
        self,
        plan: SavePlan,
        planner: SavePlanner,
        memory: PlanMemory,
        *,
        buffers: Collection[str] = (),
    ) -> None:
        self.compared: list[WriteItem] = []
        self.key = b""
        self.base: SentBefore | None = None
        self._sent: SentBefore | None = None  # offered as base: another save may replace the cached
        self._plan = plan
        self._memory = memory
        self._table = _table_of(plan, planner, memory, buffers) if shares_tables(planner) else None
        self._buffers = buffers
        self._digest = b"" if self._table is None else self._table.digest

    def offer(self, *, whole: bool = False) -> PlanOffer:
        """Return what to send of the plan; with `whole` also the table of a cached plan."""
        if self._table is None:
            return PlanOffer(plan=self._plan, buffers=frozenset(self._buffers))
        key, _ = self._memory.shares.get(self._digest) or (b"", None)
        self._sent = self._memory.sent.get(key) if key else None
        return PlanOffer(
            self._digest,
            key,
            self._table if whole or not key else None,
            base=self._sent.uid if self._sent else "",
        )

    def take(self, reply: PlanReply) -> tuple[SavePlan, Mapping[str, Layout]]:
        """Return what this rank writes, with the layouts of the tensors, and cache its share."""
        if reply.plan is not None:  # made by the caller's planner; such a plan is never cached
            assert reply.layouts is not None
            assert reply.compared is not None
            self.compared = [self._plan.items[i] for i in reply.compared.tolist()]
            return reply.plan, pickle.loads(reply.layouts)
        self.key = reply.key
        if reply.base:
            assert self._sent is not None, f"version {reply.base} was not offered as a base"
            assert self._sent.uid == reply.base, f"{reply.base} was not offered as a base"
            self.base = self._sent
        if reply.layouts is not None:
            assert reply.kept is not None
            assert reply.compared is not None
            share = RankShare(reply.kept, pickle.loads(reply.layouts), reply.compared)
            self._memory.shares.put(self._digest, (reply.key, share))
        else:
            held = self._memory.shares.get(self._digest)
            assert held is not None, f"the reply names share {reply.key!r}, and none is cached"
            assert held[0] == reply.key, f"the reply names {reply.key!r}, cached is {held[0]!r}"
            share = held[1]
        self.compared = [self._plan.items[i] for i in share.compared.tolist()]
        items = [self._plan.items[i] for i in share.kept.tolist()]
        return dataclasses.replace(self._plan, items=items), share.layouts


def _table_of(
    plan: SavePlan, planner: SavePlanner, memory: PlanMemory, buffers: Collection[str]
) -> PlanTable:
    """Return the table of a plan; items that are the same objects as before are not read again."""
    # A subclass may have changed them in place; and of too many, all are new in each save.
    if type(planner) is not DefaultSavePlanner or len(plan.items) > KNOWN_ITEMS:
        return PlanTable.of(plan, buffers)
    key = tuple(map(id, plan.items)), frozenset(buffers)
    held = memory.tables.get(key)
    if held is None:
        table = PlanTable.of(plan, buffers)
        memory.tables.put(key, (plan.items, table))
        return table
    return dataclasses.replace(held[1], paths=pickle.dumps(plan.planner_data))


def shares_tables(planner: SavePlanner) -> TypeGuard[DefaultSavePlanner]:
    """Return True for our own planner: it makes the global plan from tables.

    A planner with its own `create_global_plan` needs the plans in torch's form.
    """
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
    """Return the global plan, and the reply to each rank.

    The plan is None if it is not cached and some ranks left out their tables; the replies then ask
    for them.

    Args:
        offers: by rank.
        memory: the coordinator's; a new plan is added.
        chunk: the repository's defaults.
        parent: the entries of the parent version by FQN, whose grids are kept.
        to_lowest_rank: whether the lowest rank that holds a replica writes it; else the writing is
            spread over the ranks.
        is_whole: whether the offers are those of all ranks; one rank alone may hold parts of
            tensors.

    Raises:
        InvalidInputError: ranks disagree about an FQN or their planners, or the boxes of a tensor
            do not tile its shape.
    """
    if any(offer.plan is not None for offer in offers):
        raise InvalidInputError(
            "some ranks use a planner with a global plan of its own and some do not; pass the same "
            "planner on every rank."
        )
    # The options change the global plan, so they are part of the cache key.
    options = (b"lowest" if to_lowest_rank else b"", b"" if is_whole else b"alone")
    digests = (*(offer.digest for offer in offers), *options)
    plan = memory.plans.get(digests)
    if plan is None:
        tables = [offer.table for offer in offers if offer.table is not None]
        if len(tables) < len(offers):
            return None, [PlanReply()] * len(offers)
        held = GlobalTable.of(tables)
        table = plan_globally(held, to_lowest_rank=to_lowest_rank, is_whole=is_whole)
        plan = GlobalPlan(table, Replicas.of(held), paths=table.paths)
    # The layouts of a cached plan hold as long as the parent's tensors have the same grids.
    if not plan.key or any(
        grids != layout.grids
        for fqn, layout in plan.layouts.items()
        if (grids := kept_grids(parent.get(fqn), layout.dtype, layout.shape))
    ):
        layouts = lay_out(plan.table, chunk=chunk, parent=parent, are_whole=is_whole)
        # A rank sends this key back at the next save, to say which share it holds.
        key = hasher(b"".join(digests) + pickle.dumps(layouts)).digest()
        plan = dataclasses.replace(plan, layouts=layouts, key=key)
        memory.plans.put(digests, plan)
    table, encoded = plan.table, _EncodedLayouts(plan)
    gathered = memory.gathered.get(plan.key)
    base = gathered[0].uid if gathered else ""
    return plan, [
        PlanReply(plan.key, base=base if offer.base == base else "")
        if offer.held == plan.key
        else PlanReply(
            plan.key,
            table.kept(rank),
            encoded.of(table.numbers_of(rank)),
            plan.replicas.of_rank(rank),
        )
        for rank, offer in enumerate(offers)
    ]


class _EncodedLayouts:
    """Pickled layouts, made once for all ranks that write the same tensors."""

    def __init__(self, plan: GlobalPlan) -> None:
        self._plan = plan
        self._made: dict[bytes, bytes] = {}

    def of(self, numbers: Ints) -> bytes:
        """Return the pickled layouts of the tensors with these numbers in the table."""
        key = numbers.tobytes()
        if key not in self._made:
            names = (self._plan.table.names[number] for number in dict.fromkeys(numbers.tolist()))
            self._made[key] = pickle.dumps(
                {name.fqn: self._plan.layouts[name.fqn] for name in names if name.dtype is not None}
            )
        return self._made[key]


def checked_table(plans: Sequence[SavePlan], *, is_whole: bool) -> GlobalTable:
    """Return the table of what all ranks write, from plans in torch's form.

    `is_whole` says whether the plans are those of all ranks.

    Raises:
        InvalidInputError: no catalog can store an FQN, or ranks disagree about one; or, with
            `is_whole`, the boxes of a tensor do not tile its shape.
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
    is_whole: bool,
) -> tuple[GlobalPlan, list[PlanReply]]:
    """Return the plan and the replies, as `reply_to_offers`, if the caller's planner made the plan.

    Args:
        offers: by rank, with its local plan.
        parts: by rank, the plan that is sent to it; with torch's plan cache it may be empty
            (usable=False), if the rank's plan did not change.
        whole: by rank, the full plan that it carries out.
        chunk: the repository's defaults.
        parent: the entries of the parent version by FQN.
        is_whole: whether the plans are those of all ranks.

    Raises:
        InvalidInputError: as `checked_table`.
    """
    table = checked_table(whole, is_whole=is_whole)
    held = GlobalTable.of(
        [PlanTable.of(offer.plan or SavePlan([]), offer.buffers) for offer in offers]
    )
    layouts = lay_out(table, chunk=chunk, parent=parent, are_whole=is_whole)
    plan = GlobalPlan(table, Replicas.of(held), layouts)
    encoded = _EncodedLayouts(plan)
    return plan, [
        PlanReply(
            layouts=encoded.of(table.numbers_of(rank)),
            compared=plan.replicas.of_rank(rank),
            plan=part,
        )
        for rank, part in enumerate(parts)
    ]
