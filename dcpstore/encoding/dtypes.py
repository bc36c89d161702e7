"""Torch dtypes: their names, and how their bytes appear to numpy and Zarr.

A dtype that Zarr lacks (bfloat16, the float8 kinds, complex32) is stored as the unsigned integer of
its width, with torch's name beside it; no bit changes on the way.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from dcpstore.errors import InvalidInputError

__all__ = ["as_bytes", "dtype_name", "numpy_dtype", "torch_dtype"]

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
# An element of float4_e2m1fn_x2 is a byte that holds two numbers; torch's shapes count bytes too.
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


def as_bytes(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """Return a view of a CPU tensor as an array of the stored dtype, of the same shape and strides.

    No byte is copied but of lazily conjugated or negated tensors, whose bytes do not exist yet. The
    array writes through to the tensor, except for those.

    Raises:
        InvalidInputError: a dtype without plain bytes, or a sparse or otherwise special layout.
    """
    if tensor.layout is not torch.strided:
        raise InvalidInputError(
            f"a tensor of layout {tensor.layout} has no plain bytes; store tensor.to_dense(), or "
            "its indices and values."
        )
    name = dtype_name(tensor.dtype)
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if name in _REINTERPRETED:
        tensor = tensor.view(_DTYPES[f"uint{8 * tensor.dtype.itemsize}"])
    array: npt.NDArray[np.generic] = tensor.numpy()
    return array
