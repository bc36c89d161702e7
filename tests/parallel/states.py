"""What the matrix compares: the whole state of a job, and the bits that one rank holds."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.tensor import DTensor

import dcpstore.state_dict as dsd
from dcpstore.encoding.dtypes import as_bytes
from tests.parallel.layouts import Job

Plain = tuple[str, tuple[int, ...], bytes]  # dtype, shape and bits: what is sent between processes


def take(job: Job) -> dict[str, Any]:
    """Return the state of a job as torch's state-dict functions give it."""
    model, optim = dsd.get_state_dict(job.model, job.optimizer, options=job.options)
    return {"model": model, "optim": optim}


def give(job: Job, state: dict[str, Any]) -> None:
    """Set the state of a job by torch's state-dict functions."""
    dsd.set_state_dict(
        job.model,
        job.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optim"],
        options=job.options,
    )


def whole(job: Job) -> dict[str, Any]:
    """Return the full state of all ranks together, by FQN, as plain data; a collective call."""
    options = dataclasses.replace(
        job.options, full_state_dict=True, flatten_optimizer_state_dict=True
    )
    model, optim = dsd.get_state_dict(job.model, job.optimizer, options=options)
    flat, _ = flatten_state_dict({"model": model, "optim": optim})
    own = {fqn: _plain(value) for fqn, value in flat.items()}
    if not dist.is_initialized():
        return own
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    merged: dict[str, Any] = {}
    for held in everyone:
        for fqn, value in held.items():
            assert merged.setdefault(fqn, value) == value, f"the ranks differ in {fqn}"
    return merged


def bits(state: dict[str, Any]) -> dict[str, Any]:
    """Return what this rank holds of a state, by FQN, as plain data."""
    flat, _ = flatten_state_dict(state)
    return {fqn: [_plain(part) for part in parts(value)] for fqn, value in flat.items()}


def scramble(state: dict[str, Any]) -> None:
    """Overwrite every tensor that this rank holds, so that only a load can restore it."""
    flat, _ = flatten_state_dict(state)
    with torch.no_grad():
        for value in flat.values():
            for part in parts(value):
                if isinstance(part, torch.Tensor):
                    part.fill_(77)


def parts(value: Any) -> list[Any]:
    """Return the plain tensors (or the value) that this rank holds of one item."""
    if isinstance(value, DTensor):
        return [value.to_local()]
    if isinstance(value, ShardedTensor):
        return [shard.tensor for shard in value.local_shards()]
    return [value]


def _plain(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return str(value.dtype), tuple(value.shape), as_bytes(value.detach().contiguous()).tobytes()
