"""Makes the global plan of a save: checks it, and assigns each replicated item to one rank.

Invariants: the boxes of each tensor lie inside its shape and tile it; an FQN is the same tensor on
all ranks (design, invariant 4); the catalog can store that FQN. An error names the FQN and the
ranks. Exactly one rank writes each item, and that rank holds its data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from dcpstore.catalog.validation import check_key
from dcpstore.encoding.dtypes import MOST_DIMS
from dcpstore.errors import InvalidInputError
from dcpstore.geometry.box_table import Ints, find_crowded, first_equal
from dcpstore.geometry.boxes import Box, find_overlap
from dcpstore.planning.plan_table import GlobalTable, Named

__all__ = [
    "check_agreement",
    "check_names",
    "check_results",
    "check_tiling",
    "plan_globally",
    "share_out",
]

_SHOWN = 8  # problems listed in one message; a longer list would hide the first


def plan_globally(
    table: GlobalTable, *, to_lowest_rank: bool, is_whole: bool = True
) -> GlobalTable:
    """Return the rows of the joined plans that are written, each by one rank.

    Args:
        table: the local plans of the ranks, joined.
        to_lowest_rank: as for `share_out`.
        is_whole: whether the table holds the plans of all ranks, so that its boxes must tile each
            shape.

    Raises:
        InvalidInputError: ranks disagree about an FQN, its boxes do not tile its shape, or the
            catalog cannot store it.
    """
    check_names(table)
    check_agreement(table)
    table = share_out(_without_empty(table), to_lowest_rank=to_lowest_rank)
    if is_whole:
        check_tiling(table)
    return table


def share_out(table: GlobalTable, *, to_lowest_rank: bool = False) -> GlobalTable:
    """Return the rows that are written: of a replicated item, the row of one rank.

    The bytes of items that only one rank holds are counted first. Replicas are then assigned,
    largest first, to the holder with the fewest bytes so far (longest processing time first: Graham
    1969, at most 4/3 of the optimum). Values and module buffers always go to the lowest rank that
    holds them, and with `to_lowest_rank` all replicas do.
    """
    first = first_equal(table.rows)
    holders = np.bincount(first, minlength=len(first))  # counted at the first row of each group
    is_single = holders[first] == 1
    if is_single.all():
        return table
    # Buffers may differ between ranks. The mean and the variance of one batch norm must come from
    # the same rank, so buffers are not spread over the ranks.
    is_bound = np.zeros(len(first), bool)
    is_bound[first[table.is_buffer | ~table.is_tensor[table.rows.tensor]]] = True
    loads = np.zeros(table.ranks, np.int64)
    np.add.at(loads, table.rank[is_single], table.nbytes[is_single])
    leaders = np.flatnonzero(holders > 1)
    leaders = leaders[np.argsort(-table.nbytes[leaders], kind="stable")]
    order = np.argsort(first, kind="stable")  # the rows of each group together, by rank
    starts = np.searchsorted(first[order], leaders)
    writer = np.full(len(first), -1)  # set at the first row of each replicated group
    for leader, start in zip(leaders.tolist(), starts.tolist(), strict=True):
        ranks = table.rank[order[start : start + holders[leader]]]
        chosen = ranks[0 if to_lowest_rank or is_bound[leader] else loads[ranks].argmin()]
        loads[chosen] += table.nbytes[leader]
        writer[leader] = chosen
    return table.take(np.flatnonzero(is_single | (writer[first] == table.rank)))


def check_names(table: GlobalTable) -> None:
    """Check that the catalog can store the FQN and the shape of each planned item.

    The catalog checks this again at commit, but by then chunks and a manifest have been written.

    Raises:
        InvalidInputError: it cannot; the error names the FQN.
    """
    for name in table.names:
        check_key(name.fqn, what="FQN")
        if len(name.shape) > MOST_DIMS:
            raise InvalidInputError(
                f"{name.fqn!r}: a tensor of {len(name.shape)} dimensions has more than "
                f"{MOST_DIMS}; reshape it."
            )


def check_agreement(table: GlobalTable) -> None:
    """Check that an FQN has the same kind, dtype and shape on all ranks that hold it.

    Raises:
        InvalidInputError: they differ; the error says for each FQN what it is on which ranks.
    """
    numbers_of: dict[str, list[int]] = {}
    for number, name in enumerate(table.names):
        numbers_of.setdefault(name.fqn, []).append(number)
    problems = []
    for fqn, numbers in sorted(numbers_of.items()):
        if len(numbers) > 1:
            kinds = ", ".join(
                f"{_described(table.names[number])} on {_ranks(table.rank[table.rows_of(number)])}"
                for number in numbers
            )
            problems.append(f"{fqn!r} is {kinds}")
    _raise_if(problems, "the ranks disagree; give every rank the same model and the same state")


def check_tiling(table: GlobalTable) -> None:
    """Check that the boxes of each tensor are inside its shape, do not overlap, and fill it.

    A value must be written by one rank only.

    Raises:
        InvalidInputError: naming each problem with its FQN and ranks.
    """
    problems = (_problem(table, number) for number in _suspects(table))
    _raise_if(
        [problem for problem in problems if problem is not None],
        "the shards of a tensor must tile it; check the mesh and the placements",
    )


def check_results(
    metadata: Metadata, results: Sequence[Sequence[WriteResult]], table: GlobalTable
) -> None:
    """Check that every item of the plan was written, and nothing else (design, invariant 4).

    Raises:
        InvalidInputError: naming the rank, or what no rank wrote.
    """
    for rank, given in enumerate(results):
        planned = sorted(table.names[number].fqn for number in table.numbers_of(rank))
        if sorted(result.index.fqn for result in given) != planned:
            raise InvalidInputError(
                f"rank {rank} returned {len(given)} results for {len(planned)} planned items; the "
                "results must be those of the plan, item by item."
            )
    written = {result.index.fqn for given in results for result in given}
    missing = sorted(metadata.state_dict_metadata.keys() - written)
    if missing:
        raise InvalidInputError(
            f"no rank wrote {missing[:_SHOWN]} ({len(missing)} in all), which the plan contains; "
            "every planned item must be written by one rank."
        )


def _without_empty(table: GlobalTable) -> GlobalTable:
    """Drop empty boxes, unless no rank holds an element of the tensor."""
    is_live = table.rows.volumes > 0
    is_held = np.bincount(table.rows.tensor[is_live], minlength=len(table.names)) > 0
    kept = is_live | ~is_held[table.rows.tensor]
    return table if kept.all() else table.take(np.flatnonzero(kept))


def _suspects(table: GlobalTable) -> list[int]:
    """Return the numbers of the names whose items may be wrong; all others are certainly right.

    The whole table is checked at once; only suspects are then checked box by box.
    """
    rows, count = table.rows, len(table.names)
    written = np.bincount(rows.tensor, minlength=count)
    shapes = table.shapes[rows.tensor]
    is_outside = ((rows.offsets < 0) | (rows.sizes < 0) | (rows.offsets + rows.sizes > shapes)).any(
        axis=1
    )
    if is_outside.any():
        return [int(number) for number in np.unique(rows.tensor[is_outside])]
    volumes = np.zeros(count, np.int64)
    np.add.at(volumes, rows.tensor, rows.volumes)
    suspect = np.where(table.is_tensor, volumes != table.shapes.prod(axis=1), written > 1)
    live = table.is_tensor[rows.tensor] & (rows.volumes > 0)
    suspect[find_crowded(rows.take(live), table.shapes)] = True
    return [int(number) for number in np.flatnonzero(suspect & (written > 0))]


def _problem(table: GlobalTable, number: int) -> str | None:
    name, rows = table.names[number], table.rows_of(number)
    ranks = table.rank[rows].tolist()
    if name.dtype is None:
        return f"value {name.fqn!r} is planned by {_ranks(ranks)}" if len(ranks) > 1 else None
    shape, boxes = name.shape, table.boxes(rows)
    for rank, box in zip(ranks, boxes, strict=True):
        if any(
            o < 0 or s < 0 or o + s > n
            for o, s, n in zip(box.offsets, box.sizes, shape, strict=True)
        ):
            return f"{name.fqn!r} of shape {shape}: {_box(box)} of rank {rank} is partly outside"
    overlap = find_overlap(boxes)
    if overlap is not None:
        a, b = overlap
        return (
            f"{name.fqn!r} of shape {shape}: {_box(boxes[a])} of rank {ranks[a]} overlaps "
            f"{_box(boxes[b])} of rank {ranks[b]}"
        )
    volume = sum(box.volume for box in boxes)
    if volume != math.prod(shape):
        return (
            f"{name.fqn!r} of shape {shape}: {_ranks(ranks)} hold {volume} of {math.prod(shape)} "
            "elements"
        )
    return None


def _described(name: Named) -> str:
    return "a value" if name.dtype is None else f"{name.dtype} {name.shape}"


def _box(box: Box) -> str:
    return f"the box at {box.offsets} of sizes {box.sizes}"


def _ranks(ranks: Iterable[int] | Ints) -> str:
    distinct = sorted({int(rank) for rank in ranks})
    return ("rank " if len(distinct) == 1 else "ranks ") + ", ".join(map(str, distinct))


def _raise_if(problems: Sequence[str], next_step: str) -> None:
    if problems:
        more = len(problems) - _SHOWN
        tail = f"; and {more} more" if more > 0 else ""
        raise InvalidInputError(f"{'; '.join(problems[:_SHOWN])}{tail}: {next_step}.")
