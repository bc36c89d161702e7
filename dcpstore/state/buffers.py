"""The module buffers of a state: the tensors in which ranks may differ.

Each rank of DDP updates the running statistics of its batch norms from its own batches, and the
next forward pass begins with those of rank 0. So a difference there is not an error, as one in a
parameter is. Invariant: a tensor counts as a buffer if a module says so, or if its name is that of
a batch norm statistic: a plain dict no longer says which of its tensors were buffers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

__all__ = ["buffer_names", "is_statistic"]

# Of torch's batch norms, and of those that are written like them.
_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})


def is_statistic(fqn: str) -> bool:
    """Tell whether a tensor has the name of a batch norm's statistic."""
    return fqn.rpartition(".")[2] in _STATISTICS


def buffer_names(state_dict: Mapping[str, Any], taken: Mapping[str, Any]) -> frozenset[str]:
    """Return the FQNs of the buffers of all modules in `state_dict`, wherever they lie in it.

    Args:
        state_dict: with its modules.
        taken: the plain state of it.
    """
    names: set[str] = set()
    _collect(state_dict, taken, (), names)
    return frozenset(names)


def _collect(owner: Any, given: Any, path: tuple[str, ...], names: set[str]) -> None:
    if isinstance(owner, torch.nn.Module):
        if isinstance(given, Mapping):
            names.update(".".join((*path, name)) for name in _buffers_of(owner, given))
    elif isinstance(owner, Mapping) and isinstance(given, Mapping):
        for key, inner in owner.items():
            if key in given:
                _collect(inner, given[key], (*path, str(key)), names)
    elif isinstance(owner, list) and isinstance(given, list) and len(owner) == len(given):
        for i, inner in enumerate(owner):
            _collect(inner, given[i], (*path, str(i)), names)


def _buffers_of(module: torch.nn.Module, given: Mapping[str, Any]) -> list[str]:
    """Return the names in a module's state that are buffers: by name, or by where they lie."""
    buffers = dict(module.named_buffers(remove_duplicate=False))
    if not buffers:
        return []
    # A hook may rename what it gives, and FSDP1 gives copies: one of the two is left as it was.
    places = {_place(buffer) for buffer in buffers.values()} - {None}
    return [
        name
        for name, tensor in given.items()
        if isinstance(tensor, torch.Tensor) and (name in buffers or _place(tensor) in places)
    ]


def _place(tensor: torch.Tensor) -> tuple[str, int] | None:
    """Return the device and address of a tensor's memory; None where it has none."""
    with torch.no_grad():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    try:
        address = local.data_ptr()
    except RuntimeError:  # of a tensor that has no storage
        return None
    return (str(local.device), address) if address else None
