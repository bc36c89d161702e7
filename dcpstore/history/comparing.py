"""Two arrays of stored elements, held against each other in numbers, whatever their dtypes.

Elements become float64 (or complex128) by blocks, so that nothing large is ever copied whole. They
count as changed by their bits where the dtypes are equal, as digests see them; else by their value.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from dcpstore.encoding.dtypes import torch_dtype
from dcpstore.history.stats import TensorStats

__all__ = ["compare"]

Array = npt.NDArray[np.generic]
Numbers = npt.NDArray[np.inexact]
_BLOCK = 1 << 18  # elements that are numbers at the same time
_WIDE = ("int64", "uint64")  # whose values need more bits than float64 has
# The eight magnitudes of a float4_e2m1fn, by its lower three bits; the fourth is the sign.
_FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def compare(old: Array, new: Array, *, old_dtype: str, new_dtype: str) -> TensorStats:
    """Return the numbers about arrays of one shape, in the dtypes under which they are stored.

    `elements` is left 0: what is compared here is a piece of the tensor.
    """
    flat_old = np.ascontiguousarray(old).reshape(-1)
    flat_new = np.ascontiguousarray(new).reshape(-1)
    total = TensorStats()
    # What is not finite is counted, and an overflow shows as infinite: neither is to be warned of.
    with np.errstate(invalid="ignore", over="ignore"):
        for at in range(0, flat_new.size, _BLOCK):
            piece = slice(at, at + _BLOCK)
            total += _compare_block(flat_old[piece], flat_new[piece], old_dtype, new_dtype)
    return total


def _compare_block(old: Array, new: Array, old_dtype: str, new_dtype: str) -> TensorStats:
    before, after = _numbers(old, old_dtype), _numbers(new, new_dtype)
    same_kind = old_dtype == new_dtype
    difference: Numbers = after - before
    if same_kind and new_dtype in _WIDE:
        difference = _wide_difference(old, new)
    changed = _bits_differ(old, new) if same_kind else _values_differ(before, after)
    nan_old, nan_new = np.isnan(before), np.isnan(after)
    inf_old, inf_new = np.isinf(before), np.isinf(after)
    odd = nan_old | nan_new | inf_old | inf_new
    if odd.any():
        before, after, difference = before[~odd], after[~odd], difference[~odd]
    return TensorStats(
        compared=new.size,
        changed=int(np.count_nonzero(changed)),
        squared_difference=_dot(difference, difference),
        squared_old=_dot(before, before),
        squared_new=_dot(after, after),
        product=_dot(before, after),
        max_abs=float(np.abs(difference).max(initial=0.0)),
        nan_old=int(np.count_nonzero(nan_old)),
        nan_new=int(np.count_nonzero(nan_new)),
        inf_old=int(np.count_nonzero(inf_old)),
        inf_new=int(np.count_nonzero(inf_new)),
    )


def _numbers(raw: Array, dtype: str) -> Numbers:
    """Return stored elements as numbers; two for each element of float4_e2m1fn_x2."""
    if dtype == "bfloat16":
        return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype == "complex32":
        return raw.view(np.float16).astype(np.float64).view(np.complex128)
    if dtype == "float4_e2m1fn_x2":
        nibbles = np.stack((raw.astype(np.uint8) & 15, raw.astype(np.uint8) >> 4), -1).reshape(-1)
        pairs: Numbers = np.where(nibbles & 8, -1.0, 1.0) * _FLOAT4[nibbles & 7]
        return pairs
    if dtype.startswith("float8"):
        every = torch.arange(256, dtype=torch.uint8, device="cpu").view(torch_dtype(dtype))
        values: Numbers = every.to(torch.float32).numpy().astype(np.float64)[raw.view(np.uint8)]
        return values
    return raw.astype(np.complex128 if raw.dtype.kind == "c" else np.float64)


def _wide_difference(old: Array, new: Array) -> Numbers:
    """Return new - old of 64-bit integers, rounded once, where float64 would round both first."""
    (old_high, old_low), (new_high, new_low) = _halves(old), _halves(new)
    difference: Numbers = (new_high - old_high) * 2.0**32 + (new_low - old_low)
    return difference


def _halves(raw: Array) -> tuple[Numbers, Numbers]:
    """Return 64-bit integers as two numbers each: upper half, signed as they are, and lower."""
    halves = raw.view(np.uint32).reshape(-1, 2)
    high = halves[:, 1].view(np.int32) if raw.dtype.kind == "i" else halves[:, 1]
    return high.astype(np.float64), halves[:, 0].astype(np.float64)


def _bits_differ(old: Array, new: Array) -> npt.NDArray[np.bool_]:
    words = old.dtype.itemsize // 8 if old.dtype.itemsize > 8 else 1
    word = np.dtype(f"u{old.dtype.itemsize // words}")
    differ = np.asarray(old.view(word) != new.view(word)).reshape(-1, words)
    return np.asarray(differ.any(axis=1))


def _values_differ(before: Numbers, after: Numbers) -> npt.NDArray[np.bool_]:
    differ: npt.NDArray[np.bool_] = ~((before == after) | (np.isnan(before) & np.isnan(after)))
    return differ


def _dot(one: Numbers, other: Numbers) -> float:
    """Return the sum of products; the real part of it for complex numbers."""
    return float(np.vdot(one, other).real)
