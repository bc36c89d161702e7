"""A foreign checkpoint on its way into a repository: what it holds, and the planner that saves it.

Every bridge describes its checkpoint as a `Foreign`, whose tensors mostly are in files; one planner
saves that by the normal save, which asks for a chunk at a time (invariant: a tensor is never
held as a whole).
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Unpack

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import WriteItem

from dcpstore.api import RepositoryLike, save
from dcpstore.encoding.dtypes import as_bytes, cast_dtype, dtype_name, numpy_dtype, wanted_dtype
from dcpstore.errors import CorruptionError, InvalidInputError
from dcpstore.formats.composition import imported_value
from dcpstore.geometry.boxes import Box, find_overlap
from dcpstore.planning import DefaultSavePlanner
from dcpstore.records import ObjectPath, Version
from dcpstore.saving.request import VersionOptions
from dcpstore.state.tree import flattened, joined_path

__all__ = [
    "FileBox",
    "FileTensor",
    "Foreign",
    "ForeignTensor",
    "ImportPlanner",
    "row_major",
    "save_foreign",
]


@dataclass(frozen=True, slots=True)
class FileBox:
    """A box of a tensor as it is stored in a file, little-endian.

    `offset` is that of its first element, in bytes; `strides` are in elements. With `is_conj` or
    `is_neg` the stored elements are conjugated, or negated, when they are read.
    """

    path: Path
    box: Box
    offset: int
    strides: tuple[int, ...]
    is_conj: bool = False
    is_neg: bool = False

    def read(self, box: Box, dtype: torch.dtype) -> torch.Tensor:
        """Return a copy of the elements of `box`, which must be inside this one.

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
        # A map begins at the start of a page; only pages that the box touches are read.
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
            view: np.ndarray[tuple[int, ...], np.dtype[np.generic]] = np.ndarray(
                box.sizes, stored, mapped, first - begin, strides
            )
            copied = view.copy(order="C")
            del view  # a map cannot be closed while a view of it exists
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
                f"{str(self.path)!r} has {size} bytes, and a tensor in it is at {self.offset} to "
                f"{end}; it is truncated or damaged: copy it again from its source."
            )

    def _span(self, sizes: Sequence[int]) -> int:
        """Return the elements from the first one of a box to its last one."""
        return 1 + sum((n - 1) * s for n, s in zip(sizes, self.strides, strict=True))


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor whose pieces are in files; `dtype` is that in the files."""

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
        """Check that the pieces are inside the tensor and tile it.

        Raises:
            CorruptionError: they do not; the message has `name`.
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


class ForeignTensor(Protocol):
    """A tensor that is read a box at a time, by several threads at once."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""

    @property
    def shape(self) -> tuple[int, ...]:
        """In elements."""

    def read(self, box: Box) -> torch.Tensor:
        """Return the elements of a box."""


@dataclass(frozen=True, slots=True)
class _InMemory:
    """A tensor that a format keeps inside a value, and that was read with it."""

    tensor: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self, box: Box) -> torch.Tensor:
        return self.tensor[box.slices]


@dataclass(slots=True)
class Foreign:
    """What a checkpoint of another format holds, by FQN."""

    tensors: dict[str, ForeignTensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, ObjectPath] = field(default_factory=dict)

    def add_tensor(self, fqn: str, path: ObjectPath, tensor: ForeignTensor) -> None:
        """Add a tensor.

        Raises:
            InvalidInputError: the FQN is taken.
        """
        self._enter(fqn, path)
        self.tensors[fqn] = tensor

    def add_value(self, fqn: str, path: ObjectPath, value: object) -> None:
        """Add a value, flattened as DCP does it where it is nested.

        Raises:
            InvalidInputError: an FQN is taken.
        """
        flat = flattened({fqn: value})
        for name, item in flat.items.items():
            whole = joined_path(path, flat.paths.recorded(name))
            if isinstance(item, torch.Tensor):
                self.add_tensor(name, whole, _InMemory(item.detach()))
            else:
                self._enter(name, whole)
                self.values[name] = imported_value(name, item)

    def leave_values_out(self) -> None:
        """Keep only the tensors."""
        for fqn in self.values:
            del self.paths[fqn]
        self.values.clear()

    def _enter(self, fqn: str, path: ObjectPath) -> None:
        if fqn in self.paths:
            raise InvalidInputError(
                f"two items of the checkpoint have the FQN {fqn!r}, at {self.paths[fqn]} and "
                f"{path}; rename one of them before the import."
            )
        self.paths[fqn] = path


class ImportPlanner(DefaultSavePlanner):
    """Plans the save of a foreign checkpoint in this process; the state given to save is empty.

    Args:
        foreign: what to save.
        dtype: what floating tensors are converted to, None for nothing.
    """

    def __init__(self, foreign: Foreign, dtype: torch.dtype | None) -> None:
        super().__init__()
        self._foreign = foreign
        self._wanted = dtype

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the foreign checkpoint as the state, its tensors without their data."""
        super().set_up_planner(state_dict, storage_meta, is_coordinator)
        # On the meta device: a plan needs shapes and dtypes, and no memory is taken.
        empty = {
            fqn: torch.empty(
                tensor.shape, dtype=cast_dtype(tensor.dtype, self._wanted), device="meta"
            )
            for fqn, tensor in self._foreign.tensors.items()
        }
        self.state_dict = {**empty, **self._foreign.values}
        self.mappings = dict(self._foreign.paths)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return a value or a whole tensor; a save reads tensors by `resolve_box`."""
        if index.fqn in self._foreign.values:
            return self._foreign.values[index.fqn]
        return self._read(index.fqn, Box.whole(self._foreign.tensors[index.fqn].shape))

    def resolve_box(self, write_item: WriteItem, box: Box) -> torch.Tensor:
        """Return the elements of a box, converted to the wanted dtype."""
        return self._read(write_item.index.fqn, box)

    def _read(self, fqn: str, box: Box) -> torch.Tensor:
        tensor = self._foreign.tensors[fqn]
        return tensor.read(box).to(cast_dtype(tensor.dtype, self._wanted))


def save_foreign(
    foreign: Foreign,
    repo: RepositoryLike,
    *,
    dtype: str | torch.dtype | None,
    allow_pickle: bool,
    **options: Unpack[VersionOptions],
) -> Version:
    """Save a foreign checkpoint as a version, in this process alone."""
    return save(
        {},
        repo,
        planner=ImportPlanner(foreign, wanted_dtype(dtype)),
        no_dist=True,
        allow_pickle=allow_pickle,
        **options,
    )
