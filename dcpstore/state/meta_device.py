"""Memory for tensors on the meta device, allocated before a load fills them.

Torch allocates it too, but needs a process group for that, and turns every value of a kind that it
does not know into None. Invariant: nothing is allocated before all ranks agree that everything
fits.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dcpstore.errors import InvalidInputError

__all__ = ["check_room", "make_room", "without_memory"]

_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def check_room(fqn: str, tensor: torch.Tensor) -> None:
    """Check that `make_room` can make room for a tensor on the meta device.

    Raises:
        InvalidInputError: a tensor class of torch's that no one can make without its ranks.
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
    """Return where a plain tensor is to be: torch's choice, in words that are public."""
    if not dist.is_initialized() or "cpu:" in dist.get_backend_config():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")
