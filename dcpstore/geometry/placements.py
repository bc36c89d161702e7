"""Placements of a tensor on ranks: the boxes that one rank holds, from the splits of the tensor.

Mesh dimensions split a tensor dimension one after another, left to right. A split is plain
(`Shard`: n runs of ceil(size / n) elements) or strided (`_StridedShard`, FSDP over TP: first into
`factor` pieces, then each piece into n runs; the rank holds one run of each piece). The formulas
are those of `torch.distributed.tensor.placement_types`; a test compares the results with torch's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from dcpstore.geometry.boxes import Box

__all__ = ["Split", "local_boxes"]

Run = tuple[int, int]  # start and stop of consecutive elements; stop is excluded


@dataclass(frozen=True, slots=True)
class Split:
    """The split of tensor dimension `dim` by one mesh dimension of `count` ranks.

    This rank is number `index` of them. `factor` is the split factor of a strided shard, 1 for a
    plain one.
    """

    dim: int
    count: int
    index: int
    factor: int = 1


def local_boxes(shape: Sequence[int], splits: Sequence[Split]) -> list[tuple[Box, Box]]:
    """Return (global box, box inside the local tensor) for each box that one rank holds.

    A contiguous shard gives one pair, an empty shard none.
    """
    runs: list[list[Run]] = [[(0, n)] for n in shape]
    for split in splits:  # each cuts what the splits before it have left to this rank
        pieces = _cut(runs[split.dim], split.factor)
        ours = [_cut(piece, split.count)[split.index] for piece in pieces]
        runs[split.dim] = _join([run for piece in ours for run in piece])
    pairs = []
    for chosen in itertools.product(*(_placed(r) for r in runs)):
        sizes = tuple(stop - start for (start, stop), _ in chosen)
        if all(sizes):
            offsets = tuple(start for (start, _), _ in chosen)
            # The local tensor holds the runs of a dimension one after another.
            pairs.append((Box(offsets, sizes), Box(tuple(at for _, at in chosen), sizes)))
    return pairs


def _cut(runs: Sequence[Run], count: int) -> list[list[Run]]:
    """Split the elements of `runs` into `count` pieces of ceil(size / count) or fewer."""
    total = sum(stop - start for start, stop in runs)
    size = -(-total // count)
    return [_slice(runs, i * size, min((i + 1) * size, total)) for i in range(count)]


def _slice(runs: Sequence[Run], first: int, last: int) -> list[Run]:
    """Return the runs of the elements `first` to `last` (excluded), counted along `runs`."""
    taken = []
    at = 0
    for start, stop in runs:
        low, high = max(first - at, 0), min(last - at, stop - start)
        if low < high:
            taken.append((start + low, start + high))
        at += stop - start
    return taken


def _join(runs: Sequence[Run]) -> list[Run]:
    """Merge runs that continue one another."""
    joined: list[Run] = []
    for start, stop in runs:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _placed(runs: Sequence[Run]) -> list[tuple[Run, int]]:
    """Pair each run with its first position inside the local tensor."""
    starts = itertools.accumulate((stop - start for start, stop in runs), initial=0)
    return list(zip(runs, starts, strict=False))
