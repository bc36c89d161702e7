"""Hypothesis strategies for what dcpstore keeps: shapes, boxes, tensors and whole states."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from dcpstore.encoding.dtypes import DTYPES
from dcpstore.geometry.boxes import Box

__all__ = ["boxes", "shapes", "states", "tensors", "tilings"]

_STORED = [row.torch for row in DTYPES if not row.is_packed]
_NAMES = st.text(string.ascii_lowercase + string.digits + "_", min_size=1, max_size=6)


def shapes(
    *, max_dims: int = 3, min_side: int = 0, max_side: int = 11
) -> st.SearchStrategy[tuple[int, ...]]:
    """Draw shapes of `max_dims` dimensions at most; () and sides of 0 are among them."""
    return st.lists(st.integers(min_side, max_side), max_size=max_dims).map(tuple)


@st.composite
def boxes(draw: st.DrawFn, shape: Sequence[int]) -> Box:
    """Draw boxes of a tensor of `shape`: `offsets` and `sizes` in elements, empty ones too."""
    offsets = tuple(draw(st.integers(0, n)) for n in shape)
    sizes = tuple(draw(st.integers(0, n - o)) for n, o in zip(shape, offsets, strict=True))
    return Box(offsets, sizes)


@st.composite
def tilings(draw: st.DrawFn, *, max_cuts: int = 4) -> tuple[tuple[int, ...], list[Box]]:
    """Draw a shape and boxes that tile it, made by cutting boxes in two again and again."""
    shape = draw(shapes(max_side=12))
    tiles = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, max_cuts)) if shape else 0):
        box = tiles.pop(draw(st.integers(0, len(tiles) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, box.sizes[dim]))
        left, right = list(box.sizes), list(box.sizes)
        left[dim], right[dim] = at, box.sizes[dim] - at
        moved = list(box.offsets)
        moved[dim] += at
        tiles += [Box(box.offsets, tuple(left)), Box(tuple(moved), tuple(right))]
    return shape, tiles


@st.composite
def tensors(
    draw: st.DrawFn,
    shape: st.SearchStrategy[tuple[int, ...]] | None = None,
    *,
    dtypes: Sequence[torch.dtype] = _STORED,
) -> torch.Tensor:
    """Draw CPU tensors of random bits, NaNs of every kind among them.

    Args:
        draw: given by Hypothesis.
        shape: the shapes to draw from; by default those of `shapes()`.
        dtypes: the dtypes to draw from; by default each that dcpstore stores.
    """
    sizes = draw(shapes() if shape is None else shape)
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    if dtype is torch.bool:
        return torch.randint(0, 2, sizes, generator=generator).bool()
    raw = torch.randint(0, 256, (*sizes, dtype.itemsize), generator=generator)
    return raw.to(torch.uint8).view(dtype)[..., 0]


def states(*, max_leaves: int = 12) -> st.SearchStrategy[dict[str, Any]]:
    """Draw states to save: nested dicts, lists and tuples of tensors and of plain values.

    Names are short, of lower-case letters, digits and underscores. Every state can be saved
    without pickle, and comes back equal in each bit.
    """
    values = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=8)
        | st.binary(max_size=8)
    )
    nested = st.recursive(
        tensors() | values,
        lambda inner: (
            st.dictionaries(_NAMES, inner, max_size=3)
            | st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
        ),
        max_leaves=max_leaves,
    )
    return st.dictionaries(_NAMES, nested, max_size=4)
