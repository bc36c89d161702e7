"""Models on the meta device are filled by a load; what a load does not find stays unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import dcpstore
from tests.parallel.layouts import Layout, build, named_mesh
from tests.parallel.nets import Net
from tests.ranks import RankPool


def test_a_model_on_the_meta_device_is_filled(tmp_path: Path) -> None:
    model = Net(1)
    dcpstore.save({"model": model}, tmp_path)
    with torch.device("meta"):
        empty = Net(2)
    dcpstore.load({"model": empty}, tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), empty.parameters(), strict=True)
    )
    assert empty(torch.arange(3)).device.type == "cpu"
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in empty.parameters())


def test_a_state_on_the_meta_device_is_filled(tmp_path: Path) -> None:
    dcpstore.save({"a": torch.ones(3), "b": [torch.ones(2, dtype=torch.int64)]}, tmp_path)
    state: dict[str, Any] = {
        "a": torch.empty(3, device="meta"),
        "b": [torch.empty(2, dtype=torch.int64, device="meta")],
    }
    dcpstore.load(state, tmp_path)
    assert torch.equal(state["a"], torch.ones(3))
    assert torch.equal(state["b"][0], torch.ones(2, dtype=torch.int64))


def test_an_optimizer_of_meta_parameters_is_refused(tmp_path: Path) -> None:
    """It would train parameters that are not the model's any more."""
    job = build(Layout("single"), "AdamW", seed=1)
    dcpstore.save({"model": job.model, "optim": job.optimizer}, tmp_path)
    with torch.device("meta"):
        empty = Net(2)
    state = {"model": empty, "optim": torch.optim.AdamW(empty.parameters())}
    with pytest.raises(dcpstore.InvalidInputError, match="'optim' are on the meta device"):
        dcpstore.load(state, tmp_path)


def test_values_that_a_load_does_not_find_are_kept(tmp_path: Path) -> None:
    """Torch's planner replaces a set, a complex number and the like by None."""
    dcpstore.save({"w": torch.ones(2)}, tmp_path)
    state = {"w": torch.zeros(2), "seen": {1, 2}, "more": {"z": 1 + 2j}}
    with pytest.raises(dcpstore.MismatchError):
        dcpstore.load(state, tmp_path)
    assert state["more"] == {"z": 1 + 2j}
    dcpstore.load(state, tmp_path, strict=False)
    assert state == {"w": state["w"], "seen": {1, 2}, "more": {"z": 1 + 2j}}


def load_on_meta(rank: int, folder: Path) -> None:
    """Load a model that FSDP2 laid out on the meta device, and compare it with the saved one."""
    with torch.device("meta"):
        empty = Net(2)
    fully_shard(empty, mesh=named_mesh(("dp", 2)))
    dcpstore.load({"model": empty}, folder)
    for (name, saved), loaded in zip(Net(1).named_parameters(), empty.parameters(), strict=True):
        assert isinstance(loaded, DTensor), name
        assert torch.equal(loaded.full_tensor(), saved), name
    assert empty(torch.arange(3)).device.type == "cpu"


def test_a_sharded_model_on_the_meta_device_is_filled(tmp_path: Path, two_ranks: RankPool) -> None:
    dcpstore.save({"model": Net(1)}, tmp_path)
    two_ranks.run(load_on_meta, tmp_path)
