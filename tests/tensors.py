"""Tensors of every dtype that is stored, of random bits, and when two are the same."""

from __future__ import annotations

import torch

from dcpstore.encoding import dtypes
from dcpstore.encoding.dtypes import as_bytes

DTYPES = [row.torch for row in dtypes.DTYPES if not row.is_packed]


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
