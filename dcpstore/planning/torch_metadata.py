"""Torch's `Metadata`: of a version, for load planners, and of a global plan, for save planners.

A tensor of a version is described as one stored box, whatever its chunks: a planner asks for boxes
of the tensor, and the catalog knows which chunks hold them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan

from dcpstore.compat.torch_private import set_format_version
from dcpstore.encoding.dtypes import torch_dtype
from dcpstore.encoding.values import decode_value
from dcpstore.geometry.boxes import Box
from dcpstore.records import EntryRecord, TensorRecord

__all__ = ["describe_plans", "describe_version"]


Described = dict[str, TensorStorageMetadata | BytesStorageMetadata]


def describe_plans(plans: Iterable[SavePlan]) -> Described:
    """Return torch's description of what the plans of all ranks write, by FQN."""
    described: Described = {}
    for item in (item for plan in plans for item in plan.items):
        data, fqn = item.tensor_data, item.index.fqn
        if data is None:
            described[fqn] = BytesStorageMetadata()
            continue
        tensor = described.setdefault(fqn, TensorStorageMetadata(data.properties, data.size, []))
        assert isinstance(tensor, TensorStorageMetadata)
        tensor.chunks.append(data.chunk)
    return described


def describe_version(
    entries: Iterable[EntryRecord],
    storage_meta: StorageMeta,
    planner_data: str | None = None,
    *,
    allow_pickle: bool = False,
) -> Metadata:
    """Return torch's description of a version; blobs count as values.

    Args:
        entries: of the version.
        storage_meta: torch's description of the storage.
        planner_data: what the save planner stored with the version, as typed JSON; without it, the
            description has what our save planner makes: the path of each FQN in the state.
        allow_pickle: whether `planner_data` may be a pickle.

    Raises:
        UnsafeDataError: `planner_data` is a pickle, and `allow_pickle` is False.
        CorruptionError: `planner_data` is damaged.
    """
    described: Described = {}
    paths = {}
    for entry in entries:
        paths[entry.fqn] = tuple(entry.path)
        if entry.kind == "tensor":
            assert entry.tensor is not None
            shape = torch.Size(entry.tensor.shape)
            described[entry.fqn] = TensorStorageMetadata(
                TensorProperties(dtype=torch_dtype(entry.tensor.dtype)),
                shape,
                [
                    ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
                    for box in _stored_boxes(entry.tensor)
                ],
            )
        else:
            described[entry.fqn] = BytesStorageMetadata()
    return set_format_version(
        Metadata(
            described,
            planner_data=paths
            if planner_data is None
            else decode_value(planner_data, allow_pickle=allow_pickle),
            storage_data={},  # the catalog knows which chunks hold what
            storage_meta=storage_meta,
        )
    )


def _stored_boxes(tensor: TensorRecord) -> list[Box]:
    """Return one box for a whole tensor, or those of its parts if one rank saved for itself."""
    whole = Box.whole(tensor.shape)
    parts = [part.box for part in tensor.parts]
    return parts if sum(box.volume for box in parts) < whole.volume else [whole]
