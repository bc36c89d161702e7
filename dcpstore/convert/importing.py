"""A foreign checkpoint on its way into a repository: what it holds, and the planner that saves it.

Every bridge describes its checkpoint as a `Foreign`; one planner takes that through the real save,
which asks for a chunk at a time (invariant: a tensor is never held as a whole).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import WriteItem

from dcpstore.api import RepositoryLike, save
from dcpstore.convert.exporting import converted, wanted_dtype
from dcpstore.errors import InvalidInputError
from dcpstore.formats.composition import imported_value
from dcpstore.geometry.boxes import Box
from dcpstore.planning import DefaultSavePlanner
from dcpstore.records import ObjectPath, Version
from dcpstore.state.tree import flattened, joined_path

__all__ = ["Foreign", "ForeignTensor", "ImportPlanner", "Naming", "save_foreign"]


class ForeignTensor(Protocol):
    """A tensor that is read a box at a time; threads ask at once."""

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
    """A tensor that a format keeps inside a value, and so came with it."""

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
        """Enter a tensor.

        Raises:
            InvalidInputError: the FQN is taken.
        """
        self._enter(fqn, path)
        self.tensors[fqn] = tensor

    def add_value(self, fqn: str, path: ObjectPath, value: object) -> None:
        """Enter a value, flattened as DCP does it where it is nested.

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
        """Keep the tensors alone."""
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
    """Plans a save of a foreign checkpoint by this process alone; the save's own state is empty.

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
        empty = {
            fqn: torch.empty(
                tensor.shape, dtype=converted(tensor.dtype, self._wanted), device="meta"
            )
            for fqn, tensor in self._foreign.tensors.items()
        }
        self.state_dict = {**empty, **self._foreign.values}
        self.mappings = dict(self._foreign.paths)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return a value, or the whole of a tensor, which a save asks for by `resolve_box`."""
        if index.fqn in self._foreign.values:
            return self._foreign.values[index.fqn]
        return self._read(index.fqn, Box.whole(self._foreign.tensors[index.fqn].shape))

    def resolve_box(self, write_item: WriteItem, box: Box) -> torch.Tensor:
        """Return the elements of a box, converted where that was asked."""
        return self._read(write_item.index.fqn, box)

    def _read(self, fqn: str, box: Box) -> torch.Tensor:
        tensor = self._foreign.tensors[fqn]
        return tensor.read(box).to(converted(tensor.dtype, self._wanted))


@dataclass(frozen=True, slots=True)
class Naming:
    """How the version that an import makes is found again."""

    branch: str
    step: int | None
    tags: tuple[str, ...]
    message: str


def save_foreign(
    foreign: Foreign,
    repo: RepositoryLike,
    naming: Naming,
    *,
    dtype: str | torch.dtype | None,
    allow_pickle: bool,
) -> Version:
    """Save a foreign checkpoint as a version, in this process alone."""
    return save(
        {},
        repo,
        branch=naming.branch,
        step=naming.step,
        tags=naming.tags,
        message=naming.message,
        planner=ImportPlanner(foreign, wanted_dtype(dtype)),
        no_dist=True,
        allow_pickle=allow_pickle,
    )
