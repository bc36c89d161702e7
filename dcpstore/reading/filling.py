"""The memory that a read fills: a box of a tensor, taken chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dcpstore.encoding.dtypes import as_bytes, torch_dtype
from dcpstore.geometry.boxes import Box
from dcpstore.records import EntryRecord

__all__ = ["BoxRequest", "Filling"]


@dataclass(frozen=True, slots=True)
class BoxRequest:
    """A box of a stored tensor, and the tensor of the same sizes that it fills."""

    entry: EntryRecord
    box: Box
    target: torch.Tensor


class Filling:
    """What one request has to do for each chunk, found out once.

    Where stored and target dtype differ the values are converted, as `Tensor.copy_` does.
    """

    def __init__(self, request: BoxRequest) -> None:
        assert request.entry.tensor is not None
        self.entry = request.entry
        self._tensor = request.entry.tensor
        self._box, self._target = request.box, request.target
        self._dtype = torch_dtype(self._tensor.dtype)
        is_plain = (
            self._target.device.type == "cpu"
            and self._target.dtype == self._dtype
            and not (self._target.is_conj() or self._target.is_neg())  # their bytes are others
        )
        self._memory = as_bytes(self._target) if is_plain else None
        parts = self._tensor.parts
        # most tensors are small: one chunk, wanted whole
        self._is_one_cell = (
            len(parts) == 1 and parts[0].is_one_cell and parts[0].shape == self._box.sizes
        )

    def take(self, array: npt.NDArray[np.generic], part: int, ordinal: int) -> None:
        """Copy what a chunk holds of the box; `array` is its cell, padding included."""
        if self._is_one_cell and self._memory is not None:
            self._memory[...] = array
            return
        cell = self._tensor.parts[part].cell(ordinal)
        shared = cell.intersect(self._box)
        if shared is None:
            return
        piece = array[shared.relative_to(cell).slices]
        where = shared.relative_to(self._box).slices
        if self._memory is not None:
            self._memory[where] = piece
            return
        source = torch.from_numpy(piece.copy())
        same = source.dtype == self._dtype
        with torch.inference_mode(self._target.is_inference()):  # where alone those are written
            self._target[where].copy_(source if same else source.view(self._dtype))
