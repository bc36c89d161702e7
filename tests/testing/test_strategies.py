"""The strategies draw what they promise, and what they draw is saved and comes back."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dcpstore
from dcpstore.geometry.boxes import Box, find_overlap
from dcpstore.testing import assert_sound, boxes, shapes, states, tensors, tilings
from tests.tensors import same


@given(shapes(max_dims=2, min_side=1, max_side=4))
def test_shapes_stay_in_their_bounds(shape: tuple[int, ...]) -> None:
    assert len(shape) <= 2
    assert all(1 <= side <= 4 for side in shape)


@given(st.data())
def test_a_box_lies_in_its_tensor(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    box = data.draw(boxes(shape))
    assert all(o + n <= whole for o, n, whole in zip(box.offsets, box.sizes, shape, strict=True))


@given(tilings())
def test_a_tiling_covers_each_element_once(drawn: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, tiles = drawn
    assert sum(box.volume for box in tiles) == math.prod(shape)
    assert find_overlap(tiles) is None


@given(tensors(shapes(max_dims=1), dtypes=[torch.bool, torch.bfloat16]))
def test_tensors_have_the_dtypes_and_shapes_that_are_asked_for(tensor: torch.Tensor) -> None:
    assert tensor.dtype in (torch.bool, torch.bfloat16)
    assert tensor.dim() <= 1


def is_equal(a: Any, b: Any) -> bool:
    """Tell whether two states are equal, in every bit of their tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and same(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(is_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(is_equal, a, b))
    return type(a) is type(b) and repr(a) == repr(b)  # of two NaNs too


@pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")
@settings(deadline=None, max_examples=25)  # time is not a pass mark
@given(states())
def test_every_drawn_state_is_saved_and_comes_back(state: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder, dcpstore.open(folder) as repo:
        dcpstore.save(state, repo)
        assert is_equal(state, repo.read(nested=True))
        assert_sound(repo)


def test_assert_sound_fails_on_damage(tmp_path: Any) -> None:
    with dcpstore.open(tmp_path) as repo:
        dcpstore.save({"w": torch.arange(1000.0)}, repo)
        assert_sound(repo)
        (pack,) = tmp_path.glob("packs/*/*.pack")
        raw = bytearray(pack.read_bytes())
        raw[len(raw) // 2] ^= 1
        pack.write_bytes(raw)
        with pytest.raises((AssertionError, dcpstore.CorruptionError)):
            assert_sound(repo)
