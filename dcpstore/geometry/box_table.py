"""Boxes in columns: those of a thousand ranks and a thousand tensors as a few arrays.

Which boxes are equal, which overlap, where their boundaries are: each question is answered by one
or two sorts, without a Python object for each box. Invariant: columns past a tensor's own
dimensions have offset 0 and size 1, which changes no volume and no answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from dcpstore.geometry.boxes import Box
from dcpstore.geometry.grids import Grid

__all__ = ["BoxTable", "GridTable", "Ints", "find_crowded", "first_equal", "padded", "steps_of"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class BoxTable:
    """Boxes of many tensors, one row a box; all in elements.

    Attributes:
        tensor: [rows], the number of the tensor that a box belongs to.
        offsets: [rows, dims].
        sizes: [rows, dims].
    """

    tensor: Ints
    offsets: Ints
    sizes: Ints

    @classmethod
    def of(cls, tensors: Sequence[int], boxes: Sequence[Box]) -> BoxTable:
        """Return boxes in columns, with as many dimensions as the box that has most."""
        dims = max((len(box.sizes) for box in boxes), default=0)
        return cls(
            np.array(tensors, np.int64),
            padded([box.offsets for box in boxes], dims, 0),
            padded([box.sizes for box in boxes], dims, 1),
        )

    @classmethod
    def joined(cls, tables: Sequence[BoxTable]) -> BoxTable:
        """Return the rows of all tables, one table after another."""
        dims = max((table.dims for table in tables), default=0)
        return cls(
            np.concatenate([table.tensor for table in tables]),
            np.concatenate([_widened(table.offsets, dims, 0) for table in tables]),
            np.concatenate([_widened(table.sizes, dims, 1) for table in tables]),
        )

    @property
    def dims(self) -> int:
        """The number of dimensions of each row."""
        return int(self.offsets.shape[1])

    @property
    def volumes(self) -> Ints:
        """The number of elements in each box."""
        volumes: Ints = self.sizes.prod(axis=1)
        return volumes

    def __len__(self) -> int:
        return len(self.tensor)

    def take(self, rows: npt.NDArray[np.generic]) -> BoxTable:
        """Return these rows (numbers, or a mask)."""
        return BoxTable(self.tensor[rows], self.offsets[rows], self.sizes[rows])

    def boxes(self, rows: npt.NDArray[np.generic], dims: int) -> list[Box]:
        """Return these rows as boxes of a tensor of `dims` dimensions."""
        offsets, sizes = self.offsets[rows, :dims].tolist(), self.sizes[rows, :dims].tolist()
        return [Box(tuple(o), tuple(s)) for o, s in zip(offsets, sizes, strict=True)]


def padded(tuples: Sequence[Sequence[int]], dims: int, fill: int) -> Ints:
    """Return tuples as rows of `dims` columns, `fill` past the end of each."""
    lengths = np.fromiter(map(len, tuples), np.int64, len(tuples))
    rows = np.full((len(tuples), dims), fill, np.int64)
    rows[np.arange(dims) < lengths[:, None]] = np.fromiter(chain.from_iterable(tuples), np.int64)
    return rows


def first_equal(table: BoxTable) -> Ints:
    """Return for each row the number of the first row with the same box of the same tensor."""
    order = np.lexsort((*table.sizes.T, *table.offsets.T, table.tensor))
    is_new = _differs(order, table.tensor, *table.offsets.T, *table.sizes.T)
    first = np.empty(len(table), np.int64)
    # The sort is stable: the first of several equal rows comes first in `order` too.
    first[order] = order[is_new][np.cumsum(is_new) - 1]
    return first


def find_crowded(table: BoxTable, shapes: Ints) -> Ints:
    """Return the tensors whose boxes may overlap; the boxes of all others certainly do not.

    Two different boxes cannot overlap if their intervals are equal or disjoint in each dimension:
    then they are cells of one grid. The few tensors with other boxes are for `find_overlap`.

    Args:
        table: boxes that hold elements, inside their shapes.
        shapes: [tensors, dims].
    """
    crowded = np.zeros(len(shapes), bool)
    rows = np.bincount(table.tensor, minlength=len(shapes))
    for dim in range(table.dims):
        # Boxes that span the whole dimension have equal intervals, but overlap all others.
        is_whole = table.sizes[:, dim] == shapes[table.tensor, dim]
        wholes = np.bincount(table.tensor[is_whole], minlength=len(shapes))
        crowded |= (wholes > 0) & (wholes < rows)
        if is_whole.all():
            continue
        tensor, start, size = (
            column[~is_whole]
            for column in (table.tensor, table.offsets[:, dim], table.sizes[:, dim])
        )
        order = np.lexsort((size, start, tensor))
        order = order[_differs(order, tensor, start, size)]
        tensor, start, stop = tensor[order], start[order], (start + size)[order]
        overlaps = (tensor[1:] == tensor[:-1]) & (stop[:-1] > start[1:])
        crowded[tensor[1:][overlaps]] = True
    equal = first_equal(table) != np.arange(len(table))
    crowded[table.tensor[equal]] = True
    return np.flatnonzero(crowded)


def steps_of(table: BoxTable, shapes: Ints) -> Ints:
    """Return [tensors, dims]: the largest step such that all inner boundaries are multiples of it.

    It is 0 in a dimension without an inner boundary.

    Args:
        table: boxes that hold elements, inside their shapes.
        shapes: [tensors, dims].
    """
    steps = np.zeros_like(shapes)
    if not len(table):
        return steps
    order = np.argsort(table.tensor, kind="stable")
    tensor, offsets = table.tensor[order], table.offsets[order]
    stops = offsets + table.sizes[order]
    # The end of the tensor is not an inner boundary; 0 leaves it out, since gcd(x, 0) = x.
    inner = np.where(stops == shapes[tensor], 0, stops)
    starts = np.flatnonzero(np.diff(tensor, prepend=-1))
    steps[tensor[starts]] = np.gcd.reduceat(np.gcd(offsets, inner), starts, axis=0)
    return steps


@dataclass(frozen=True, slots=True, eq=False)
class GridTable:
    """Grids in columns, one row a grid; all in elements.

    Attributes:
        offsets, counts, chunk: [grids, dims], where the part begins, its number of cells in each
            dimension, and the shape of a cell.
    """

    offsets: Ints
    counts: Ints
    chunk: Ints

    @classmethod
    def of(cls, grids: Sequence[Grid], dims: int) -> GridTable:
        """Return grids of at most `dims` dimensions in columns."""
        chunk = padded([grid.chunk_shape for grid in grids], dims, 1)
        counts = -(-padded([grid.shape for grid in grids], dims, 1) // chunk)
        return cls(padded([grid.offsets for grid in grids], dims, 0), counts, chunk)

    @property
    def sizes(self) -> Ints:
        """The number of cells of each grid."""
        sizes: Ints = self.counts.prod(axis=1)
        return sizes

    def cells(self, table: BoxTable) -> tuple[Ints, Ints]:
        """Return (row, ordinal) of each cell that a box intersects, by row, ordinals ascending.

        Args:
            table: boxes that hold elements, each inside the grid whose number is its tensor.
        """
        counts, chunk = self.counts[table.tensor], self.chunk[table.tensor]
        begin = table.offsets - self.offsets[table.tensor]
        first = begin // chunk
        extent = (begin + table.sizes - 1) // chunk - first + 1
        number = extent.prod(axis=1)
        row = np.repeat(np.arange(len(table)), number)
        # For each pair its position within its row, then row-major decoding, all rows at once.
        rest = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)
        ordinal = np.zeros_like(rest)
        weight = np.ones_like(rest)
        for dim in reversed(range(table.dims)):
            rest, inside = np.divmod(rest, extent[row, dim])
            ordinal += (first[row, dim] + inside) * weight
            weight *= counts[row, dim]
        return row, ordinal


def _differs(order: Ints, *columns: Ints) -> npt.NDArray[np.bool_]:
    """Tell for each row, in this order, whether it differs from the row before (the first does)."""
    is_new = np.zeros(len(order), bool)
    is_new[:1] = True
    for column in columns:
        ordered = column[order]
        is_new[1:] |= ordered[1:] != ordered[:-1]
    return is_new


def _widened(column: Ints, dims: int, fill: int) -> Ints:
    more = dims - column.shape[1]
    return np.pad(column, ((0, 0), (0, more)), constant_values=fill) if more else column
