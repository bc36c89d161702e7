"""What a version would hold of a state: its entries, and torch's description of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)

from dcpstore.encoding.dtypes import dtype_name
from dcpstore.encoding.values import encode_value
from dcpstore.records import EntryRecord, TensorRecord
from dcpstore.state.composed import take_apart
from dcpstore.state.tree import flattened, recorded_paths

__all__ = ["described", "entries_of"]


def entries_of(state: Mapping[str, Any]) -> list[EntryRecord]:
    """Return the entries of a version of `state`, composed tensors as their marks and parts."""
    flat = flattened(take_apart(state))
    paths = recorded_paths([flat.paths])
    return [_entry(fqn, paths[fqn], item) for fqn, item in flat.items.items()]


def _entry(fqn: str, path: Any, item: Any) -> EntryRecord:
    if not isinstance(item, torch.Tensor):
        text = encode_value(item, allow_pickle=False).text
        return EntryRecord(fqn, path, "value", value=text)
    shape, nbytes = tuple(item.shape), item.numel() * item.itemsize
    tensor = TensorRecord(1, "0" * 64, dtype_name(item.dtype), shape, "none", nbytes, ())
    return EntryRecord(fqn, path, "tensor", tensor)


def described(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return torch's description of a version of `state`, by FQN."""
    return {
        fqn: TensorStorageMetadata(TensorProperties(item.dtype), item.size(), [])
        if isinstance(item, torch.Tensor)
        else BytesStorageMetadata()
        for fqn, item in flattened(take_apart(state)).items.items()
    }
