"""How the tensors of one save are cut and encoded: the coordinator's answer to the global plan.

Invariant: every rank that writes a part of a tensor cuts it by the same grids, so that what they
wrote together is the tensor (design, section 4, "Chunks").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dcpstore.encoding.codecs import choose_codec
from dcpstore.encoding.dtypes import torch_dtype
from dcpstore.errors import InvalidInputError
from dcpstore.geometry.boxes import Box
from dcpstore.geometry.grids import Grid, cover, lay_grids, lay_parts, lay_regular
from dcpstore.geometry.tables import steps_of
from dcpstore.planning.tables import GlobalTable
from dcpstore.records import ChunkDefaults, EntryRecord

__all__ = [
    "Layout",
    "blob_layout",
    "join_layouts",
    "kept_grids",
    "lay_out",
    "planned_chunks",
]


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
        return torch_dtype(self.dtype).itemsize


def lay_out(
    table: GlobalTable,
    *,
    chunk: ChunkDefaults,
    parent: Mapping[str, EntryRecord],
    are_whole: bool = True,
) -> dict[str, Layout]:
    """Return the layout of each tensor that is written, by FQN.

    The grids of the `parent` version's entries are kept where dtype and shape are still the same
    and they fit. Of tensors that are not whole, for the table is not that of all ranks, each box is
    a part where they do not.
    """
    live = table.rows.take((table.rows.volumes > 0) & table.is_tensor[table.rows.tensor])
    steps = steps_of(live, table.shapes).tolist()
    pieces = np.bincount(live.tensor, minlength=len(table.names)).tolist()
    layouts = {}
    alike: dict[Layout, Layout] = {}  # one of each: thousands of tensors have few, and they travel
    for number, name in enumerate(table.names):
        if name.dtype is None:
            continue
        kept = kept_grids(parent.get(name.fqn), name.dtype, name.shape)
        if are_whole:
            grids = _grids(
                table,
                number,
                steps=tuple(steps[number][: len(name.shape)]),
                pieces=pieces[number],
                kept=kept,
                target=chunk.nbytes,
            )
        else:
            boxes = table.boxes(table.rows_of(number))
            fit = cover(kept, name.shape) and all(
                grid.holds_whole_cells(box) for box in boxes for grid in kept
            )
            grids = kept if fit else lay_parts(name.itemsize, boxes, target=chunk.nbytes)
        codec = choose_codec(chunk.codec, name.dtype)
        layout = Layout(name.dtype, name.shape, codec, grids)
        layouts[name.fqn] = alike.setdefault(layout, layout)
    return layouts


def join_layouts(table: GlobalTable, told: Sequence[Mapping[str, Layout]]) -> dict[str, Layout]:
    """Return the layouts by which all ranks cut together, of those by which each did.

    Where they differ, each box is parts of its own, cut as its rank cut it: so they do not change
    which cells there are, or the order in which a rank tells of them.

    Args:
        table: who writes which box.
        told: by rank, the layouts of what it writes.

    Raises:
        InvalidInputError: ranks encode a tensor by different codecs.
    """
    layouts: dict[str, Layout] = {}
    differing = set()
    for mine in told:
        for fqn, layout in mine.items():
            if layouts.setdefault(fqn, layout) != layout:
                differing.add(fqn)
    for number, name in enumerate(table.names):
        if name.fqn not in differing:
            continue
        rows = table.rows_of(number)
        cut = [told[rank][name.fqn] for rank in table.rank[rows].tolist()]
        if len({layout.codec for layout in cut}) > 1:
            raise InvalidInputError(
                f"{name.fqn!r} is planned by codecs {sorted({c.codec for c in cut})}, for a plan "
                "that torch kept comes from another repository; use a planner class of its own "
                "for each, or leave out enable_plan_caching."
            )
        parts = tuple(
            Grid(shared.offsets, shared.sizes, grid.chunk_shape)
            for layout, box in zip(cut, table.boxes(rows), strict=True)
            for grid in layout.grids
            if (shared := grid.box.intersect(box)) is not None
        )
        layouts[name.fqn] = replace(cut[0], grids=parts)
    return layouts


def _grids(
    table: GlobalTable,
    number: int,
    *,
    steps: tuple[int, ...],
    pieces: int,
    kept: Sequence[Grid],
    target: int,
) -> tuple[Grid, ...]:
    """Return what `lay_grids` does, and look at single boxes only where the columns cannot tell."""
    name = table.names[number]
    if len(kept) == 1 and kept[0].meets(name.shape, steps):
        return tuple(kept)
    if len(kept) < 2:
        grid = lay_regular(name.shape, name.itemsize, steps, pieces=pieces, target=target)
        if grid is not None:
            return (grid,)
    boxes = table.boxes(table.rows_of(number))
    return lay_grids(name.shape, name.itemsize, boxes, target=target, parent=kept)


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
    """Return the grids of an entry of the parent, where it is a tensor of this dtype and shape."""
    tensor = None if before is None or before.kind != "tensor" else before.tensor
    if tensor is None or tensor.dtype != dtype or tensor.shape != shape:
        return ()
    return tensor.parts
