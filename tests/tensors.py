"""Tensors of every dtype that is stored, of random bits, and when two are the same."""

from __future__ import annotations

import torch

from dcpstore.encoding.dtypes import as_bytes

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
    torch.complex32,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]


def raw(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Return a tensor of random bits: NaNs of every kind among them."""
    if dtype is torch.bool:
        return torch.randint(0, 2, shape).bool()
    return torch.randint(0, 256, (*shape, dtype.itemsize)).to(torch.uint8).view(dtype)[..., 0]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Tell whether two tensors are equal in dtype, shape and every bit."""
    return (
        a.dtype == b.dtype and a.shape == b.shape and as_bytes(a).tobytes() == as_bytes(b).tobytes()
    )
