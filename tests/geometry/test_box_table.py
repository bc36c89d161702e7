"""Boxes in columns: every answer is the same as for single boxes."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpstore.geometry.box_table import (
    BoxTable,
    GridTable,
    find_crowded,
    first_equal,
    padded,
    steps_of,
)
from dcpstore.geometry.boxes import Box, find_overlap
from dcpstore.geometry.grids import Grid

SHAPES = st.lists(st.integers(1, 6), max_size=3).map(tuple)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], list[int], list[Box]]:
    """Return shapes, and boxes with elements inside them."""
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=4))
    numbers, boxes = [], []
    for _ in range(draw(st.integers(1, 12))):
        number = draw(st.integers(0, len(shapes) - 1))
        ends = [
            sorted(draw(st.sets(st.integers(0, n), min_size=2, max_size=2))) for n in shapes[number]
        ]
        numbers.append(number)
        boxes.append(Box(tuple(a for a, _ in ends), tuple(b - a for a, b in ends)))
    return shapes, numbers, boxes


@given(tensors())
@settings(deadline=None)
def test_columns_give_the_same_answers_as_boxes(
    given: tuple[list[tuple[int, ...]], list[int], list[Box]],
) -> None:
    shapes, numbers, boxes = given
    table = BoxTable.of(numbers, boxes)
    whole = padded(shapes, table.dims, 1) if table.dims >= max(map(len, shapes)) else None
    pairs = list(zip(numbers, boxes, strict=True))
    assert table.volumes.tolist() == [box.volume for box in boxes]
    assert first_equal(table).tolist() == [pairs.index(pair) for pair in pairs]
    if whole is None:
        return
    crowded = set(find_crowded(table, whole).tolist())
    steps = steps_of(table, whole)
    for number, shape in enumerate(shapes):
        mine = [box for n, box in pairs if n == number]
        if find_overlap(mine) is not None:
            assert number in crowded
        for dim, n in enumerate(shape):
            cuts = {box.offsets[dim] for box in mine} | {box.stops[dim] for box in mine}
            assert steps[number, dim] == math.gcd(*(cuts - {0, n}))


@given(tensors(), st.data())
@settings(deadline=None)
def test_the_cells_of_boxes_are_those_of_the_grid(
    given: tuple[list[tuple[int, ...]], list[int], list[Box]], data: st.DataObject
) -> None:
    shapes, numbers, boxes = given
    grids = [
        Grid((0,) * len(shape), shape, tuple(data.draw(st.integers(1, n)) for n in shape))
        for shape in shapes
    ]
    table = BoxTable.of(numbers, boxes)
    dims = max(table.dims, *map(len, shapes))
    wide = BoxTable(
        table.tensor,
        padded([box.offsets for box in boxes], dims, 0),
        padded([box.sizes for box in boxes], dims, 1),
    )
    columns = GridTable.of(grids, dims)
    assert columns.sizes.tolist() == [grid.size for grid in grids]
    row, ordinal = columns.cells(wide)
    assert list(zip(row.tolist(), ordinal.tolist(), strict=True)) == [
        (i, cell)
        for i, (number, box) in enumerate(zip(numbers, boxes, strict=True))
        for first, last in grids[number].ranges(box)
        for cell in range(first, last + 1)
    ]


def test_a_grid_is_not_crowded() -> None:
    cells = [Box((i, j), (2, 3)) for i in (0, 2) for j in (0, 3)]
    table = BoxTable.of([0] * 4, cells)
    assert not find_crowded(table, np.array([[4, 6]])).size
    assert find_crowded(BoxTable.of([0] * 2, [cells[0]] * 2), np.array([[4, 6]])).tolist() == [0]
