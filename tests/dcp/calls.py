"""Uses of torch's calls, of `Stateful`, and of a storage written from torch's interface."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

import dcpstore
from tests.dcp.uses import assert_filled, state, use_of, world


@use_of("save", "load", "FileSystemWriter", "FileSystemReader")
def save_and_load(rank: int, folder: Path) -> None:
    """With a storage object, and with only a `checkpoint_id`."""
    writer = dcpstore.FileSystemWriter(folder / "1")
    described = dcpstore.save(state_dict=state(), storage_writer=writer)
    assert isinstance(described, Metadata)
    assert "nest.list.0" in described.state_dict_metadata
    found = state(filled=False)
    reader = dcpstore.FileSystemReader(folder / "1")
    assert dcpstore.load(state_dict=found, storage_reader=reader) is None
    assert_filled(found)
    dcpstore.save(state(), checkpoint_id=folder / "2")
    found = state(filled=False)
    dcpstore.load(found, checkpoint_id=folder / "2")
    assert_filled(found)


@use_of("async_save")
def save_later(rank: int, folder: Path) -> None:
    saved = state()
    future = dcpstore.async_save(saved, checkpoint_id=folder)
    assert future.result().number == 1
    found = state(filled=False)
    dcpstore.load(found, checkpoint_id=folder)
    assert_filled(found)


@use_of("save_state_dict", "load_state_dict")
def deprecated(rank: int, folder: Path) -> None:
    alone = world() == 1  # as torch's own, these look for a process group unless no_dist is True
    with pytest.warns(FutureWarning):
        dcpstore.save_state_dict(state(), dcpstore.FileSystemWriter(folder), no_dist=alone)
    found = state(filled=False)
    with pytest.warns(FutureWarning):
        dcpstore.load_state_dict(found, dcpstore.FileSystemReader(folder), no_dist=alone)
    assert_filled(found)


class Counter:
    """As torch's protocol asks: `state_dict` and `load_state_dict`, nothing else."""

    def __init__(self, filled: bool) -> None:
        self.held = state(filled=filled)
        self.loads = 0

    def state_dict(self) -> dict[str, Any]:
        return self.held

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.held = state_dict
        self.loads += 1


@use_of("Stateful")
def stateful(rank: int, folder: Path) -> None:
    assert isinstance(Counter(True), dcpstore.Stateful)
    assert not isinstance({}, dcpstore.Stateful)
    dcpstore.save({"mine": Counter(True)}, folder)
    empty = Counter(False)
    dcpstore.load({"mine": empty}, folder)
    assert_filled(empty.held)
    assert empty.loads == 1


class Shelf(dcpstore.StorageWriter, dcpstore.StorageReader):
    """A storage of its own: one file per item, and a list of the calls that torch makes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[str] = []

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def reset(self, checkpoint_id: Any = None) -> None:
        self.calls = []

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.calls.append("set_up")

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        self.calls.append("set_up")

    def prepare_local_plan(self, plan: Any) -> Any:
        self.calls.append("local")
        return plan

    def prepare_global_plan(self, plans: Any) -> Any:
        self.calls.append("global")
        return plans

    def write_data(self, plan: dcpstore.SavePlan, planner: Any) -> Future[list[WriteResult]]:
        self.calls.append("write")
        results = []
        for item in plan.items:
            data = planner.resolve_data(item)
            kept = data.getvalue() if isinstance(data, io.BytesIO) else data
            torch.save(kept, self._file(item.index))
            results.append(WriteResult(item.index, 1, None))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.calls.append("finish")
        assert len(results) == world()
        torch.save(metadata, self.folder / "described")

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self.calls.append("read_metadata")
        described = torch.load(self.folder / "described", weights_only=False)
        assert isinstance(described, Metadata)
        return described

    def read_data(self, plan: dcpstore.LoadPlan, planner: Any) -> Future[None]:
        self.calls.append("read")
        for item in plan.items:
            data = torch.load(self._file(item.storage_index), weights_only=False)
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(data))
                continue
            for dim, (start, length) in enumerate(
                zip(item.storage_offsets, item.lengths, strict=True)
            ):
                data = data.narrow(dim, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(data)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _file(self, index: MetadataIndex) -> Path:
        offset = "-".join(map(str, index.offset or ()))
        return self.folder / f"{index.fqn}@{offset}"


@use_of("StorageWriter", "StorageReader")
def storage(rank: int, folder: Path) -> None:
    shelf = Shelf(folder)
    dcpstore.save(state(), storage_writer=shelf)
    coordinator = ["global", "write", "finish"] if rank == 0 else ["write"]
    assert shelf.calls == ["set_up", "local", *coordinator]
    shelf.calls = []
    found = state(filled=False)
    dcpstore.load(found, storage_reader=shelf)
    of_coordinator = ["global"] if rank == 0 else []
    assert [c for c in shelf.calls if c != "read_metadata"] == [
        "set_up",
        "local",
        *of_coordinator,
        "read",
    ]
    assert_filled(found)
