"""The calls behind the rows of `docs/dcp.md`: one for each argument and each name of torch's.

A row is "same" or "wider" where its call does what it says, and "refused" where the call raises the
error that the row stands for. A row is named by the name, or by the name and the argument.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import default_planner as torch_planner
from torch.distributed.checkpoint import (
    filesystem,
    format_utils,
    metadata,
    planner,
    staging,
    state_dict,
    stateful,
    storage,
)
from torch.distributed.checkpoint._extension import ExtensionRegistry
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import dcpstore
from dcpstore import AlreadyExistsError, InvalidInputError, UnsafeDataError, convert
from dcpstore.compat.torch_private import AsyncSaveResponse
from tests.dcp.uses import assert_filled, state

Row = Callable[[Path], None]
ROWS: dict[str, Row] = {}


def backs(*rows: str) -> Callable[[Row], Row]:
    """Register a function as the call behind these rows."""

    def register(call: Row) -> Row:
        ROWS.update(dict.fromkeys(rows, call))
        return call

    return register


def load_back(folder: Path, **asked: Any) -> None:
    found = state(filled=False)
    dcpstore.load(found, folder, **asked)
    assert_filled(found)


@backs(
    "save(state_dict=)",
    "save(checkpoint_id=)",
    "load(state_dict=)",
    "load(checkpoint_id=)",
    "async_save(state_dict=)",
    "async_save(checkpoint_id=)",
)
def by_id(folder: Path) -> None:
    for checkpoint_id in (folder / "a", str(folder / "b")):
        dcpstore.save(state_dict=state(), checkpoint_id=checkpoint_id)
        pending = dcpstore.async_save(state_dict=state(), checkpoint_id=checkpoint_id)
        assert pending.result().number == 2  # torch would have overwritten the first
        found = state(filled=False)
        dcpstore.load(state_dict=found, checkpoint_id=checkpoint_id)
        assert_filled(found)


@backs(
    "save(storage_writer=)",
    "load(storage_reader=)",
    "async_save(storage_writer=)",
    "FileSystemReader(path=)",
    "FileSystemWriter(path=)",
    "StorageMeta",
    "Metadata",
    "MetadataIndex",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
)
def by_storage(folder: Path) -> None:
    """With our storage and with torch's; both return torch's Metadata."""
    torchs: list[Any] = [dcp.FileSystemWriter, dcp.FileSystemReader]
    for i, (writer, reader) in enumerate(
        ([dcpstore.FileSystemWriter, dcpstore.FileSystemReader], torchs)
    ):
        at = folder / str(i)
        described = dcpstore.save(state(), storage_writer=writer(path=at))
        assert isinstance(described, metadata.Metadata)
        assert isinstance(described.storage_meta, metadata.StorageMeta)
        assert all(isinstance(index, metadata.MetadataIndex) for index in described.storage_data)
        read = reader(path=at).read_metadata()
        tensor = read.state_dict_metadata["w"]
        assert isinstance(tensor, metadata.TensorStorageMetadata)
        assert isinstance(tensor.properties, metadata.TensorProperties)
        assert isinstance(tensor.chunks[0], metadata.ChunkStorageMetadata)
        assert isinstance(read.state_dict_metadata["step"], metadata.BytesStorageMetadata)
        found = state(filled=False)
        assert dcpstore.load(found, storage_reader=reader(path=at)) is None
        assert_filled(found)
        future: Any = dcpstore.async_save(state(), storage_writer=writer(path=folder / f"later{i}"))
        assert isinstance(future, Future)
        assert isinstance(future.result(), metadata.Metadata)
        dcpstore.save(
            state(), storage_writer=writer(path=folder / f"own{i}"), use_collectives=False
        )
        own: Any = dcpstore.async_save(
            state(), storage_writer=writer(path=folder / f"both{i}"), use_collectives=False
        )
        own.result()


class Noting(dcpstore.DefaultSavePlanner):
    """Records the classes of the items that a save planner resolves."""

    def create_local_plan(self) -> dcpstore.SavePlan:
        plan = super().create_local_plan()
        self.items = plan.items
        return plan


@backs(
    "save(planner=)",
    "load(planner=)",
    "async_save(planner=)",
    "WriteItemType",
    "LoadItemType",
    "TensorWriteData",
)
def by_planner(folder: Path) -> None:
    saver = Noting()
    dcpstore.save(state(), folder, planner=saver)
    assert {type(item.type) for item in saver.items} == {planner.WriteItemType}
    assert planner.TensorWriteData in {type(item.tensor_data) for item in saver.items}
    dcpstore.async_save(state(), folder, planner=dcp.DefaultSavePlanner()).result()
    loader = dcpstore.DefaultLoadPlanner()
    load_back(folder, planner=loader)
    load_back(folder, planner=dcp.DefaultLoadPlanner())
    loader.set_up_planner(state(), dcpstore.RepositoryReader(folder).read_metadata())
    assert {type(item.type) for item in loader.create_local_plan().items} == {planner.LoadItemType}


@backs(
    "save(process_group=)",
    "save(no_dist=)",
    "load(process_group=)",
    "load(no_dist=)",
    "async_save(process_group=)",
    "async_save(no_dist=)",
)
def by_group(folder: Path) -> None:
    """Alone, and in a process group of this one process."""
    plain = {"w": torch.ones(3), "step": 7}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    try:
        groups: list[dict[str, Any]] = [{"no_dist": True}, {"process_group": dist.new_group([0])}]
        for i, given in enumerate(groups):
            at = folder / str(i)
            dcpstore.save(plain, at, **given)
            dcpstore.async_save(plain, at, **given).result()
            found = {"w": torch.zeros(3), "step": 0}
            dcpstore.load(found, at, **given)
            assert found["step"] == 7
            with pytest.warns(FutureWarning):
                dcpstore.save_state_dict(
                    state_dict=plain,
                    storage_writer=dcpstore.FileSystemWriter(at),
                    coordinator_rank=0,
                    planner=dcpstore.DefaultSavePlanner(),
                    **given,
                )
            found = {"w": torch.zeros(3), "step": 0}
            with pytest.warns(FutureWarning):
                dcpstore.load_state_dict(
                    state_dict=found,
                    storage_reader=dcpstore.FileSystemReader(at),
                    coordinator_rank=0,
                    planner=dcpstore.DefaultLoadPlanner(),
                    **given,
                )
            assert torch.equal(found["w"], torch.ones(3))
            with dcpstore.open(at) as repo:
                assert len(repo.log()) == 3
    finally:
        dist.destroy_process_group()


@backs("save(use_collectives=)", "async_save(use_collectives=)")
def each_for_itself(folder: Path) -> None:
    """Here one rank; several are tested by tests/saving and tests/dcp/test_torch.py."""
    saved = dcpstore.save(state(), folder, use_collectives=False)
    later = dcpstore.async_save(state(), folder, use_collectives=False).result()
    assert saved.branch == later.branch == "main/rank-0"
    load_back(folder)
    with pytest.raises(InvalidInputError, match="use_collectives"):
        dcpstore.async_save(
            state(),
            folder,
            use_collectives=False,
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        )


@backs("async_save(async_checkpointer_type=)", "AsyncCheckpointerType")
def by_process(folder: Path) -> None:
    """PROCESS itself is tested on two ranks, by tests/asynchronous/test_pending.py."""
    thread, process = AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS
    dcpstore.async_save(state(), folder, async_checkpointer_type=thread).result()
    load_back(folder)
    with pytest.raises(InvalidInputError, match="needs a process group"):
        dcpstore.async_save(state(), folder, async_checkpointer_type=process)


@backs(
    "async_save(async_stager=)",
    "AsyncStager",
    "BlockingAsyncStager",
    "DefaultStager",
    "StagingOptions",
    "AsyncSaveResponse",
)
def by_stager(folder: Path) -> None:
    for stager in (
        staging.BlockingAsyncStager(),
        staging.DefaultStager(staging.StagingOptions(False, True, True, False)),
    ):
        assert isinstance(stager, staging.AsyncStager)
        pending = dcpstore.async_save(state(), folder, async_stager=stager)
        assert isinstance(pending, Future)
        assert isinstance(pending, AsyncSaveResponse)
        pending.staging_completion.result()
        pending.upload_completion.result()
        load_back(folder)
        stager.close()


@backs("DefaultLoadPlanner(flatten_state_dict=)", "DefaultSavePlanner(flatten_state_dict=)")
def flat(folder: Path) -> None:
    plain = {"a": torch.ones(2), "b": {"c": 3}}
    dcpstore.save(plain, folder, planner=dcpstore.DefaultSavePlanner(flatten_state_dict=False))
    found = {"a": torch.zeros(2), "b": {}}
    dcpstore.load(found, folder, planner=dcpstore.DefaultLoadPlanner(flatten_state_dict=False))
    assert found["b"] == {"c": 3}


@backs(
    "DefaultLoadPlanner(flatten_sharded_tensors=)",
    "DefaultSavePlanner(flatten_sharded_tensors=)",
    "DefaultSavePlanner(dedup_replicated_tensors=)",
    "DefaultSavePlanner(dedup_save_to_lowest_rank=)",
    "DefaultSavePlanner(enable_plan_caching=)",
)
def planned(folder: Path) -> None:
    options: list[dict[str, Any]] = [
        {"flatten_sharded_tensors": False},
        {"dedup_replicated_tensors": True},
        {"dedup_save_to_lowest_rank": True},
        {"enable_plan_caching": True},
        {"enable_plan_caching": True},
    ]
    for asked in options:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*dedup_replicated_tensors")
            saver = dcpstore.DefaultSavePlanner(**asked)
        dcpstore.save(state(), folder, planner=saver)
        load_back(folder, planner=dcpstore.DefaultLoadPlanner(flatten_sharded_tensors=False))


@backs("DefaultLoadPlanner(allow_partial_load=)")
def partly(folder: Path) -> None:
    dcpstore.save({"a": torch.ones(2)}, folder)
    found = {"a": torch.zeros(2), "b": torch.zeros(2)}
    loader = dcpstore.DefaultLoadPlanner(allow_partial_load=True)
    assert dcpstore.load(found, folder, planner=loader).missing == ("b",)


@backs(
    "FileSystemWriter(single_file_per_rank=)",
    "FileSystemWriter(sync_files=)",
    "FileSystemWriter(thread_count=)",
    "FileSystemWriter(per_thread_copy_ahead=)",
    "FileSystemWriter(cache_staged_state_dict=)",
    "FileSystemWriter(serialization_format=)",
    "SerializationFormat",
    "FileSystemReader(_extension_registry=)",
)
def laid_out(folder: Path) -> None:
    options: list[dict[str, Any]] = [
        {"single_file_per_rank": False},
        {"sync_files": False},
        {"thread_count": 3},
        {"per_thread_copy_ahead": 1},
        {"cache_staged_state_dict": True},
        {"serialization_format": filesystem.SerializationFormat.SAFETENSORS},
    ]
    for asked in options:
        dcpstore.save(state(), storage_writer=dcpstore.FileSystemWriter(folder, **asked))
        found = state(filled=False)
        reader = dcpstore.FileSystemReader(folder, _extension_registry=ExtensionRegistry())
        dcpstore.load(found, storage_reader=reader)
        assert_filled(found)
    with dcpstore.open(folder) as repo:
        assert [version.nbytes_written > 0 for version in repo.log()] == [*[False] * 5, True]


@backs("FileSystemWriter(overwrite=)")
def over(folder: Path) -> None:
    dcpstore.save(state(), storage_writer=dcpstore.FileSystemWriter(folder, overwrite=True))
    dcpstore.save(state(), storage_writer=dcpstore.FileSystemWriter(folder, overwrite=True))
    writer = dcpstore.FileSystemWriter(folder, overwrite=False)
    with pytest.raises(dcp.CheckpointException) as raised:
        dcpstore.save(state(), storage_writer=writer)
    assert isinstance(raised.value.failures[0][0], AlreadyExistsError)
    with dcpstore.open(folder) as repo:
        assert len(repo.log()) == 2


@backs("FileSystemWriter(_extensions=)")
def extended(folder: Path) -> None:
    dcpstore.FileSystemWriter(folder, _extensions=[])
    with pytest.raises(InvalidInputError, match="extensions are not supported"):
        dcpstore.FileSystemWriter(folder, _extensions=[object()])


@backs("BytesIOWriteData", "WriteResult")
def written(folder: Path) -> None:
    """A writer takes and gives torch's own classes."""
    assert planner.BytesIOWriteData(nbytes=3).nbytes == 3
    saver = dcpstore.DefaultSavePlanner()
    writer = dcpstore.RepositoryWriter(folder)
    saver.set_up_planner({"w": torch.ones(2)}, writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(True)
    plans, described = saver.create_global_plan([saver.create_local_plan()])
    (plan,) = writer.prepare_global_plan(plans)
    results = writer.write_data(saver.finish_plan(plan), saver).wait()
    assert {type(result) for result in results} == {storage.WriteResult}
    writer.finish(metadata=described, results=[results])
    assert writer.version is not None


@backs("CheckpointException")
def failed(folder: Path) -> None:
    class Bad(dcpstore.DefaultSavePlanner):
        def create_local_plan(self) -> dcpstore.SavePlan:
            raise OSError("no luck")

    with pytest.raises(OSError, match="no luck"):  # of one rank, which is all ranks here
        dcpstore.save(state(), folder, planner=Bad())
    with pytest.raises(dcp.CheckpointException, match="no luck"):
        dcpstore.save(state(), storage_writer=dcpstore.FileSystemWriter(folder), planner=Bad())
    assert not issubclass(dcp.CheckpointException, Exception)
    assert issubclass(dcpstore.RankFailure, Exception)


@backs(
    "StatefulT",
    "FQNS_T",
    "PrimitiveType",
    "ValueType",
    "DictValueType",
    "ListDictValueType",
    "OptimizerStateType",
)
def types(folder: Path) -> None:
    """They are of torch's functions, which `dcpstore.state_dict` offers as they are."""
    for name in ("FQNS_T", "ValueType", "OptimizerStateType"):
        assert hasattr(state_dict, name)
    assert hasattr(stateful, "StatefulT")
    assert dcpstore.state_dict.get_state_dict is state_dict.get_state_dict


@backs("HuggingFaceStorageReader", "HuggingFaceStorageWriter", "QuantizedHuggingFaceStorageReader")
def hugging_face(folder: Path) -> None:
    """Torch's writer takes our state; `dcpstore import` reads what it writes."""
    with pytest.raises(InvalidInputError, match="'hf' cannot hold a catalog"):
        dcpstore.save({"w": torch.ones(2)}, checkpoint_id="hf://someone/model")
    (folder / "hf").mkdir()
    writer = dcp.HuggingFaceStorageWriter(str(folder / "hf"))
    dcpstore.save({"w": torch.arange(4.0)}, storage_writer=writer)
    found = {"w": torch.zeros(4)}
    dcpstore.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(folder / "hf")))
    assert torch.equal(found["w"], torch.arange(4.0))
    assert issubclass(dcp.QuantizedHuggingFaceStorageReader, dcp.HuggingFaceStorageReader)


