"""Resharding as a property: a state saved under one layout loads under another, bit by bit.

Real gloo ranks, the real save and load, on both databases.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import dcpstore
from dcpstore.compat.torch_private import splits_uneven_strides
from dcpstore.encoding.dtypes import as_bytes
from tests.ranks import RankPool, first_ranks, mesh
from tests.soundness import Place, assert_sound

MESHES = [(1,), (2,), (4,), (2, 2), (1, 4), (4, 1)]
DTYPES = [
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "complex64",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
]
Placement = tuple[str, int, int]  # kind, dimension, split factor


@dataclass(frozen=True)
class Tensor:
    """One tensor of an example: how it is laid out for the save and for the load."""

    shape: tuple[int, ...]
    dtype: str
    seed: int
    before: tuple[Placement, ...] | None  # None is a plain tensor
    after: tuple[Placement, ...] | None


@dataclass(frozen=True)
class Example:
    before: tuple[int, ...]
    after: tuple[int, ...]
    tensors: tuple[Tensor, ...]


@st.composite
def placements(draw: st.DrawFn, ndim: int, dims: int) -> tuple[Placement, ...]:
    drawn = []
    for _ in range(dims):
        kinds = ["replicate", "shard"] if ndim else ["replicate"]
        if ndim and splits_uneven_strides():  # older releases of torch are refused some of them
            kinds.append("strided")
        kind = draw(st.sampled_from(kinds))
        dim = draw(st.integers(0, ndim - 1)) if ndim else 0
        drawn.append((kind, dim, draw(st.integers(2, 3)) if kind == "strided" else 1))
    return tuple(drawn)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    before, after = draw(st.sampled_from(MESHES)), draw(st.sampled_from(MESHES))
    tensors = []
    for _ in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 11), max_size=3)))
        tensors.append(
            Tensor(
                shape,
                draw(st.sampled_from(DTYPES)),
                draw(st.integers(0, 9)),
                draw(st.none() | placements(len(shape), len(before))),
                draw(st.none() | placements(len(shape), len(after))),
            )
        )
    return Example(before, after, tuple(tensors))


def make(tensor: Tensor) -> torch.Tensor:
    """Return the global tensor, of random bits; a bool has random values."""
    generator = torch.Generator().manual_seed(tensor.seed)
    dtype = getattr(torch, tensor.dtype)
    if dtype is torch.bool:
        return torch.randint(0, 2, tensor.shape, generator=generator).bool()
    raw = torch.randint(0, 256, (*tensor.shape, dtype.itemsize), generator=generator)
    return raw.to(torch.uint8).view(dtype).reshape(tensor.shape)


def lay_out(whole: torch.Tensor, shape: tuple[int, ...], given: tuple[Placement, ...]) -> DTensor:
    """Return `whole` laid out over the mesh of `shape`, split as torch's placements split it."""
    kinds = {"replicate": lambda dim, factor: Replicate(), "shard": lambda dim, factor: Shard(dim)}
    kinds["strided"] = lambda dim, factor: _StridedShard(dim, split_factor=factor)
    chosen = [kinds[kind](dim, factor) for kind, dim, factor in given]
    device_mesh = mesh(shape)
    local = whole
    coordinate = device_mesh.get_coordinate()
    for count, index, placement in zip(shape, coordinate, chosen, strict=True):
        if isinstance(placement, Shard | _StridedShard):
            pieces, _ = placement._split_tensor(local, count, with_padding=False, contiguous=True)
            local = pieces[index]
    return DTensor.from_local(
        local.contiguous(),
        device_mesh,
        chosen,
        run_check=False,
        shape=whole.shape,
        stride=whole.contiguous().stride(),
    )


def state_of(example: Example, *, before: bool, filled: bool) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for i, tensor in enumerate(example.tensors):
        whole = make(tensor)
        if not filled:
            whole = torch.zeros_like(whole)
        given = tensor.before if before else tensor.after
        shape = example.before if before else example.after
        state[f"t{i}"] = whole if given is None else lay_out(whole, shape, given)
    return state


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and as_bytes(a).tobytes() == as_bytes(b).tobytes()


def save_and_load(rank: int, place: Place, branch: str, example: Example) -> None:
    """Save on the ranks of one mesh and load on those of the other, as branch `branch`."""
    before, after = math.prod(example.before), math.prod(example.after)
    groups_of = {count: first_ranks(count) for count in (1, 2, 4)}
    for shape in MESHES:
        mesh(shape)
    with place.open() as repo:
        if rank < before:
            state = state_of(example, before=True, filled=True)
            dcpstore.save(state, repo, branch=branch, process_group=groups_of[before])
        torch.distributed.barrier()
        if rank < after:
            state = state_of(example, before=False, filled=False)
            dcpstore.load(state, repo, branch, process_group=groups_of[after])
            wanted = state_of(example, before=False, filled=True)
            for fqn, tensor in wanted.items():
                assert equal(local(state[fqn]), local(tensor)), (fqn, state[fqn], tensor)


@pytest.mark.parametrize("examples_tried", [12, pytest.param(50, marks=pytest.mark.slow)])
def test_what_is_saved_under_one_layout_loads_under_another(
    database_url: str, tmp_path: Any, four_ranks: RankPool, examples_tried: int
) -> None:
    numbers = itertools.count()

    @settings(
        max_examples=examples_tried,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(examples())
    def check(example: Example) -> None:
        place = Place(database_url, str(tmp_path / "data"))
        four_ranks.run(save_and_load, place, f"b{next(numbers)}", example)

    Place(database_url, str(tmp_path / "data"), chunk_nbytes=64).open().close()
    check()
    with Place(database_url, str(tmp_path / "data")).open() as repo:
        assert len(repo.log()) >= examples_tried
        assert_sound(repo)
