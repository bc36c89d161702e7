"""Tensors that a load is asked to fill: whether each element has a place of its own."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided

__all__ = ["target_fault"]


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
