"""Tensors of torchao: each kind that dcpstore knows, saved, read without a template and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dcpstore
from dcpstore import MismatchError, Repository
from dcpstore.encoding.composed_tensors import JAGGED, KINDS, SPARSE, kind_of, parts_of
from tests.loading.composed_ranks import round_trip_optimizer, round_trip_weights
from tests.ranks import RankPool
from tests.tensors import same
from tests.torch_release import with_torchao

Make = Callable[[torch.dtype], torch.Tensor]


pytestmark = with_torchao


@pytest.fixture(scope="module")
def makers() -> dict[str, Make]:
    """What makes a tensor of random content, by the name of its kind."""
    from tests.loading.torchao_tensors import MAKERS  # noqa: PLC0415 (takes seconds to load)

    return MAKERS


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = kind_of(a)
    assert kind is not None
    if kind_of(b) is not kind or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    (ours, context), (theirs, other) = parts_of(kind, a), parts_of(kind, b)
    return (context, list(ours)) == (other, list(theirs)) and all(
        same(part, theirs[name]) for name, part in ours.items()
    )


def test_all_listed_kinds_are_tested_here(makers: dict[str, Make]) -> None:
    own = {JAGGED.name, *(kind.name for kind in SPARSE.values())}
    assert set(makers) == KINDS.keys() - own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_kind_is_restored_exactly(
    repo: Repository, makers: dict[str, Make], dtype: torch.dtype, subtests: pytest.Subtests
) -> None:
    made = {name: make(dtype) for name, make in makers.items()}
    dcpstore.save({"in": dict(made)}, repo)
    read = repo.read()
    filled = {name: make(dtype) for name, make in makers.items()}
    kept = dict(filled)
    report = dcpstore.load({"in": filled}, repo)
    assert report.missing == report.unexpected == ()
    for name, tensor in made.items():
        with subtests.test(name):
            assert alike(read[f"in.{name}"], tensor)
            assert filled[name] is kept[name]
            assert alike(filled[name], tensor)


@pytest.mark.parametrize(
    "name",
    [
        "AdamW4bit",
        pytest.param("AdamW8bit", marks=pytest.mark.slow),
        pytest.param("AdamWFp8", marks=pytest.mark.slow),
    ],
)
def test_an_optimizer_of_two_ranks_is_restored_on_one_and_two(
    two_ranks: RankPool, tmp_path: Path, name: str
) -> None:
    expected = f"torchao {name.replace('AdamW', 'OptimState').replace('FP', 'Fp')}"
    assert two_ranks.run(round_trip_optimizer, str(tmp_path), name) == [[expected]] * 2


def test_float8_weights_of_two_ranks_are_restored(two_ranks: RankPool, tmp_path: Path) -> None:
    names = ["Float8Tensor", "WeightWithDynamicFloat8CastTensor"]
    assert two_ranks.run(round_trip_weights, str(tmp_path)) == [names] * 2


def test_a_new_optimizer_gets_its_state(tmp_path: Path) -> None:
    from torchao import optim as ao  # noqa: PLC0415 (takes seconds to load)

    def trained(kind: Any, steps: int) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = kind([torch.nn.Parameter(torch.randn(64, 128).bfloat16())])
        ((parameter,),) = [group["params"] for group in made.param_groups]
        with torch.compiler.set_stance("force_eager"):
            for _ in range(steps):
                parameter.grad = torch.randn_like(parameter)
                made.step()
        return made

    for kind in (ao.AdamW8bit, ao.AdamW4bit, ao.AdamWFp8):
        kept = trained(kind, 2)
        dcpstore.save({"o": kept}, tmp_path / kind.__name__)
        for steps in (0, 1):
            fresh = trained(kind, steps)
            dcpstore.load({"o": fresh}, tmp_path / kind.__name__)
            ours, theirs = (next(iter(one.state.values())) for one in (kept, fresh))
            assert ours.keys() == theirs.keys()
            assert same(ours["step"], theirs["step"])
            assert alike(ours["exp_avg"], theirs["exp_avg"])
            assert alike(ours["exp_avg_sq"], theirs["exp_avg_sq"])


def test_weights_are_loaded_into_meta_tensors_and_differences_are_named(
    makers: dict[str, Make], tmp_path: Path
) -> None:
    def module(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        made = torch.nn.Module()
        made.w = torch.nn.Parameter(makers["torchao Int8Tensor"](dtype).data, requires_grad=False)
        return made

    kept = module()
    dcpstore.save({"m": kept}, tmp_path)
    fresh = module().to("meta")
    assert fresh.w.is_meta
    dcpstore.load({"m": fresh}, tmp_path)
    assert isinstance(fresh.w, torch.nn.Parameter)
    assert alike(fresh.w, kept.w)
    with pytest.raises(MismatchError, match=r"'m\.w' is a torchao Int8Tensor with .*float32"):
        dcpstore.load({"m": module(torch.bfloat16)}, tmp_path, on_dtype="cast")
    with pytest.raises(MismatchError, match=r"'m\.w' is a torchao Int8Tensor in the version"):
        dcpstore.load({"m": {"w": torch.zeros(32, 64)}}, tmp_path)
