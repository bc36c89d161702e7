"""Our coordinator's planning of one save, alone: what (h) holds against torch's.

It opens what the ranks offer, makes the global plan (replicas shared out, agreement and tiling
checked), lays out chunks, makes the shard index for the catalog, and packs each rank's reply. The
first time ranks offer tables; again, with nothing changed, they offer the digest of theirs and the
key of the share that they hold, and the parent has the chunks that were laid out before.
"""

from __future__ import annotations

import pickle
from dataclasses import replace

from benchmarks.plans import local_plan
from benchmarks.timing import seconds
from dcpstore import ChunkDefaults, DefaultSavePlanner
from dcpstore.core.gc_pause import gc_paused
from dcpstore.records import EntryRecord, TensorRecord
from dcpstore.saving.plan_exchange import (
    GlobalPlan,
    LocalPlan,
    PlanMemory,
    PlanReply,
    reply_to_offers,
)

__all__ = ["Ours"]


class Ours:
    """The offers of so many ranks that hold so many tensors, as they reach the coordinator."""

    def __init__(self, ranks: int, tensors: int) -> None:
        planner = DefaultSavePlanner()
        offers = [
            LocalPlan(local_plan(rank, ranks, tensors), planner, PlanMemory()).offer()
            for rank in range(ranks)
        ]
        self._first = [pickle.dumps(offer) for offer in offers]
        plan, replies = _plan(self._first, PlanMemory(), {})
        self._parent = _entries(plan)
        self._repeated = [
            pickle.dumps(replace(offer, held=reply.key, table=None))
            for offer, reply in zip(offers, replies, strict=True)
        ]

    def measure(self) -> dict[str, float]:
        """Return the seconds that planning takes the first time, and again."""
        memory = PlanMemory()
        with gc_paused():  # as all of a save is
            first = seconds(lambda: _told(_plan(self._first, memory, {})))
            repeated = seconds(lambda: _told(_plan(self._repeated, memory, self._parent)))
        return {"first": first, "repeated": repeated}


def _plan(
    gathered: list[bytes], memory: PlanMemory, parent: dict[str, EntryRecord]
) -> tuple[GlobalPlan, list[PlanReply]]:
    offers = [pickle.loads(data) for data in gathered]
    plan, replies = reply_to_offers(
        offers, memory, chunk=ChunkDefaults(), parent=parent, to_lowest_rank=False
    )
    assert plan is not None, "tables are asked for only where a plan was forgotten"
    return plan, replies


def _told(planned: tuple[GlobalPlan, list[PlanReply]]) -> int:
    """Make the shard index and pack the replies; return the bytes of these."""
    plan, replies = planned
    assert plan.table.record.shards
    return sum(len(pickle.dumps(reply)) for reply in replies)


def _entries(plan: GlobalPlan) -> dict[str, EntryRecord]:
    """Return the entries of a version that was saved by a plan."""
    return {
        fqn: EntryRecord(
            fqn,
            tuple(fqn.split(".")),
            "tensor",
            TensorRecord(i, "", layout.dtype, layout.shape, layout.codec, 0, layout.grids),
        )
        for i, (fqn, layout) in enumerate(plan.layouts.items())
    }
