"""A version through torch's own FileSystemWriter, box after box.

The writer holds the tensors of one file until it is written (torch 2.13 collects them for another
format), so it is given many small files, each of some boxes of tensors; that bounds its memory.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from dcpstore.convert.exporting import ExportedTensor, ExportedVersion
from dcpstore.encoding.values import PlannerBytes
from dcpstore.geometry.boxes import Box
from dcpstore.planning import DefaultSavePlanner
from dcpstore.planning.balance import item_nbytes
from dcpstore.planning.checks import item_box

__all__ = ["ExportPlanner", "write_folder"]

_FILE = 128 << 20  # bytes of the tensors in one file


class ExportPlanner(DefaultSavePlanner):
    """Plans the save of a version by torch's storage; the save's own state is empty.

    Args:
        version: whose tensors are written.
        values: by FQN.
    """

    def __init__(self, version: ExportedVersion, values: Mapping[str, object]) -> None:
        super().__init__()
        self._version = version
        self._values = values
        self._tensors = {tensor.fqn: tensor for tensor in version.tensors}

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the paths of the version, under which torch's loads nest it again."""
        super().set_up_planner(state_dict, storage_meta, is_coordinator)
        named = self._tensors.keys() | self._values.keys()
        self.mappings = {
            fqn: tuple(path) for fqn, path in self._version.paths.items() if fqn in named
        }

    def create_local_plan(self) -> SavePlan:
        """Return an item for each box of a tensor, and one for each value."""
        items = [WriteItem(MetadataIndex(fqn), WriteItemType.BYTE_IO) for fqn in self._values]
        for tensor in self._tensors.values():
            items += _items(tensor)
        self.plan = SavePlan(items, planner_data=self.mappings)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return a value, or the box of a tensor, read and verified now."""
        return self._values[index.fqn]

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Return the box of a tensor, read and verified now, or torch's bytes of a value."""
        if write_item.tensor_data is None:
            value = self._values[write_item.index.fqn]
            if isinstance(value, PlannerBytes):  # what a planner of its own made of a value
                return io.BytesIO(value)
            return super().resolve_data(write_item)
        return self._version.read(self._tensors[write_item.index.fqn], item_box(write_item))


def write_folder(folder: Path, planner: ExportPlanner) -> int:
    """Fill an empty folder with what the planner plans; return the number of files.

    These are the steps of `torch.distributed.checkpoint.save` on one rank, without its exception
    that is no Exception and without a process group. Whoever names the folder syncs it.
    """
    writer = FileSystemWriter(
        folder, sync_files=False
    )  # the whole folder is synced before its name
    planner.set_up_planner({}, writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(True)
    (plan,), described = planner.create_global_plan(
        [writer.prepare_local_plan(planner.create_local_plan())]
    )
    (plan,) = writer.prepare_global_plan([plan])
    results = []
    for part in _parts(planner.finish_plan(plan)):
        done = writer.write_data(part, planner)
        results += done.wait()
    writer.finish(described, [results])
    return sum(1 for _ in folder.iterdir())


def _parts(plan: SavePlan) -> Iterator[SavePlan]:
    """Yield plans of some items each, every one with a prefix of its own for its file."""
    parts: list[list[WriteItem]] = [[]]
    nbytes = 0
    for item in plan.items:
        if parts[-1] and nbytes + item_nbytes(item) > _FILE:
            parts.append([])
            nbytes = 0
        parts[-1].append(item)
        nbytes += item_nbytes(item)
    for i, items in enumerate(parts):
        named = replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{i}_")
        yield replace(plan, items=items, storage_data=named)


def _items(tensor: ExportedTensor) -> Iterator[WriteItem]:
    for box in tensor.boxes() or [Box.whole(tensor.shape)]:
        offsets, sizes = torch.Size(box.offsets), torch.Size(box.sizes)
        yield WriteItem(
            index=MetadataIndex(tensor.fqn, offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offsets, sizes),
                properties=TensorProperties(dtype=tensor.dtype),
                size=torch.Size(tensor.shape),
            ),
        )
