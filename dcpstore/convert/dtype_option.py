"""The dtype that a caller asks floats to be converted to, by its usual names."""

from __future__ import annotations

import torch

from dcpstore.encoding.dtypes import PACKED
from dcpstore.errors import InvalidInputError

__all__ = ["converted", "wanted_dtype"]

_NAMES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "f16": torch.float16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "f32": torch.float32,
    "fp32": torch.float32,
    "float32": torch.float32,
    "f64": torch.float64,
    "fp64": torch.float64,
    "float64": torch.float64,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}


def wanted_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the dtype that a caller names; None keeps every tensor's own.

    Raises:
        InvalidInputError: no name of a dtype that floats can be converted to.
    """
    found = _NAMES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in _NAMES.values():
        raise InvalidInputError(
            f"dtype {dtype!r} is none that tensors can be converted to; choose one of "
            f"{', '.join(_NAMES)}."
        )
    return found


def converted(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """Return what a tensor of `dtype` becomes: only floating ones are converted."""
    if wanted is None or not dtype.is_floating_point or dtype == PACKED:
        return dtype  # of two numbers in an element no conversion keeps the shape
    return wanted
