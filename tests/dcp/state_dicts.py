"""Uses of torch's state-dict API, for whole states and for parts."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import dcpstore
from dcpstore.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from tests.dcp.uses import use_of, world


def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model: nn.Module = nn.Linear(3, 5)
    if dist.is_initialized():
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 / seed)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def assert_same_training(one: Any, other: Any) -> None:
    for a, b in zip(one[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(a, b)
        for name, value in one[1].state[a].items():
            assert torch.equal(value, other[1].state[b][name])
    assert one[1].param_groups[0]["lr"] == other[1].param_groups[0]["lr"]


@use_of("get_state_dict", "set_state_dict", "StateDictOptions")
def whole_state(rank: int, folder: Path) -> None:
    for options in (None, StateDictOptions(full_state_dict=True, cpu_offload=world() == 1)):
        saved, found = trained(1), trained(2)
        model, optim = get_state_dict(*saved, options=options)
        assert sorted(model) == ["bias", "weight"]
        assert sorted(optim["state"]) == ["bias", "weight"]
        dcpstore.save({"model": model, "optim": optim}, folder)
        model, optim = get_state_dict(*found, options=options)
        into = {"model": model, "optim": optim}
        dcpstore.load(into, folder)
        set_state_dict(
            *found,
            model_state_dict=into["model"],
            optim_state_dict=into["optim"],
            options=options,
        )
        assert_same_training(saved, found)


@use_of(
    "get_model_state_dict",
    "set_model_state_dict",
    "get_optimizer_state_dict",
    "set_optimizer_state_dict",
)
def state_by_parts(rank: int, folder: Path) -> None:
    saved, found = trained(1), trained(2)
    dcpstore.save(
        {"model": get_model_state_dict(saved[0]), "optim": get_optimizer_state_dict(*saved)},
        folder,
    )
    into = {"model": get_model_state_dict(found[0]), "optim": get_optimizer_state_dict(*found)}
    dcpstore.load(into, folder)
    set_model_state_dict(found[0], into["model"])
    set_optimizer_state_dict(*found, into["optim"])
    assert_same_training(saved, found)
