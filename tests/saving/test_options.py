"""The arguments that describe a version: each call that takes them lists all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dcpstore
from dcpstore import InvalidInputError
from dcpstore.saving.request import SaveRequest

CALLS: list[Callable[..., Any]] = [
    dcpstore.save,
    dcpstore.async_save,
    lambda _state, repo, **options: dcpstore.RepositoryWriter(repo, **options),
]


@pytest.mark.parametrize("call", [dcpstore.save, dcpstore.async_save])
def test_a_signature_lists_every_option_with_its_default(call: Callable[..., Any]) -> None:
    shown = inspect.signature(call).parameters
    for field in fields(SaveRequest):
        assert shown[field.name].kind is inspect.Parameter.KEYWORD_ONLY
    assert (shown["branch"].default, shown["branch"].annotation) == ("main", "str")
    assert (shown["tags"].default, shown["metrics"].default) == ((), None)
    assert "options" not in shown


def test_a_writer_lists_all_options_but_metrics_from() -> None:
    shown = inspect.signature(dcpstore.RepositoryWriter).parameters
    assert {field.name for field in fields(SaveRequest)} - set(shown) == {"metrics_from"}
    assert "options" not in shown


@pytest.mark.parametrize("call", CALLS, ids=["save", "async_save", "RepositoryWriter"])
def test_an_unknown_option_is_named_before_a_repository_is_created(
    call: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'brnch'"):
        call({"w": torch.ones(2)}, tmp_path / "r", brnch="main")
    assert not (tmp_path / "r").exists()


def test_a_writer_refuses_metrics_from(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="'metrics_from'"):
        dcpstore.RepositoryWriter(tmp_path, metrics_from="rank0")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "loss",
    [
        torch.tensor(0.5, requires_grad=True),  # of which float() would warn, an error in tests
        torch.tensor([0.5], dtype=torch.bfloat16),
        np.float32(0.5),
        np.array([0.5]),
        Fraction(1, 2),
    ],
    ids=["loss with grad", "bf16", "numpy scalar", "array of one", "fraction"],
)
def test_a_metric_is_any_single_number(tmp_path: Path, loss: Any) -> None:
    version = dcpstore.save({"w": torch.ones(2)}, tmp_path / "r", metrics={"loss": loss})
    assert version.metrics == {"loss": 0.5}


@pytest.mark.parametrize("value", [torch.ones(2), torch.ones(1, dtype=torch.complex64), "low"])
def test_a_metric_that_is_not_one_number_is_named(tmp_path: Path, value: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"metric 'loss' is .*; give a number"):
        dcpstore.save({"w": torch.ones(2)}, tmp_path / "r", metrics={"loss": value})
