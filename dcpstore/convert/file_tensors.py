"""Tensors in files, read one box at a time.

Invariant: nothing of a file stays in memory, mapped or copied, after the read of one box; so a
checkpoint of any size passes through the memory of a few chunks.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dcpstore.encoding.dtypes import as_bytes, dtype_name, numpy_dtype
from dcpstore.errors import CorruptionError
from dcpstore.geometry.boxes import Box, find_overlap

__all__ = ["FileBox", "FileTensor", "row_major"]


@dataclass(frozen=True, slots=True)
class FileBox:
    """A box of a tensor as it lies in a file, little-endian.

    `offset` is where its first element lies, in bytes; `strides` are in elements. What lies there
    is still to be conjugated, or negated, where `is_conj` or `is_neg` say so.
    """

    path: Path
    box: Box
    offset: int
    strides: tuple[int, ...]
    is_conj: bool = False
    is_neg: bool = False

    def read(self, box: Box, dtype: torch.dtype) -> torch.Tensor:
        """Return a copy of the elements of `box`, which lies inside this one.

        Raises:
            CorruptionError: the file ends before the box does.
        """
        stored = numpy_dtype(dtype_name(dtype))
        if not box.volume:
            return torch.empty(box.sizes, dtype=dtype, device="cpu")
        inside = box.relative_to(self.box)
        skipped = sum(o * s for o, s in zip(inside.offsets, self.strides, strict=True))
        first = self.offset + skipped * stored.itemsize
        length = self._span(box.sizes) * stored.itemsize
        begin = first - first % mmap.ALLOCATIONGRANULARITY
        with self.path.open("rb") as file:
            try:
                mapped = mmap.mmap(
                    file.fileno(), first + length - begin, access=mmap.ACCESS_READ, offset=begin
                )
            except ValueError as error:  # the file is shorter
                raise CorruptionError(
                    f"{str(self.path)!r} ends before offset {first + length}; it is truncated, or "
                    "was changed meanwhile: copy it again from its source."
                ) from error
        with mapped:
            strides = tuple(s * stored.itemsize for s in self.strides)
            lying: np.ndarray[tuple[int, ...], np.dtype[np.generic]] = np.ndarray(
                box.sizes, stored, mapped, first - begin, strides
            )
            copied = lying.copy(order="C")
            del lying  # the map cannot be closed under it
        tensor = torch.from_numpy(copied).view(dtype)
        if self.is_conj:
            tensor = tensor.conj().resolve_conj()
        return tensor.neg() if self.is_neg else tensor

    def check(self, dtype: torch.dtype, size: int) -> None:
        """Check that a file of `size` bytes holds this box.

        Raises:
            CorruptionError: it does not.
        """
        end = self.offset + self._span(self.box.sizes) * dtype.itemsize
        if self.offset < 0 or any(s < 0 for s in self.strides) or (self.box.volume and end > size):
            raise CorruptionError(
                f"{str(self.path)!r} has {size} bytes, and a tensor in it lies at {self.offset} to "
                f"{end}; it is truncated or damaged: copy it again from its source."
            )

    def _span(self, sizes: Sequence[int]) -> int:
        """Return the elements from the first one of a box to its last one."""
        return 1 + sum((n - 1) * s for n, s in zip(sizes, self.strides, strict=True))


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor whose pieces lie in files; `dtype` is that in the files."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[FileBox, ...]

    def read(self, box: Box) -> torch.Tensor:
        """Return a copy of the elements of `box`."""
        if len(self.pieces) == 1:
            return self.pieces[0].read(box, self.dtype)
        whole = torch.empty(box.sizes, dtype=self.dtype, device="cpu")
        for piece in self.pieces:
            shared = piece.box.intersect(box)
            if shared is not None:
                target = as_bytes(whole)[shared.relative_to(box).slices]
                target[...] = as_bytes(piece.read(shared, self.dtype))
        return whole

    def check(self, name: str) -> None:
        """Check that the pieces lie inside the tensor and tile it.

        Raises:
            CorruptionError: they do not; `name` is said in the message.
        """
        boxes = [piece.box for piece in self.pieces]
        whole = Box.whole(self.shape)
        outside = [
            box
            for box in boxes
            if len(box.sizes) != len(self.shape)
            or any(o < 0 or n < 0 for o, n in zip(box.offsets, box.sizes, strict=True))
            or any(stop > n for stop, n in zip(box.stops, self.shape, strict=True))
        ]
        if (
            not boxes
            or outside
            or find_overlap(boxes)
            or sum(b.volume for b in boxes) != whole.volume
        ):
            raise CorruptionError(
                f"{name!r} of shape {self.shape} is not tiled by its {len(boxes)} pieces; the "
                "checkpoint is incomplete or damaged: copy it again from its source."
            )


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides, in elements, of a contiguous tensor."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return tuple(strides)
