"""How the tensors of one save are cut and encoded: the coordinator's answer to the global plan.

Invariant: every rank that writes a part of a tensor cuts it by the same grids, so that the chunks
of all ranks together are the tensor (docs/design.md, "Chunks").
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from dcpstore.encoding.codecs import choose_codec
from dcpstore.encoding.dtypes import torch_dtype
from dcpstore.errors import InvalidInputError
from dcpstore.geometry.box_table import steps_of
from dcpstore.geometry.boxes import Box
from dcpstore.geometry.grids import Grid, cover, lay_grids, lay_parts, lay_regular
from dcpstore.planning.plan_table import GlobalTable
from dcpstore.records import ChunkDefaults, EntryRecord

__all__ = ["Layout", "blob_layout", "join_layouts", "kept_grids", "lay_out", "planned_chunks"]


@dataclass(frozen=True, slots=True)
class Layout:
    """The dtype, shape, codec and grids of one tensor; `dtype` is torch's name."""

    dtype: str
    shape: tuple[int, ...]
    codec: str
    grids: tuple[Grid, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _itemsize(self.dtype)

    @property
    def nbytes(self) -> int:
        """Raw bytes of all parts."""
        return sum(math.prod(grid.shape) for grid in self.grids) * self.itemsize


@lru_cache
def _itemsize(dtype: str) -> int:
    """Return the bytes of one element; cached, for it is asked for each chunk."""
    return torch_dtype(dtype).itemsize


def lay_out(
    table: GlobalTable,
    *,
    chunk: ChunkDefaults,
    parent: Mapping[str, EntryRecord],
    are_whole: bool,
) -> dict[str, Layout]:
    """Return the layout of each tensor that is written, by FQN.

    The grids of the `parent` version's entries are kept if they fit the boxes, and dtype and shape
    are the same. `are_whole` is False if the table is not that of all ranks, so that tensors may be
    incomplete; each box of a tensor is then a part with a grid of its own, unless the parent's
    grids are kept.
    """
    live = table.rows.take((table.rows.volumes > 0) & table.is_tensor[table.rows.tensor])
    # In columns, for all tensors at once: a Python loop over the boxes of all ranks is slow.
    steps = steps_of(live, table.shapes).tolist()
    pieces = np.bincount(live.tensor, minlength=len(table.names)).tolist()
    layouts = {}
    for number, (fqn, dtype, shape) in enumerate(table.names):
        if dtype is None:
            continue
        kept = kept_grids(parent.get(fqn), dtype, shape)
        layout = None
        if are_whole:
            cuts = tuple(steps[number][: len(shape)])
            layout = _lay_by_steps(dtype, shape, kept, cuts, pieces=pieces[number], chunk=chunk)
        if layout is None:  # irregular shards, or tensors that may be incomplete
            boxes = table.boxes(table.rows_of(number))
            layout = _lay_by_boxes(dtype, shape, kept, boxes, chunk, are_whole=are_whole)
        layouts[fqn] = layout
    return layouts


def join_layouts(table: GlobalTable, by_rank: Sequence[Mapping[str, Layout]]) -> dict[str, Layout]:
    """Return one layout for each tensor, from the layouts by which each rank has cut it.

    If they differ, each box becomes a part (or several) with the grid by which its rank cut it.
    So the cells stay the same, and the order in which a rank sends them.

    Args:
        table: which rank writes which box.
        by_rank: for each rank, the layouts of what it writes.

    Raises:
        InvalidInputError: ranks encode a tensor by different codecs.
    """
    layouts: dict[str, Layout] = {}
    differing = set()
    for of_rank in by_rank:
        for fqn, layout in of_rank.items():
            if layouts.setdefault(fqn, layout) != layout:
                differing.add(fqn)
    for number, name in enumerate(table.names):
        if name.fqn not in differing:
            continue
        rows = table.rows_of(number)
        cut = [by_rank[rank][name.fqn] for rank in table.rank[rows].tolist()]
        if len({layout.codec for layout in cut}) > 1:
            raise InvalidInputError(
                f"{name.fqn!r} is planned with codecs {sorted({c.codec for c in cut})}, because a "
                "plan that torch has cached is for another repository; use a planner class for "
                "each repository, or leave out enable_plan_caching."
            )
        parts = tuple(
            Grid(shared.offsets, shared.sizes, grid.chunk_shape)
            for layout, box in zip(cut, table.boxes(rows), strict=True)
            for grid in layout.grids
            if (shared := grid.box.intersect(box)) is not None
        )
        layouts[name.fqn] = replace(cut[0], grids=parts)
    return layouts


@lru_cache(4096)
def _lay_by_steps(
    dtype: str,
    shape: tuple[int, ...],
    kept: tuple[Grid, ...],
    steps: tuple[int, ...],
    *,
    pieces: int,
    chunk: ChunkDefaults,
) -> Layout | None:
    """Return the layout of a whole tensor if one grid fits all its boxes; the steps show that.

    It is cached: thousands of tensors have few different layouts, and pickle sends an object that
    occurs many times only once.

    Args:
        dtype: of the tensor, torch's name.
        shape: of the tensor.
        kept: the grids of the parent's tensor.
        steps: for each dimension, the largest step of which every boundary between boxes is a
            multiple; 0 if there is no boundary.
        pieces: how many boxes with elements are written.
        chunk: the repository's defaults.
    """
    itemsize = torch_dtype(dtype).itemsize
    grid = None
    if len(kept) == 1 and kept[0].fits(shape, steps):
        grid = kept[0]
    elif len(kept) < 2:  # whether several kept grids fit, only the boxes show
        grid = lay_regular(shape, itemsize, steps, pieces=pieces, target=chunk.nbytes)
    if grid is None:
        return None
    return Layout(dtype, shape, choose_codec(chunk.codec, dtype), (grid,))


def _lay_by_boxes(
    dtype: str,
    shape: tuple[int, ...],
    kept: tuple[Grid, ...],
    boxes: Sequence[Box],
    chunk: ChunkDefaults,
    *,
    are_whole: bool,
) -> Layout:
    """Return the layout of a tensor from each of its boxes: slower, but for any boxes."""
    itemsize, target = torch_dtype(dtype).itemsize, chunk.nbytes
    if are_whole:
        grids = lay_grids(shape, itemsize, boxes, target=target, parent=kept)
    elif cover(kept, shape) and all(g.holds_whole_cells(box) for box in boxes for g in kept):
        grids = kept
    else:
        grids = lay_parts(itemsize, boxes, target=target)
    return Layout(dtype, shape, choose_codec(chunk.codec, dtype), grids)


def blob_layout(nbytes: int, chunk: ChunkDefaults) -> Layout:
    """Return the layout of a blob of `nbytes`, which is stored as a tensor of bytes."""
    return Layout(
        dtype="uint8",
        shape=(nbytes,),
        codec=choose_codec(chunk.codec, "uint8"),
        grids=lay_grids((nbytes,), 1, [Box.whole((nbytes,))], target=chunk.nbytes),
    )


def planned_chunks(layout: Layout, box: Box) -> Iterator[tuple[int, int]]:
    """Yield (part, ordinal) of each chunk inside `box`, which begins and ends on grid lines."""
    for part, grid in enumerate(layout.grids):
        for first, last in grid.ranges(box):
            for ordinal in range(first, last + 1):
                yield part, ordinal


def kept_grids(before: EntryRecord | None, dtype: str, shape: tuple[int, ...]) -> tuple[Grid, ...]:
    """Return the grids of a parent's entry if it is a tensor of this dtype and shape."""
    tensor = None if before is None or before.kind != "tensor" else before.tensor
    if tensor is None or tensor.dtype != dtype or tensor.shape != shape:
        return ()
    return tensor.parts
