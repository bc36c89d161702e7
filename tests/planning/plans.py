"""Plans made by hand, for all tests of planning."""

from __future__ import annotations

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from dcpstore.geometry.boxes import Box
from dcpstore.planning.plan_table import GlobalTable, PlanTable

__all__ = ["item", "joined", "rows_of", "value"]


def item(
    fqn: str, box: Box, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> WriteItem:
    """Return the item of a box of a tensor."""
    offsets = torch.Size(box.offsets)
    return WriteItem(
        MetadataIndex(fqn, offsets),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            ChunkStorageMetadata(offsets, torch.Size(box.sizes)),
            TensorProperties(dtype),
            torch.Size(shape),
        ),
    )


def value(fqn: str) -> WriteItem:
    """Return the item of a value."""
    return WriteItem(MetadataIndex(fqn), WriteItemType.BYTE_IO)


def rows_of(rank: int, ranks: int, tensors: int = 3) -> SavePlan:
    """Return the plan of a rank that holds its rows of each tensor, and one value."""
    boxes = [Box((4 * rank, 0), (4, 8)) for _ in range(tensors)]
    items = [item(f"w{i}", box, (4 * ranks, 8)) for i, box in enumerate(boxes)]
    return SavePlan([*items, value("step")])


def joined(*plans: SavePlan) -> GlobalTable:
    """Return the table of the plans of all ranks."""
    return GlobalTable.of([PlanTable.of(plan) for plan in plans])
