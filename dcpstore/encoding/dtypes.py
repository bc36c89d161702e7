"""Torch dtypes: one table of all that each format needs to know, and tensors as plain bytes.

A dtype that Zarr lacks (bfloat16, the float8 kinds, complex32) is stored as the unsigned integer of
its width, with torch's name beside it; no bit changes. Codecs, arrays, bridges and the
page of dtypes follow from `DTYPES`: a new dtype is one row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.parameter import is_lazy

from dcpstore.errors import InvalidInputError

__all__ = [
    "DTYPES",
    "MOST_DIMS",
    "PACKED",
    "Dtype",
    "as_bytes",
    "cast_dtype",
    "check_plain",
    "dtype_name",
    "numpy_dtype",
    "torch_dtype",
    "wanted_dtype",
]

MOST_DIMS = 64  # numpy's limit


@dataclass(frozen=True, slots=True)
class Dtype:
    """One dtype of torch; a row of the table.

    `stored` is the data type of Zarr and numpy under which its bytes are stored, `safetensors` the
    tag of that format, `storage` the class by which `torch.save` names its storages (it names the
    rest by dtype), `casts` the names by which a caller asks floats to be converted to it.
    `is_packed` says that an element is a byte of several numbers; torch's shapes count bytes.
    """

    torch: torch.dtype
    stored: str
    safetensors: str | None = None
    storage: Any = None
    casts: tuple[str, ...] = ()
    is_packed: bool = False

    @property
    def name(self) -> str:
        """Torch's name without the module."""
        return str(self.torch).removeprefix("torch.")

    @property
    def is_wide_float(self) -> bool:
        """Whether an element is a float past two bytes, or complex."""
        is_float = self.torch.is_floating_point or self.torch.is_complex
        return is_float and self.torch.itemsize > 2


DTYPES = (
    Dtype(torch.bool, "bool", "BOOL", torch.BoolStorage),
    Dtype(torch.uint8, "uint8", "U8", torch.ByteStorage),
    Dtype(torch.uint16, "uint16", "U16"),
    Dtype(torch.uint32, "uint32", "U32"),
    Dtype(torch.uint64, "uint64", "U64"),
    Dtype(torch.int8, "int8", "I8", torch.CharStorage),
    Dtype(torch.int16, "int16", "I16", torch.ShortStorage),
    Dtype(torch.int32, "int32", "I32", torch.IntStorage),
    Dtype(torch.int64, "int64", "I64", torch.LongStorage),
    Dtype(torch.bfloat16, "uint16", "BF16", torch.BFloat16Storage, ("bf16", "bfloat16")),
    Dtype(torch.float16, "float16", "F16", torch.HalfStorage, ("f16", "fp16", "float16")),
    Dtype(torch.float32, "float32", "F32", torch.FloatStorage, ("f32", "fp32", "float32")),
    Dtype(torch.float64, "float64", "F64", torch.DoubleStorage, ("f64", "fp64", "float64")),
    Dtype(torch.float8_e4m3fn, "uint8", "F8_E4M3", casts=("float8_e4m3fn",)),
    Dtype(torch.float8_e4m3fnuz, "uint8", "F8_E4M3FNUZ"),
    Dtype(torch.float8_e5m2, "uint8", "F8_E5M2", casts=("float8_e5m2",)),
    Dtype(torch.float8_e5m2fnuz, "uint8", "F8_E5M2FNUZ"),
    Dtype(torch.float8_e8m0fnu, "uint8", "F8_E8M0"),
    Dtype(torch.float4_e2m1fn_x2, "uint8", is_packed=True),
    Dtype(torch.complex32, "uint32"),
    Dtype(torch.complex64, "complex64", "C64", torch.ComplexFloatStorage),
    Dtype(torch.complex128, "complex128", None, torch.ComplexDoubleStorage),
)
_DTYPES = {row.name: row.torch for row in DTYPES}
PACKED = frozenset(row.torch for row in DTYPES if row.is_packed)
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_NUMPY: dict[str, np.dtype[np.generic]] = {row.name: np.dtype(row.stored) for row in DTYPES}
_SAME_WIDTH = {row.torch: _DTYPES[row.stored] for row in DTYPES if row.stored != row.name}
_CASTS = {name: row.torch for row in DTYPES for name in row.casts}


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


def wanted_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the dtype that a caller asks floats to be converted to; None keeps each tensor's own.

    Raises:
        InvalidInputError: floats cannot be converted to it.
    """
    found = _CASTS.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in _CASTS.values():
        raise InvalidInputError(
            f"tensors cannot be converted to dtype {dtype!r}; choose one of {', '.join(_CASTS)}."
        )
    return found


def cast_dtype(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """Return the dtype of a tensor of `dtype` after a conversion: only floats are converted."""
    if wanted is None or not dtype.is_floating_point or dtype in PACKED:
        return dtype  # two numbers in an element: a conversion would change the shape
    return wanted


def check_plain(tensor: torch.Tensor) -> None:
    """Check that a tensor, of any device, has plain bytes and owns them.

    Raises:
        InvalidInputError: a dtype without plain bytes; a sparse, nested, lazy or otherwise special
            tensor; one without data, for it is on the meta device or its storage was freed.
    """
    kind = type(tensor)
    is_tensor = kind is torch.Tensor or kind is torch.nn.Parameter  # the usual case, checked fast
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
    count = tensor.numel()
    last = (
        count - 1
        if tensor.is_contiguous()
        else sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    )
    reached = (int(tensor.storage_offset()) + last + 1) * tensor.itemsize
    if reached > held and count:
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
    if tensor.requires_grad:  # numpy refuses it
        tensor = tensor.detach()
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    stand_in = _SAME_WIDTH.get(tensor.dtype)
    if stand_in is not None:
        tensor = tensor.view(stand_in)
    array: npt.NDArray[np.generic] = tensor.numpy()
    return array
