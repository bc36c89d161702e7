"""Chunk grids: they tile the tensor, follow shard boundaries, and ranges are exact."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from dcpstore.geometry.boxes import Box, find_overlap
from dcpstore.geometry.grids import Grid, lay_grids
from dcpstore.testing import tilings


@settings(deadline=None)  # time is not a pass mark
@given(tilings(), st.integers(1, 400))
def test_grids_tile_the_tensor_and_no_two_boxes_share_a_cell(
    tiling: tuple[tuple[int, ...], list[Box]], target: int
) -> None:
    shape, boxes = tiling
    grids = lay_grids(shape, 4, boxes, target=target)
    cells = [grid.cell(i) for grid in grids for i in range(math.prod(grid.counts))]
    assert sum(cell.volume for cell in cells) == math.prod(shape)
    assert find_overlap(cells) is None
    for cell in cells:
        owners = [box for box in boxes if box.intersect(cell)]
        assert len(owners) == 1
    assert lay_grids(shape, 4, boxes, target=1, parent=grids) == grids


@given(
    st.lists(st.integers(1, 9), min_size=0, max_size=3).flatmap(
        lambda shape: st.tuples(
            st.just(tuple(shape)),
            st.tuples(*(st.integers(1, n) for n in shape)),
            st.tuples(*(st.integers(0, n) for n in shape)),
            st.tuples(*(st.integers(0, n) for n in shape)),
        )
    )
)
def test_ranges_are_exactly_the_cells_that_a_box_intersects(
    drawn: tuple[tuple[int, ...], ...],
) -> None:
    shape, chunk_shape, offsets, sizes = drawn
    origin = tuple(3 for _ in shape)
    grid = Grid(origin, shape, chunk_shape)
    box = Box(tuple(o + 3 for o in offsets), sizes)
    met = [i for i in range(math.prod(grid.counts)) if grid.cell(i).intersect(box)]
    found = [i for first, last in grid.ranges(box) for i in range(first, last + 1)]
    assert found == met
    index = [grid.index(i) for i in range(math.prod(grid.counts))]
    assert index == sorted(index)


def test_whole_box_is_one_range() -> None:
    grid = Grid((0, 0), (100, 10), (1, 10))
    assert list(grid.ranges(Box((0, 0), (100, 10)))) == [(0, 99)]
    assert list(grid.ranges(Box((5, 0), (3, 10)))) == [(5, 7)]


def test_chunks_have_the_target_size_and_stay_contiguous() -> None:
    (grid,) = lay_grids((4096, 4096), 4, [Box.whole((4096, 4096))], target=8 << 20)
    assert grid.chunk_shape == (512, 4096)
    halves = [Box((0, 0), (2048, 4096)), Box((2048, 0), (2048, 4096))]
    assert lay_grids((4096, 4096), 4, halves, target=1 << 20, parent=(grid,)) == (grid,)


def test_grids_of_a_parent_that_is_not_whole_are_not_kept() -> None:
    halves = (Grid((0,), (3,), (3,)), Grid((6,), (3,), (3,)))
    for parent in (halves, halves[:1], halves[1:]):
        (grid,) = lay_grids((12,), 4, [Box.whole((12,))], target=1024, parent=parent)
        assert grid.box == Box.whole((12,))
    whole = (Grid((0,), (6,), (6,)), Grid((6,), (6,), (3,)))
    assert lay_grids((12,), 4, [Box.whole((12,))], target=1024, parent=whole) == whole


def test_shards_are_cut_along_every_dimension() -> None:
    halves = [Box((0, 0), (384, 768)), Box((384, 0), (384, 768))]
    (grid,) = lay_grids((768, 768), 4, halves, target=8 << 20)
    quarters = [Box((192 * i, 0), (192, 768)) for i in range(4)]
    columns = [Box((0, 192 * i), (768, 192)) for i in range(4)]
    assert all(grid.holds_whole_cells(box) for box in (*halves, *quarters, *columns))
    small = [Box((0,), (384,)), Box((384,), (384,))]
    assert lay_grids((768,), 4, small, target=8 << 20)[0].chunk_shape == (384,)


def test_shards_of_many_ranks_are_not_cut_below_a_mebibyte() -> None:
    def cut(rows: int, ranks: int) -> Grid:
        boxes = [Box((i * rows // ranks, 0), (rows // ranks, 1024)) for i in range(ranks)]
        (grid,) = lay_grids((rows, 1024), 4, boxes, target=8 << 20)
        return grid

    assert [cut(rows, 8).size for rows in (1024, 3072, 4096, 8192)] == [8, 8, 16, 32]
    assert cut(3072, 4).size == 64
    for grid in (cut(4096, 8), cut(8192, 8), cut(65536, 64)):
        assert math.prod(grid.chunk_shape) * 4 >= 1 << 20


def test_grids_of_a_parent_that_were_cut_smaller_are_kept() -> None:
    boxes = [Box((384 * i, 0), (384, 1024)) for i in range(8)]
    parent = Grid((0, 0), (3072, 1024), (192, 256))
    assert lay_grids((3072, 1024), 4, boxes, target=8 << 20, parent=(parent,)) == (parent,)


def test_a_prime_number_of_rows_is_not_cut_into_single_rows() -> None:
    halves = [Box((0, 0), (25013, 768)), Box((25013, 0), (25013, 768))]
    (grid,) = lay_grids((50026, 768), 4, halves, target=8 << 20)
    assert grid.chunk_shape[0] == 25013
    assert math.prod(grid.chunk_shape) * 4 <= 8 << 20
