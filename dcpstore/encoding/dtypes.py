"""Torch dtypes: their names, and how their bytes appear to numpy and Zarr.

A dtype that Zarr lacks (bfloat16, the float8 kinds, complex32) is stored as the unsigned integer of
its width, with torch's name beside it; no bit changes on the way.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.parameter import is_lazy

from dcpstore.errors import InvalidInputError

__all__ = [
    "MOST_DIMS",
    "PACKED",
    "as_bytes",
    "check_plain",
    "dtype_name",
    "numpy_dtype",
    "torch_dtype",
]

MOST_DIMS = 64  # numpy's limit

_NATIVE = [
    "bool",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "float32",
    "float64",
    "complex64",
    "complex128",
]
PACKED = torch.float4_e2m1fn_x2  # an element is a byte of two numbers; torch's shapes count bytes
_REINTERPRETED = [
    "bfloat16",
    "complex32",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "float4_e2m1fn_x2",
]
_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in (*_NATIVE, *_REINTERPRETED)
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_NUMPY: dict[str, np.dtype[np.generic]] = {name: np.dtype(name) for name in _NATIVE} | {
    name: np.dtype(f"uint{8 * _DTYPES[name].itemsize}") for name in _REINTERPRETED
}


def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's name without the module, such as "bfloat16".

    Raises:
        InvalidInputError: quantized and other dtypes that have no plain bytes.
    """
    name = _NAMES.get(dtype)
    if name is None:
        raise InvalidInputError(
            f"dtype {dtype} cannot be stored; convert the tensor to one of {', '.join(_DTYPES)}."
        )
    return name


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype called `name` in a catalog.

    Raises:
        InvalidInputError: this dcpstore does not know it.
    """
    try:
        return _DTYPES[name]
    except KeyError:
        raise InvalidInputError(
            f"the version holds dtype {name!r}, which this dcpstore does not know; update dcpstore."
        ) from None


def numpy_dtype(name: str) -> np.dtype[np.generic]:
    """Return the numpy dtype under which the bytes of torch dtype `name` are stored."""
    torch_dtype(name)
    return _NUMPY[name]


def check_plain(tensor: torch.Tensor) -> None:
    """Check that a tensor, of any device, has plain bytes and owns them.

    Raises:
        InvalidInputError: a dtype without plain bytes; a sparse, nested, lazy or otherwise special
            tensor; one without data, for it is on the meta device or its storage was freed.
    """
    kind = type(tensor)
    is_tensor = kind is torch.Tensor or kind is torch.nn.Parameter  # mostly, and quick
    if not is_tensor and is_lazy(tensor):
        raise InvalidInputError(
            f"a {kind.__name__} has neither shape nor bytes yet; run its module once, or leave it "
            "out."
        )
    if tensor.is_nested:
        raise InvalidInputError(
            "a nested tensor has no plain bytes; store tensor.to_padded_tensor(...), or its parts "
            "by tensor.unbind()."
        )
    if not is_tensor and kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise InvalidInputError(
            f"a {kind.__module__}.{kind.__qualname__} has no plain bytes of its own; store the "
            "tensors that it is made of."
        )
    if tensor.layout is not torch.strided:
        raise InvalidInputError(
            f"a tensor of layout {tensor.layout} has no plain bytes; store tensor.to_dense(), or "
            "its indices and values."
        )
    dtype_name(tensor.dtype)
    if tensor.is_meta:
        raise InvalidInputError(
            "a tensor on the meta device has no data; fill it first, or leave it out."
        )
    if tensor.dim() > MOST_DIMS:
        raise InvalidInputError(
            f"a tensor of {tensor.dim()} dimensions has more than {MOST_DIMS}; reshape it."
        )
    _check_owned(tensor)


def _check_owned(tensor: torch.Tensor) -> None:
    """Check that a tensor's storage, which can be resized under it, holds all of its elements."""
    try:
        held = tensor.untyped_storage().nbytes()
    except NotImplementedError:  # of a device whose memory torch does not see
        return
    last = (
        tensor.numel() - 1
        if tensor.is_contiguous()
        else sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    )
    reached = (int(tensor.storage_offset()) + last + 1) * tensor.itemsize
    if tensor.numel() and reached > held:
        raise InvalidInputError(
            f"a tensor of {tensor.nbytes} bytes reaches to byte {reached} of a storage that has "
            f"{held}: it was freed or resized; give it its memory back first, as FSDP does for "
            "state_dict()."
        )


def as_bytes(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """Return a view of a CPU tensor as an array of the stored dtype, of the same shape and strides.

    No byte is copied but of lazily conjugated or negated tensors, whose bytes do not exist yet. The
    array writes through to the tensor, except for those.

    Raises:
        InvalidInputError: it has no plain bytes, as `check_plain` says.
    """
    check_plain(tensor)
    name = _NAMES[tensor.dtype]
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if name in _REINTERPRETED:
        tensor = tensor.view(_DTYPES[f"uint{8 * tensor.dtype.itemsize}"])
    array: npt.NDArray[np.generic] = tensor.numpy()
    return array
