"""Tensors of every number of dimensions through every format, as they are and converted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import dcpstore
from dcpstore.convert.dcp_folder import export_dcp, import_dcp
from dcpstore.convert.safetensors_files import export_safetensors, import_safetensors
from dcpstore.convert.torch_files import export_torch, import_torch
from dcpstore.convert.zarr_folder import export_zarr
from dcpstore.encoding.dtypes import as_bytes
from tests.tensors import same

SHAPES = [(), (1,), (0, 3), (1, 1), (3, 5)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float8_e5m2, torch.int64, torch.bool]
BRIDGES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "torch": (export_torch, import_torch),
    "dcp": (export_dcp, import_dcp),
    "safetensors": (export_safetensors, import_safetensors),
}


def every_shape() -> dict[str, torch.Tensor]:
    state = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            tensor = torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape).to(dtype)
            state[f"{str(dtype)[6:]}-{'x'.join(map(str, shape))}"] = tensor
    return state


def expected(state: dict[str, torch.Tensor], dtype: str | None) -> dict[str, torch.Tensor]:
    to = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(dtype or "")
    return {
        fqn: tensor.to(to) if to is not None and tensor.is_floating_point() else tensor
        for fqn, tensor in state.items()
    }


def different(found: dict[str, Any], wanted: dict[str, torch.Tensor]) -> list[str]:
    assert found.keys() == wanted.keys()
    return [fqn for fqn, tensor in wanted.items() if not same(found[fqn], tensor)]


@pytest.mark.parametrize("dtype", [None, "bf16", "fp32"])
@pytest.mark.parametrize("form", BRIDGES)
def test_out_and_in_again(form: str, dtype: str | None, tmp_path: Path) -> None:
    state = every_shape()
    export, take = BRIDGES[form]
    with dcpstore.open(tmp_path / "repo") as repo:
        dcpstore.save(state, repo)
        export(repo, None, tmp_path / "out", dtype=dtype)
        take(tmp_path / "out", repo)
        assert different(repo.read(), expected(state, dtype)) == []
        take(tmp_path / "out", repo, dtype="fp32")
        assert different(repo.read(), expected(expected(state, dtype), "fp32")) == []


@pytest.mark.parametrize("dtype", [None, "bf16", "fp32"])
def test_out_as_zarr(dtype: str | None, tmp_path: Path) -> None:
    state = every_shape()
    with dcpstore.open(tmp_path / "repo") as repo:
        dcpstore.save(state, repo)
        export_zarr(repo, None, tmp_path / "out", dtype=dtype)
        views = [(zarr.open_group(tmp_path / "out", mode="r"), expected(state, dtype))]
        views += [(zarr.open_group(repo.zarr(), mode="r"), state)]
        for group, wanted in views:
            for fqn, tensor in wanted.items():
                array = group[fqn]
                assert isinstance(array, zarr.Array)
                assert array.shape == tensor.shape
                assert np.asarray(array[...]).tobytes() == as_bytes(tensor).tobytes(), fqn
