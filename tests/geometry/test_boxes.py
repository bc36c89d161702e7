"""Boxes against numpy: an index array is the oracle for what a box covers."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dcpstore.geometry.boxes import Box, find_overlap
from dcpstore.testing import boxes

SHAPE = (5, 4, 3)


def cells(box: Box) -> set[int]:
    return set(np.arange(np.prod(SHAPE)).reshape(SHAPE)[box.slices].ravel().tolist())


@given(boxes(SHAPE), boxes(SHAPE))
def test_intersection_is_the_shared_cells(a: Box, b: Box) -> None:
    shared = a.intersect(b)
    assert (cells(shared) if shared else set()) == cells(a) & cells(b)
    assert len(cells(a)) == a.volume


@given(st.lists(boxes(SHAPE), max_size=6))
def test_overlap_is_found_exactly_when_there_is_one(some: list[Box]) -> None:
    pair = find_overlap(some)
    total = sum(box.volume for box in some)
    union = len(set().union(*map(cells, some)))
    assert (pair is None) == (total == union)
    if pair is not None:
        assert some[pair[0]].intersect(some[pair[1]]) is not None


def test_zero_dimensional_boxes_hold_one_element() -> None:
    assert Box((), ()).volume == 1
    assert find_overlap([Box((), ()), Box((), ())]) == (0, 1)
