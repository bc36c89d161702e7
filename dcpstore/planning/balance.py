"""Which rank writes what: each replicated item once, spread over the ranks that hold it.

Invariant: every item stays with a rank that holds its data, and exactly one rank keeps it. Values
and module buffers all stay with the lowest rank that holds them, so that what belongs together (the
mean and the variance of a batch norm) comes from one rank, even if the ranks differ.
"""

from __future__ import annotations

import math

import numpy as np
from torch.distributed.checkpoint.planner import (
    WriteItem,
)

from dcpstore.geometry.box_table import first_equal
from dcpstore.planning.plan_table import GlobalTable

__all__ = ["item_nbytes", "share_out"]


def item_nbytes(item: WriteItem) -> int:
    """Return the bytes that an item writes: those of its local box, 0 for a value."""
    if item.tensor_data is None:
        return 0
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def share_out(table: GlobalTable, *, to_lowest_rank: bool = False) -> GlobalTable:
    """Return the rows that are written: of every replicated item, that of one rank.

    What only one rank holds counts first. Replicas then go, largest first, to the holder with the
    fewest bytes so far (longest processing time first: Graham 1969, within 4/3 of the best); or all
    to the lowest rank that holds them, as values and buffers do always.
    """
    first = first_equal(table.rows)
    holders = np.bincount(first, minlength=len(first))  # at the first of each group
    is_single = holders[first] == 1
    if is_single.all():
        return table
    is_bound = np.zeros(len(first), bool)
    is_bound[first[table.is_buffer | ~table.is_tensor[table.rows.tensor]]] = True
    loads = np.zeros(table.ranks, np.int64)
    np.add.at(loads, table.rank[is_single], table.nbytes[is_single])
    leaders = np.flatnonzero(holders > 1)
    leaders = leaders[np.argsort(-table.nbytes[leaders], kind="stable")]
    order = np.argsort(first, kind="stable")  # the rows of each group together, by rank
    starts = np.searchsorted(first[order], leaders)
    writer = np.full(len(first), -1)  # at the first of each replicated group
    for leader, start in zip(leaders.tolist(), starts.tolist(), strict=True):
        ranks = table.rank[order[start : start + holders[leader]]]
        chosen = ranks[0 if to_lowest_rank or is_bound[leader] else loads[ranks].argmin()]
        loads[chosen] += table.nbytes[leader]
        writer[leader] = chosen
    return table.take(np.flatnonzero(is_single | (writer[first] == table.rank)))
