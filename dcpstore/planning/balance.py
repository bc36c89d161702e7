"""Who writes what: each replicated item once, spread over the ranks that hold it.

Invariant: every item stays with a rank that holds its data, and exactly one rank keeps it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from torch.distributed.checkpoint.planner import SavePlan, WriteItem

__all__ = ["item_nbytes", "share_out"]


def item_nbytes(item: WriteItem) -> int:
    """Return the bytes that an item writes: those of its local box, 0 for a value."""
    if item.tensor_data is None:
        return 0
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def share_out(plans: Sequence[SavePlan], *, to_lowest_rank: bool = False) -> list[SavePlan]:
    """Return the plans, by rank, with every replicated item left on one rank.

    What only one rank holds counts first. Replicas then go, largest first, to the holder with the
    fewest bytes so far (longest processing time first: Graham 1969, within 4/3 of the best); or all
    to the lowest rank that holds them.
    """
    holders: dict[object, list[int]] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            holders.setdefault(_key(item), []).append(rank)
    loads = [0] * len(plans)
    writer: dict[object, int] = {}
    replicated: list[tuple[int, object, list[int]]] = []
    for rank, plan in enumerate(plans):
        for item in plan.items:
            key = _key(item)
            if len(holders[key]) == 1:
                loads[rank] += item_nbytes(item)
            elif holders[key][0] == rank:
                replicated.append((item_nbytes(item), key, holders[key]))
    for nbytes, key, ranks in sorted(replicated, key=lambda entry: -entry[0]):
        chosen = ranks[0] if to_lowest_rank else min(ranks, key=loads.__getitem__)
        loads[chosen] += nbytes
        writer[key] = chosen
    return [
        dataclasses.replace(
            plan, items=[item for item in plan.items if writer.get(_key(item), rank) == rank]
        )
        for rank, plan in enumerate(plans)
    ]


def _key(item: WriteItem) -> object:
    """Return what two items share exactly when they write the same elements."""
    if item.tensor_data is None:
        return item.index.fqn
    chunk = item.tensor_data.chunk
    return item.index.fqn, tuple(chunk.offsets), tuple(chunk.sizes)
