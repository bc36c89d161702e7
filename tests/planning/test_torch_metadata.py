"""A version as torch's `Metadata`, from which planners plan a load."""

from __future__ import annotations

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    StorageMeta,
    TensorStorageMetadata,
)

from dcpstore.geometry.grids import Grid
from dcpstore.planning.torch_metadata import describe_version
from dcpstore.records import EntryRecord, TensorRecord


def entry(fqn: str, shape: tuple[int, ...], *parts: Grid, kind: str = "tensor") -> EntryRecord:
    tensor = TensorRecord(1, "0" * 64, "bfloat16", shape, "none", 0, parts)
    return EntryRecord(fqn, tuple(fqn.split(".")), kind, tensor)  # type: ignore[arg-type]


def boxes(described: object) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    assert isinstance(described, TensorStorageMetadata)
    return [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in described.chunks]


def test_a_tensor_is_one_box_whatever_its_parts() -> None:
    halves = Grid((0, 0), (2, 6), (1, 3)), Grid((2, 0), (2, 6), (2, 2))
    described = describe_version([entry("m.w", (4, 6), *halves)], StorageMeta())
    kept = described.state_dict_metadata["m.w"]
    assert boxes(kept) == [((0, 0), (4, 6))]
    assert isinstance(kept, TensorStorageMetadata)
    assert (kept.properties.dtype, tuple(kept.size)) == (torch.bfloat16, (4, 6))


def test_a_tensor_that_is_stored_only_in_part_is_described_by_its_parts() -> None:
    described = describe_version([entry("w", (4, 6), Grid((2, 0), (2, 6), (2, 2)))], StorageMeta())
    assert boxes(described.state_dict_metadata["w"]) == [((2, 0), (2, 6))]


def test_a_scalar_and_an_empty_tensor_are_whole() -> None:
    entries = [entry("scalar", (), Grid((), (), ())), entry("empty", (0, 3))]
    described = describe_version(entries, StorageMeta()).state_dict_metadata
    assert boxes(described["scalar"]) == [((), ())]
    assert boxes(described["empty"]) == [((0, 0), (0, 3))]


def test_values_and_blobs_are_bytes_and_every_path_is_described() -> None:
    meta = StorageMeta(checkpoint_id="here")
    blob = entry("b", (9,), Grid((0,), (9,), (9,)), kind="blob")
    described = describe_version([blob, EntryRecord("opt.lr", ("opt", "lr"), "value")], meta)
    assert described.state_dict_metadata == {
        "b": BytesStorageMetadata(),
        "opt.lr": BytesStorageMetadata(),
    }
    assert described.planner_data == {"b": ("b",), "opt.lr": ("opt", "lr")}
    assert described.storage_meta is meta
