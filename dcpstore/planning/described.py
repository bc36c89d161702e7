"""A version in torch's words, for planners: the `Metadata` that a DCP storage reader gives.

Each tensor is described as one stored box, whatever its chunks: a planner asks for boxes of the
tensor, and which chunks hold them is a question for the catalog.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from dcpstore.encoding.dtypes import torch_dtype
from dcpstore.records import EntryRecord

__all__ = ["describe_entries"]


def describe_entries(entries: Iterable[EntryRecord]) -> Metadata:
    """Return torch's description of a version's entries; blobs count as values."""
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    paths = {}
    for entry in entries:
        paths[entry.fqn] = entry.path
        if entry.kind == "tensor":
            assert entry.tensor is not None
            shape = torch.Size(entry.tensor.shape)
            described[entry.fqn] = TensorStorageMetadata(
                TensorProperties(dtype=torch_dtype(entry.tensor.dtype)),
                shape,
                [ChunkStorageMetadata(torch.Size((0,) * len(shape)), shape)],
            )
        else:
            described[entry.fqn] = BytesStorageMetadata()
    return Metadata(described, planner_data=paths)
