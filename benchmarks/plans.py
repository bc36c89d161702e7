"""The simulated save of (h): what each of many ranks plans of tensors that FSDP2 shards over all.

The tensors are those of transformer blocks of width 1,024, in turn, each sharded by rows.
"""

from __future__ import annotations

import pickle

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

__all__ = ["gathered_plans", "local_plan"]

# The four matrices of a block: torch checks overlaps along the longer side, so that for the last
# it compares each shard with each.
_SHAPES = ((3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096))


def gathered_plans(ranks: int, tensors: int) -> list[bytes]:
    """Return every rank's local plan as it reaches torch's coordinator."""
    return [pickle.dumps(local_plan(rank, ranks, tensors)) for rank in range(ranks)]


def local_plan(rank: int, ranks: int, tensors: int) -> SavePlan:
    """Return what a rank plans of so many tensors; powers of two divide them evenly.

    Where there are more than 1,024 ranks, the tensors have as many times more rows.
    """
    properties = TensorProperties(dtype=torch.float32)
    items, paths = [], {}
    for i in range(tensors):
        name = f"model.layers.{i // 4}.weight_{i % 4}"
        rows, columns = _SHAPES[i % 4]
        rows *= max(ranks // 1024, 1)
        rows *= -(-ranks // 1024)
        offsets = torch.Size((rank * rows // ranks, 0))
        chunk = ChunkStorageMetadata(offsets, torch.Size((rows // ranks, columns)))
        data = TensorWriteData(chunk, properties, torch.Size((rows, columns)))
        items.append(WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data))
        paths[name] = tuple(name.split("."))
    return SavePlan(items, planner_data=paths)
