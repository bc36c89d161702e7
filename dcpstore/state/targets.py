"""Tensors that a load fills: the memory that they have, or get if they are on the meta device.

Torch's DCP can allocate memory for meta tensors too, but it needs a process group, and it replaces
values of types that it does not know by None. Invariant: nothing is allocated before all ranks
agree that everything fits.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist
from numpy.lib.stride_tricks import as_strided
from torch.distributed.tensor import DTensor

from dcpstore.errors import InvalidInputError
from dcpstore.state.shards import distributed_like

__all__ = [
    "check_room",
    "make_room",
    "memory_of",
    "target_fault",
    "without_memory",
]

_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def target_fault(tensor: torch.Tensor) -> str | None:
    """Return why a tensor cannot be filled element by element, or None where it can."""
    if tensor.layout is not torch.strided:
        return f"has layout {tensor.layout} in the state; load into a dense tensor"
    if not tensor.is_contiguous() and _overlaps_itself(tensor):
        return (
            f"shares memory between its own elements in the state (shape {tuple(tensor.shape)}, "
            f"strides {tensor.stride()}); load into tensor.contiguous()"
        )
    return None


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    if not tensor.numel():
        return False
    # By ascending stride: no overlap if each stride is larger than all that the smaller ones span.
    reach = 0  # the largest offset within the dimensions so far, in elements
    is_sure = True  # no two elements overlap
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if not stride:
                return True
            is_sure &= stride > reach
            reach += stride * (size - 1)
    if is_sure:
        return False
    taken = np.zeros(reach + 1, np.bool_)  # interleaved strides: rare enough to count elements
    as_strided(taken, tensor.shape, tensor.stride())[...] = True
    return int(taken.sum()) < math.prod(tensor.shape)


def memory_of(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return what two tensors share exactly if they are the same elements of memory, in one order.

    A tensor on the meta device has no memory: it shares this with itself alone.
    """
    if tensor.is_meta:
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def check_room(fqn: str, tensor: torch.Tensor) -> None:
    """Check that `make_room` can allocate memory for a tensor on the meta device.

    Raises:
        InvalidInputError: its class cannot be made without the other ranks.
    """
    if not isinstance(tensor, DTensor) and type(tensor) not in _PLAIN:
        raise InvalidInputError(
            f"{fqn!r}, a {type(tensor).__name__} of shape {tuple(tensor.shape)}, is on the meta "
            "device, and a load cannot allocate memory for this class; move it to a real device "
            "(module.to_empty) first."
        )


def make_room(tensor: torch.Tensor) -> torch.Tensor:
    """Return an uninitialised tensor with memory in the form of one on the meta device.

    It is on the CPU, or on the accelerator if the process group supports only accelerators; for a
    DTensor, on the device of its mesh.
    """
    if isinstance(tensor, DTensor):
        device = torch.device(tensor.device_mesh.device_type)
        return distributed_like(tensor, torch.empty_like(tensor.to_local(), device=device))
    return torch.empty_like(tensor, device=_device())


def without_memory(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor on the meta device, distributed over the ranks as `tensor` is."""
    if isinstance(tensor, DTensor):
        local = torch.empty_like(tensor.to_local(), dtype=dtype, device="meta", requires_grad=False)
        return distributed_like(tensor, local)
    return torch.empty(tensor.shape, dtype=dtype, device="meta")


def _device() -> torch.device:
    """Return the device of a new plain tensor: the same that torch's DCP chooses."""
    if not dist.is_initialized() or "cpu:" in dist.get_backend_config():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")
