"""The module buffers of a state: the tensors in which ranks may differ.

With DDP each rank updates the running statistics of its batch norms from its own batches, and the
next forward pass starts from those of rank 0. So a difference in buffers is not an error, while one
in parameters is. Invariant: a tensor counts as a buffer if a module says so, or if it has the name
of a batch norm statistic: a plain dict does not say which of its tensors were buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from dcpstore.state.shards import local_of
from dcpstore.state.walk import fqn_of

__all__ = ["buffer_names", "is_statistic"]

# The names in torch's batch norms, and in others that follow them.
_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})


def is_statistic(fqn: str) -> bool:
    """Tell whether a tensor has the name of a batch norm's statistic."""
    return fqn.rpartition(".")[2] in _STATISTICS


def buffer_names(state_dict: Mapping[str, Any], taken: Mapping[str, Any]) -> frozenset[str]:
    """Return the FQNs of the buffers of all modules in `state_dict`, at any depth.

    Args:
        state_dict: the state with its modules.
        taken: its plain state, with what each module's `state_dict()` returned.
    """
    return frozenset(_names_below(state_dict, taken, ()))


def _names_below(state: Any, taken: Any, path: tuple[str, ...]) -> Iterator[str]:
    if isinstance(state, torch.nn.Module):
        if isinstance(taken, Mapping):
            yield from (fqn_of((*path, name)) for name in _buffers_of(state, taken))
    elif isinstance(state, Mapping) and isinstance(taken, Mapping):
        for key in state.keys() & taken.keys():
            yield from _names_below(state[key], taken[key], (*path, str(key)))
    elif isinstance(state, list) and isinstance(taken, list) and len(state) == len(taken):
        for i, (inner, taken_inner) in enumerate(zip(state, taken, strict=True)):
            yield from _names_below(inner, taken_inner, (*path, str(i)))


def _buffers_of(module: torch.nn.Module, taken: Mapping[str, Any]) -> list[str]:
    """Return the names in a module's state that are buffers: by their name, or by their memory."""
    buffers = dict(module.named_buffers(remove_duplicate=False))
    if not buffers:
        return []
    # A state dict hook may rename buffers, and FSDP1 returns copies of them, but neither does both.
    addresses = {_address(buffer) for buffer in buffers.values()} - {None}
    return [
        name
        for name, tensor in taken.items()
        if isinstance(tensor, torch.Tensor) and (name in buffers or _address(tensor) in addresses)
    ]


def _address(tensor: torch.Tensor) -> tuple[str, int] | None:
    """Return the device and address of a tensor's memory; None if it has no memory."""
    local = local_of(tensor)
    try:
        address = local.data_ptr()
    except RuntimeError:  # a tensor without storage
        return None
    # A tensor without elements has the address 0, which is not its own.
    return (str(local.device), address) if address else None