@backs("load_sharded_optimizer_state_dict")
def sharded_optimizer(folder: Path) -> None:
    """Torch calls it deprecated, and it asks for a process group."""
    dcpstore.save(state(), folder)
    reader = dcpstore.FileSystemReader(folder)
    with pytest.raises(ValueError, match="process group"):
        dcp.load_sharded_optimizer_state_dict({"w": torch.zeros(5, 3)}, "nest", reader)


@backs(
    "create_default_local_load_plan",
    "create_default_global_load_plan",
    "create_default_local_save_plan",
    "create_default_global_save_plan",
    "create_read_items_for_chunk_list",
    "find_tensor_shard",
    "find_state_dict_object",
)
def parts_of_planners(folder: Path) -> None:
    """They make and read the plans that our reader takes."""
    plain = {"w": torch.ones(3), "n": 1}
    plan = torch_planner.create_default_local_save_plan(plain, True)
    (global_plan,), described = torch_planner.create_default_global_save_plan([plan])
    assert {item.index.fqn for item in global_plan.items} == described.state_dict_metadata.keys()
    dcpstore.save(plain, folder)
    read = dcpstore.FileSystemReader(folder).read_metadata()
    wanted = torch_planner.create_default_local_load_plan({"w": torch.zeros(3)}, read)
    assert torch_planner.create_default_global_load_plan([wanted]) == [wanted]
    assert [item.dest_index.fqn for item in wanted.items] == ["w"]


