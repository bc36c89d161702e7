"""Memory that a read fills: every dtype and number of dimensions, in every kind of memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dcpstore
from tests.tensors import DTYPES, raw, same

SHAPES = [(), (1,), (0, 3), (3, 5), (1, 1), (2, 1, 3)]
COMPLEX = [torch.complex32, torch.complex64, torch.complex128]
# dtypes that torch can convert to others
CAST = [dtype for dtype in DTYPES if not dtype.is_complex and dtype is not torch.float8_e8m0fnu]


def name_of(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')}-{'x'.join(map(str, shape))}"


pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
Stored = tuple[Path, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    torch.manual_seed(0)
    state = {name_of(dtype, shape): raw(dtype, *shape) for dtype in DTYPES for shape in SHAPES}
    folder = tmp_path_factory.mktemp("filled")
    dcpstore.save(state, folder)
    return folder, state


def transposed(like: torch.Tensor) -> torch.Tensor:
    turned = torch.zeros(like.shape[::-1], dtype=like.dtype)
    return turned.permute(tuple(range(turned.dim() - 1, -1, -1)))


def spread(like: torch.Tensor) -> torch.Tensor:
    return torch.zeros((*like.shape, 3), dtype=like.dtype)[..., 1]


def expanded(like: torch.Tensor) -> torch.Tensor:
    """Return one element in the place of all, which only a tensor of one can be."""
    if like.numel() > 1:
        return torch.zeros(like.shape, dtype=like.dtype)
    return torch.zeros((), dtype=like.dtype).expand(like.shape)


MEMORY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": torch.zeros_like,
    "transposed": transposed,
    "spread": spread,
    "expanded": expanded,
}


@pytest.mark.parametrize("kind", MEMORY)
def test_every_memory_layout_is_filled(kind: str, stored: Stored) -> None:
    folder, state = stored
    target = {fqn: MEMORY[kind](tensor) for fqn, tensor in state.items()}
    given = dict(target)
    dcpstore.load(target, folder)
    assert all(target[fqn] is given[fqn] for fqn in state)
    assert [fqn for fqn, tensor in state.items() if not same(target[fqn], tensor)] == []


@pytest.mark.parametrize("view", ["conj", "neg"])
def test_lazy_views_are_filled(view: str, stored: Stored) -> None:
    folder, _ = stored
    target = {}
    for dtype in COMPLEX if view == "conj" else [torch.float32, torch.float64, *COMPLEX]:
        for shape in SHAPES:
            zeros = torch.zeros(shape, dtype=dtype)
            lazy = zeros.conj() if view == "conj" else torch._neg_view(zeros)
            target[name_of(dtype, shape)] = lazy
    state = {fqn: torch.full(t.shape, 2, dtype=t.dtype) for fqn, t in target.items()}
    state = {fqn: t + (3j if t.is_complex() else 0) for fqn, t in state.items()}
    dcpstore.save(state, folder.parent / view)
    dcpstore.load(target, folder.parent / view)
    found = {fqn: t.resolve_conj().resolve_neg() for fqn, t in target.items()}
    assert [fqn for fqn, t in state.items() if not same(found[fqn], t)] == []


@pytest.mark.parametrize("kind", ["plain", "transposed", "spread"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32])
def test_values_are_converted(kind: str, dtype: torch.dtype, stored: Stored) -> None:
    folder, state = stored
    chosen = {name_of(one, shape) for one in CAST for shape in SHAPES}
    expected = {fqn: state[fqn].to(dtype) for fqn in sorted(chosen)}
    target = {fqn: MEMORY[kind](tensor) for fqn, tensor in expected.items()}
    report = dcpstore.load(target, folder, on_dtype="cast")
    assert set(report.cast) == {fqn for fqn in chosen if state[fqn].dtype is not dtype}
    assert [fqn for fqn, tensor in expected.items() if not same_numbers(target[fqn], tensor)] == []


def same_numbers(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Tell whether two tensors are the same in every bit, except those of NaNs.

    Which NaN torch makes of one depends on whether it converts many elements at once.
    """
    empty = a.isnan()
    return torch.equal(empty, b.isnan()) and same(a.masked_fill(empty, 0), b.masked_fill(empty, 0))


def test_every_shape_is_read(stored: Stored) -> None:
    folder, state = stored
    with dcpstore.open(folder) as repo:
        found = repo.read()
        assert [fqn for fqn, tensor in state.items() if not same(found[fqn], tensor)] == []
        sliced = repo.read(None, dict.fromkeys(state, ...))
        assert [fqn for fqn, tensor in state.items() if not same(sliced[fqn], tensor)] == []
        wide = {fqn: tensor for fqn, tensor in state.items() if tensor.numel()}
        first = repo.read(None, {fqn: (0,) * tensor.dim() for fqn, tensor in wide.items()})
        assert [
            fqn for fqn, tensor in wide.items() if not same(first[fqn], tensor[(0,) * tensor.dim()])
        ] == []


def test_a_change_of_every_shape_is_measured(tmp_path: Path) -> None:
    old = {name_of(d, s): torch.ones(s).to(d) for d in DTYPES for s in SHAPES}
    new = {fqn: torch.full_like(t.to(torch.complex64), 2) for fqn, t in old.items()}
    new = {
        fqn: torch.zeros_like(t) if t.dtype is torch.bool else new[fqn].real.to(t.dtype)
        for fqn, t in old.items()
    }
    with dcpstore.open(tmp_path) as repo:
        dcpstore.save(old, repo)
        dcpstore.save(new, repo)
        for entry in repo.diff("main~1", "main", stats=True).entries:
            count = math.prod(old[entry.fqn].shape)
            assert entry.change == ("changed" if count else "unchanged"), entry.fqn
            if count:
                assert entry.stats is not None
                assert (entry.stats.changed, entry.stats.max_abs) == (count, 1.0), entry.fqn
