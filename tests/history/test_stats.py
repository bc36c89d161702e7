"""The numbers of a diff, held to torch's own arithmetic: every dtype, every way of cutting."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Shard, distribute_tensor

import dcpstore
from dcpstore import Repository
from dcpstore.encoding.dtypes import as_bytes, dtype_name
from dcpstore.history import TensorStats
from dcpstore.history.measure import compare
from dcpstore.records import ChunkDefaults
from dcpstore.repository import open as open_repository
from tests.ranks import RankPool, mesh
from tests.soundness import Place

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FLOAT8 = [
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]
INTS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
UNSIGNED = [torch.uint16, torch.uint32, torch.uint64]
COMPLEX = [torch.complex32, torch.complex64, torch.complex128]


def stats_of(old: torch.Tensor, new: torch.Tensor) -> TensorStats:
    return compare(
        as_bytes(old),
        as_bytes(new),
        old_dtype=dtype_name(old.dtype),
        new_dtype=dtype_name(new.dtype),
    )


def random(dtype: torch.dtype, seed: int, n: int = 1000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.rand(n, generator=generator) > 0.5
    if dtype in INTS or dtype in UNSIGNED:
        return torch.randint(0, 120, (n,), generator=generator).to(dtype)
    if dtype in COMPLEX:
        parts = torch.randn(2, n, generator=generator, dtype=torch.float64)
        return torch.complex(parts[0], parts[1]).to(dtype)
    return torch.randn(n, generator=generator).abs().to(dtype)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", [*FLOATS, *FLOAT8, *INTS, *UNSIGNED, *COMPLEX, torch.bool])
def test_every_dtype(dtype: torch.dtype) -> None:
    old, new = random(dtype, 1), random(dtype, 2)
    stats = stats_of(old, new)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    a, b = (t.to(torch.complex64 if dtype.is_complex else wide).to(wide) for t in (old, new))
    assert stats.compared == 1000
    assert stats.l2 == pytest.approx(float((b - a).norm()))
    assert stats.relative == pytest.approx(float((b - a).norm() / a.norm()))
    assert stats.max_abs == pytest.approx(float((b - a).abs().max()))
    cosine = float(torch.vdot(a, b).real / (a.norm() * b.norm()))
    assert stats.cosine == pytest.approx(cosine)
    assert stats.changed == int((a != b).sum())
    assert (stats.nan_old, stats.inf_new) == (0, 0)


def test_float4_pairs() -> None:
    old = torch.tensor([0x10, 0x7F], dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    new = torch.tensor([0x12, 0x7F], dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    stats = stats_of(old, new)
    assert (stats.compared, stats.changed) == (2, 1)
    assert stats.l2 == stats.max_abs == 1.0
    assert stats.squared_old == 0 + 0.25 + 36 + 36


def test_a_tensor_that_became_pairs_has_no_stats(repo: Repository) -> None:
    plain = torch.arange(6).to(torch.uint8)
    for tensor in (plain, plain.view(torch.float4_e2m1fn_x2), plain):
        dcpstore.save({"w": tensor}, repo)
    for old, new in (("v1", "v2"), ("v2", "v3")):
        (entry,) = repo.diff(old, new, stats=True).retyped
        assert entry.stats is None


def test_integers_past_the_precision_of_floats() -> None:
    big = 2**62
    for dtype in (torch.int64, torch.uint64):
        old = torch.tensor([big, 5], dtype=dtype)
        new = torch.tensor([big + 1, 5], dtype=dtype)
        assert (stats_of(old, new).l2, stats_of(new, old).max_abs) == (1, 1)
    low, high = torch.tensor([-(2**63)]), torch.tensor([2**63 - 1])
    assert stats_of(low, high).max_abs == 2.0**64


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    old = torch.tensor([1.0, math.nan, math.inf, 4.0, -0.0])
    new = torch.tensor([1.0, math.nan, 2.0, math.nan, 0.0])
    stats = stats_of(old, new)
    assert (stats.nan_old, stats.nan_new, stats.inf_old, stats.inf_new) == (1, 2, 1, 0)
    assert stats.changed == 3  # a NaN is the same NaN by its bits, and -0.0 is not 0.0
    assert stats.l2 == stats.relative == 0
    assert stats.squared_old == 1
    zeros = stats_of(torch.zeros(3), torch.ones(3))
    assert zeros.relative == math.inf
    assert math.isnan(zeros.cosine)
    huge = torch.full((2,), 1.5e308, dtype=torch.float64)
    overflow = stats_of(-huge, huge)
    assert overflow.max_abs == math.inf


def test_another_dtype_is_compared_by_value() -> None:
    old = torch.tensor([1.0, 2.0, math.nan, 0.1])
    stats = stats_of(old, old.bfloat16())
    assert (stats.changed, stats.nan_new) == (1, 1)
    tenth = torch.tensor(0.1)
    assert stats.max_abs == pytest.approx(abs(float(tenth) - float(tenth.bfloat16())))


@settings(deadline=None, max_examples=12)
@given(
    shape=st.lists(st.integers(1, 9), max_size=3),
    chunk=st.sampled_from([4, 32, 1 << 20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    touched=st.integers(0, 40),
    seed=st.integers(0, 99),
)
def test_statistics_are_of_the_whole_tensor_whatever_the_chunks(
    *,
    tmp_path_factory: pytest.TempPathFactory,
    shape: list[int],
    chunk: int,
    dtype: torch.dtype,
    touched: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    old = (torch.randn(shape) * 10).to(dtype)
    new = old.clone().reshape(-1)
    at = torch.randint(0, new.numel(), (touched,))
    new[at] = (torch.randn(touched) * 10).to(dtype)
    new = new.reshape(shape)
    folder: Path = tmp_path_factory.mktemp("diff")
    with open_repository(folder, chunk=ChunkDefaults(nbytes=chunk)) as repo:
        dcpstore.save({"w": old}, repo)
        dcpstore.save({"w": new}, repo)
        (entry,) = repo.diff("v1", "v2", stats=True).entries
    stats = entry.stats or TensorStats()
    assert stats.changed == int((old != new).sum())
    assert stats.l2 == pytest.approx(float((new.double() - old.double()).norm()))
    assert (entry.stats is None) == (entry.change == "unchanged") == bool(torch.equal(old, new))


def save_cut(rank: int, place: Place, value: float) -> None:
    """Save one tensor, split over two ranks by its columns."""
    whole = torch.arange(30.0).reshape(5, 6)
    whole[4, 5] = value
    with place.open() as repo:
        dcpstore.save({"w": distribute_tensor(whole, mesh((2,)), [Shard(1)])}, repo)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_tensors_with_different_grids(place: Place, two_ranks: RankPool) -> None:
    place = Place(place.url, place.data, chunk_nbytes=48)
    whole = torch.arange(30.0).reshape(5, 6)
    with place.open() as repo:
        dcpstore.save({"w": whole}, repo)
        two_ranks.run(save_cut, place, 29.0)
        two_ranks.run(save_cut, place, 31.5)
        assert not repo.diff("v1", "v2")
        (entry,) = repo.diff("v1", "v3", stats=True).changed
        old, new = entry.old, entry.new
        assert old is not None
        assert new is not None
        assert old.tensor is not None
        assert new.tensor is not None
        assert old.tensor.parts != new.tensor.parts
    assert entry.stats is not None
    assert (entry.stats.compared, entry.stats.changed, entry.stats.l2) == (30, 1, 2.5)
    assert entry.stats.relative == pytest.approx(2.5 / float(whole.norm()))
