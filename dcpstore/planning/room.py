"""Room for tensors on the meta device, made before a load fills them.

Torch makes such room too, but needs a process group for it, and turns every value of a kind that it
does not know into None. Invariant: nothing but a tensor on the meta device is replaced.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dcpstore.errors import InvalidInputError

__all__ = ["make_room"]


def make_room(state: Any) -> Any:
    """Replace, in place, the tensors of nested dicts and lists that are on the meta device.

    What comes in their place is uninitialised: on the CPU, or on the accelerator where the process
    group is for accelerators alone; a DTensor's is on the device of its mesh.

    Raises:
        InvalidInputError: a tensor class of torch's that no one can make without its ranks.
    """
    if isinstance(state, torch.Tensor):
        return _room(state) if state.is_meta else state
    if isinstance(state, dict):
        for key, value in state.items():
            state[key] = make_room(value)
    elif isinstance(state, list):
        state[:] = [make_room(value) for value in state]
    return state


def _room(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        return DTensor.from_local(
            torch.empty_like(tensor.to_local(), device=mesh.device_type),
            mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.size(),
            stride=tensor.stride(),
        )
    if type(tensor) not in {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}:
        raise InvalidInputError(
            f"a {type(tensor).__name__} of shape {tuple(tensor.shape)} is on the meta device, and "
            "a load cannot make room for it; move it to a real device (module.to_empty) first."
        )
    return torch.empty_like(tensor, device=_device())


def _device() -> torch.device:
    """Return where a plain tensor is to be: torch's choice, in words that are public."""
    if not dist.is_initialized() or "cpu:" in dist.get_backend_config():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")
