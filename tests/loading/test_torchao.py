"""Tensors of torchao: each kind that dcpstore knows, saved, read without a template and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dcpstore
from dcpstore import Repository
from dcpstore.encoding.composed import parts_of
from dcpstore.encoding.kinds import JAGGED, KINDS, SPARSE, kind_of
from tests.loading.composed_ranks import round_trip_optimizer
from tests.ranks import RankPool
from tests.tensors import same

Make = Callable[[torch.dtype], torch.Tensor]


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


def test_the_list_is_what_is_tried_here(makers: dict[str, Make]) -> None:
    own = {JAGGED.name, *(kind.name for kind in SPARSE.values())}
    assert set(makers) == KINDS.keys() - own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_kind_comes_back_exactly(
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
def test_an_optimizer_of_two_ranks_comes_back_to_one_and_two(
    two_ranks: RankPool, tmp_path: Path, name: str
) -> None:
    expected = f"torchao {name.replace('AdamW', 'OptimState').replace('FP', 'Fp')}"
    assert two_ranks.run(round_trip_optimizer, str(tmp_path), name) == [[expected]] * 2