@backs("FileSystem", "FileSystemBase")
def file_system(folder: Path) -> None:
    assert issubclass(filesystem.FileSystem, filesystem.FileSystemBase)
    for where in (folder, str(folder), "s3://bucket/x"):
        ours = dcpstore.FileSystemWriter.validate_checkpoint_id(where)
        assert ours == filesystem.FileSystem.validate_checkpoint_id(where)


@backs("dcp_to_torch_save", "torch_save_to_dcp")
def to_files(folder: Path) -> None:
    """Those of torch are for its own folders; one of ours is exported."""
    torch.save({"w": torch.ones(2)}, folder / "in.pt")
    format_utils.torch_save_to_dcp(folder / "in.pt", folder / "torchs")
    dcpstore.save({"w": torch.ones(2)}, folder / "ours")
    with pytest.raises(dcp.CheckpointException, match="No such file"):
        format_utils.dcp_to_torch_save(folder / "ours", folder / "out.pt")
    with dcpstore.open(folder / "in") as repo:
        convert.import_any(folder / "torchs", repo)
        assert torch.equal(repo.read()["w"], torch.ones(2))


@backs("BroadcastingTorchSaveReader", "DynamicMetaLoadPlanner")
def torch_files(folder: Path) -> None:
    torch.save({"w": torch.ones(2)}, folder / "in.pt")
    found = {"w": torch.zeros(2)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    try:
        dcpstore.load(
            found,
            storage_reader=format_utils.BroadcastingTorchSaveReader(),
            planner=format_utils.DynamicMetaLoadPlanner(),
            checkpoint_id=folder / "in.pt",
        )
    finally:
        dist.destroy_process_group()
    assert torch.equal(found["w"], torch.ones(2))


# Rows of what torch keeps private, and people use.


@backs("_load_state_dict_from_keys", "_EmptyStateDictLoadPlanner")
def from_keys(folder: Path) -> None:
    dcpstore.save(state(), folder)
    reader = dcpstore.FileSystemReader(folder)
    assert_filled(_load_state_dict_from_keys(storage_reader=reader))
    assert _load_state_dict_from_keys("step", storage_reader=reader) == {"step": 7}


@backs("FsspecWriter", "FsspecReader")
def fsspec(folder: Path) -> None:
    place = f"memory://{folder.name}"
    dcpstore.save(state(), storage_writer=FsspecWriter(place))
    found = state(filled=False)
    dcpstore.load(found, storage_reader=FsspecReader(place))
    assert_filled(found)
    with pytest.raises(InvalidInputError, match=r"dcpstore\.open\(that, data="):
        dcpstore.save(state(), checkpoint_id="s3://bucket/x")


@backs("pickled values")
def pickled(folder: Path) -> None:
    with pytest.raises(UnsafeDataError):
        dcpstore.save({"f": object()}, folder)


@backs("steps by folder")
def by_folder(folder: Path) -> None:
    """Each `checkpoint_id` is a repository."""
    for step in range(2):
        dcpstore.save(state(), checkpoint_id=folder / f"step_{step}")
        load_back(folder / f"step_{step}")
        with dcpstore.open(folder / f"step_{step}") as repo:
            assert [version.number for version in repo.log()] == [1]
