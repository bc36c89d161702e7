"""A version as torch's `Metadata`, which a DCP storage reader returns and planners read.

Each tensor is described as one stored box, whatever its chunks: a planner asks for boxes of the
tensor, and the catalog knows which chunks hold them.
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

from dcpstore.compat.torch_private import set_format_version
from dcpstore.encoding.dtypes import torch_dtype
from dcpstore.geometry.boxes import Box
from dcpstore.records import EntryRecord, TensorRecord

__all__ = ["describe_entries"]


def describe_entries(entries: Iterable[EntryRecord], storage_meta: StorageMeta) -> Metadata:
    """Return torch's description of a version's entries; blobs count as values.

    Its `planner_data` has the form that our save planner makes: the path of each FQN in the state.
    """
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
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
            planner_data=paths,
            storage_data={},  # the catalog knows which chunks hold what
            storage_meta=storage_meta,
        )
    )


def _stored_boxes(tensor: TensorRecord) -> list[Box]:
    """Return one box for a whole tensor, or those of its parts if one rank saved for itself."""
    whole = Box.whole(tensor.shape)
    parts = [part.box for part in tensor.parts]
    return parts if sum(box.volume for box in parts) < whole.volume else [whole]
