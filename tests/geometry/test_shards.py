"""Local boxes against torch's own shard arithmetic, strided shards included."""

import math

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.distributed.tensor.placement_types import Shard, _StridedShard

from dcpstore.compat.torch_private import splits_uneven_strides
from dcpstore.geometry.placements import Split, local_boxes

# public since torch 2.9
size_and_offset = getattr(Shard, "local_shard_size_and_offset", None) or getattr(
    Shard, "_local_shard_size_and_offset", None
)


@given(
    size=st.integers(0, 23),
    splits=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=2),
    data=st.data(),
)
def test_runs_are_the_same_as_those_of_torch(
    size: int, splits: list[tuple[int, int]], data: st.DataObject
) -> None:
    """It uses the private `_StridedShard`: if torch moves it or changes the split, this fails."""
    held = torch.arange(size)
    chosen = []
    for count, factor in splits:
        index = data.draw(st.integers(0, count - 1))
        chosen.append(Split(0, count, index, factor))
        if factor == 1:
            length, start = size_and_offset(len(held), count, index)
            held = held[start : start + length] if length else held[:0]
        else:
            # of others a release of torch that splits them in its own way is refused
            assume(splits_uneven_strides() or len(held) % (count * factor) == 0)
            pieces, _ = _StridedShard(0, split_factor=factor)._split_tensor(
                held, count, with_padding=False, contiguous=False
            )
            held = pieces[index]
    ours = np.arange(size)
    pairs = local_boxes((size,), chosen)
    gathered = np.full(sum(local.volume for _, local in pairs), -1)
    for box, local in pairs:
        gathered[local.slices] = ours[box.slices]
    assert gathered.tolist() == held.tolist()


def test_all_ranks_of_a_mesh_hold_each_element_once() -> None:
    shape = (7, 10)
    seen = np.zeros(shape, int)
    for dp in range(2):
        for tp in range(3):
            splits = [Split(1, 2, dp, factor=3), Split(1, 3, tp)]
            for box, _ in local_boxes(shape, splits):
                seen[box.slices] += 1
    assert seen.min() == seen.max() == 1
    assert math.prod(shape) == seen.sum()


def test_a_contiguous_shard_is_one_box_and_an_empty_one_none() -> None:
    assert len(local_boxes((10, 4), [Split(0, 4, 3)])) == 1
    assert local_boxes((3, 4), [Split(0, 4, 3)]) == []
    assert len(local_boxes((), [])) == 1
