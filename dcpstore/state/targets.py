"""Tensors that a load fills: the memory that they have, share, or lack on the meta device.

Torch allocates memory for the meta device too, but needs a process group for that, and turns every
value of a kind that it does not know into None. Invariant: nothing is allocated before all ranks
agree that everything fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.lib.stride_tricks import as_strided
from torch.distributed.tensor import DTensor

from dcpstore.errors import InvalidInputError

__all__ = [
    "check_room",
    "is_same_memory",
    "make_room",
    "sharing_targets",
    "target_fault",
    "without_memory",
]

_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_MOST_WORK = 1_000_000  # candidates that numpy tries before it gives up on two meshing layouts


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
    reach = 0  # the last offset of the dimensions so far
    is_sure = True  # that no two elements meet
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if not stride:
                return True
            is_sure &= stride > reach
            reach += stride * (size - 1)
    if is_sure:
        return False
    taken = np.zeros(reach + 1, np.bool_)  # strides that mesh: rare enough to count
    as_strided(taken, tensor.shape, tensor.stride())[...] = True
    return int(taken.sum()) < math.prod(tensor.shape)


def sharing_targets(targets: Sequence[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """Yield the places of each two tensors that have an element of memory in common.

    Tensors without memory or elements have none. A tensor that shares with several is yielded with
    each that lies next to it in memory, so that no sharing tensor goes unnamed.
    """
    held = [
        i for i, t in enumerate(targets) if t.numel() and not t.is_meta and t.device.type != "meta"
    ]
    starts = np.array([targets[i].data_ptr() for i in held], np.uint64)
    lengths = np.array([_reach(targets[i]) for i in held], np.uint64)
    order = np.argsort(starts, kind="stable")
    ends = np.maximum.accumulate((starts + lengths)[order]) if held else lengths
    meets = np.flatnonzero(ends[:-1] > starts[order][1:])
    if not len(meets):
        return  # nearly always
    live: list[int] = []
    for i in (held[at] for at in order.tolist()):
        one = targets[i]
        live = [j for j in live if targets[j].data_ptr() + _reach(targets[j]) > one.data_ptr()]
        for j in live:
            if targets[j].device == one.device and _shares(targets[j], one):
                yield j, i
        live.append(i)


def is_same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors are the same elements of memory, in the same order."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.dtype == other.dtype
        and one.shape == other.shape
        and one.stride() == other.stride()
    )


def _reach(tensor: torch.Tensor) -> int:
    """Return the bytes from a tensor's first element to the end of its last."""
    if tensor.is_contiguous():
        return tensor.nbytes
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize


def _shares(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.is_contiguous() and other.is_contiguous():
        return True  # for they overlap
    most: Any = _MOST_WORK  # any number is taken, and numpy's stub has two of them
    try:
        return np.shares_memory(np.asarray(_Layout(one)), np.asarray(_Layout(other)), max_work=most)
    except np.exceptions.TooHardError:
        return True


class _Layout:
    """Where a tensor's elements lie, for numpy; their contents, of any device, are not read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        width = tensor.itemsize
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "typestr": f"|V{width}",
            "shape": tuple(tensor.shape),
            "strides": tuple(step * width for step in tensor.stride()),
        }


def check_room(fqn: str, tensor: torch.Tensor) -> None:
    """Check that `make_room` can make room for a tensor on the meta device.

    Raises:
        InvalidInputError: a tensor class of torch's that cannot be made without its other ranks.
    """
    if not isinstance(tensor, DTensor) and type(tensor) not in _PLAIN:
        raise InvalidInputError(
            f"{fqn!r}, a {type(tensor).__name__} of shape {tuple(tensor.shape)}, is on the meta "
            "device, and a load cannot make room for it; move it to a real device "
            "(module.to_empty) first."
        )


def make_room(tensor: torch.Tensor) -> torch.Tensor:
    """Return an uninitialised tensor like one that is on the meta device.

    It is on the CPU, or on the accelerator where the process group is for accelerators alone; a
    DTensor's is on the device of its mesh.
    """
    if isinstance(tensor, DTensor):
        device = torch.device(tensor.device_mesh.device_type)
        return _like_dtensor(tensor, torch.empty_like(tensor.to_local(), device=device))
    return torch.empty_like(tensor, device=_device())


def without_memory(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor on the meta device, laid out as `tensor` is over the ranks."""
    if isinstance(tensor, DTensor):
        local = torch.empty_like(tensor.to_local(), dtype=dtype, device="meta", requires_grad=False)
        return _like_dtensor(tensor, local)
    return torch.empty(tensor.shape, dtype=dtype, device="meta")


def _like_dtensor(tensor: DTensor, local: torch.Tensor) -> DTensor:
    return DTensor.from_local(
        local,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.size(),
        stride=tensor.stride(),
    )


def _device() -> torch.device:
    """Return the device of a new plain tensor: the one that torch chooses too."""
    if not dist.is_initialized() or "cpu:" in dist.get_backend_config():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")
