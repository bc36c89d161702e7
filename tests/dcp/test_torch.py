"""Torch's own calls and planners on a repository, and ours on torch's storage."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.format_utils import torch_save_to_dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import (
    _load_state_dict,
    _load_state_dict_from_keys,
)
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import dcpstore
from dcpstore import FileSystemReader, FileSystemWriter, Repository
from dcpstore import RepositoryReader as Reader
from dcpstore import RepositoryWriter as Writer
from tests.ranks import RankPool, first_ranks, mesh
from tests.soundness import Place, assert_sound
from tests.torch_release import since_2_9

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def state() -> dict[str, Any]:
    return {
        "model": {"w": torch.arange(12.0).reshape(4, 3), "b": torch.ones(3, dtype=torch.bfloat16)},
        "optim": {"lr": 0.1, "betas": (0.9, 0.99), "groups": [{"t": torch.ones(2)}, {"n": 3}]},
        "step": 7,
    }


def empty() -> dict[str, Any]:
    return {
        "model": {"w": torch.zeros(4, 3), "b": torch.zeros(3, dtype=torch.bfloat16)},
        "optim": {"lr": 0, "betas": None, "groups": [{"t": torch.zeros(2)}, {"n": 0}]},
        "step": 0,
    }


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(b, dict):
        assert a.keys() == b.keys()
        for key in b:
            assert_equal(a[key], b[key])
    elif isinstance(b, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    elif isinstance(b, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_torch_saves_and_loads_versions(repo: Repository) -> None:
    writer = Writer(repo, step=7, message="by torch")
    described = dcp.save(state(), storage_writer=writer)
    assert writer.version == repo.show()
    assert described.storage_meta.save_id == writer.version.uid
    filled = empty()
    dcp.load(filled, storage_reader=Reader(repo))
    assert_equal(filled, state())
    again = empty()
    dcpstore.load(again, repo)
    assert_equal(again, state())
    second = dcp.save(state(), storage_writer=writer)
    assert second.storage_meta.save_id != described.storage_meta.save_id
    assert [(v.number, v.nbytes_written) for v in repo.log()] == [(2, 0), (1, 78)]
    assert [v.nbytes_reused for v in repo.log()] == [writer.version.nbytes, 0]


def test_what_dcpstore_saves_torch_loads(repo: Repository) -> None:
    dcpstore.save(state(), repo, tags=["best"])
    filled = empty()
    dcp.load(filled, storage_reader=Reader(repo, "best"))
    assert_equal(filled, state())
    filled = empty()
    dcp.load(filled, checkpoint_id="best", storage_reader=Reader(repo))
    assert_equal(filled, state())


@pytest.mark.parametrize("name", ["night", "ckpts/epoch=0-step=8", Path("run@home+1")])
def test_a_checkpoint_id_is_a_tag(repo: Repository, name: str | Path) -> None:
    dcp.save(state(), checkpoint_id=name, storage_writer=Writer(repo))
    assert repo.show(str(name)).tags == (str(name),)
    filled = empty()
    dcp.load(filled, checkpoint_id=name, storage_reader=Reader(repo))
    assert_equal(filled, state())


def test_a_checkpoint_id_that_cannot_be_a_tag_gets_a_suggestion(repo: Repository) -> None:
    with pytest.raises(dcp.CheckpointException, match="'run/step_100' is allowed"):
        dcp.save(state(), checkpoint_id="/run/step_100/", storage_writer=Writer(repo))
    assert repo.log() == []


def test_folders_with_torchs_names_and_arguments(tmp_path: Path) -> None:
    folder = tmp_path / "ckpt"
    writer = FileSystemWriter(path=folder, thread_count=2, single_file_per_rank=False)
    dcp.save(state(), storage_writer=writer)
    dcp.save({**state(), "step": 8}, checkpoint_id=folder, storage_writer=writer)
    filled = empty()
    dcp.load(filled, storage_reader=FileSystemReader(path=folder))
    assert_equal(filled, {**state(), "step": 8})
    with dcpstore.open(folder) as repo:
        assert [v.number for v in repo.log()] == [2, 1]
    with pytest.raises(dcp.CheckpointException, match="already exists"):
        dcp.save(state(), storage_writer=FileSystemWriter(folder, overwrite=False))
    other = FileSystemReader(tmp_path / "none")
    dcp.load(filled, checkpoint_id=folder, storage_reader=other)
    assert FileSystemWriter.validate_checkpoint_id(folder)
    assert not FileSystemWriter.validate_checkpoint_id("s3://bucket/x")


def test_old_names_still_warn(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning):
        dcpstore.save_state_dict(state(), FileSystemWriter(tmp_path / "x"), no_dist=True)
    filled = empty()
    with pytest.warns(FutureWarning):
        dcpstore.load_state_dict(filled, FileSystemReader(tmp_path / "x"), no_dist=True)
    assert_equal(filled["model"], state()["model"])


def test_torchs_format_tools(tmp_path: Path, repo: Repository) -> None:
    torch.save(state(), tmp_path / "in.pt")
    torch_save_to_dcp(tmp_path / "in.pt", tmp_path / "torchs")
    dcp.save(state(), storage_writer=Writer(repo))
    loaded: dict[str, Any] = {}
    _load_state_dict(
        loaded, storage_reader=Reader(repo), planner=_EmptyStateDictLoadPlanner(), no_dist=True
    )
    assert_equal(loaded, state())
    part = _load_state_dict_from_keys("model", storage_reader=Reader(repo))
    assert_equal(part, {"model": state()["model"]})
    dcp.save(state(), storage_writer=FileSystemWriter(tmp_path / "ours"))


class Rename(dcp.DefaultSavePlanner):
    """As torch documents: rename keys."""

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner({"old": state_dict}, storage_meta, is_coordinator)


class Half(dcp.DefaultSavePlanner):
    """As torch documents: cast on the way."""

    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        for item in plan.items:
            if item.tensor_data is not None:
                item.tensor_data.properties.dtype = torch.float16
        return plan

    def resolve_data(self, item: Any) -> Any:
        data = super().resolve_data(item)
        return data if item.type == WriteItemType.BYTE_IO else data.to(torch.float16)


class Extra(dcp.DefaultSavePlanner):
    """As torch documents: extra planner data."""

    def create_local_plan(self) -> Any:
        return dataclasses.replace(super().create_local_plan(), planner_data={"mine": 1})

    def create_global_plan(self, plans: Any) -> Any:
        plans, described = super().create_global_plan(plans)
        merged = [plan.planner_data for plan in plans]
        return plans, dataclasses.replace(described, planner_data=merged)


class Asking(dcp.DefaultLoadPlanner):
    """Asks for the planner data of the save."""

    def set_up_planner(
        self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False
    ) -> None:
        self.given = metadata.planner_data
        super().set_up_planner(state_dict, metadata, is_coordinator)


class Doubled(dcp.DefaultLoadPlanner):
    """As torch documents: change tensors after they are read."""

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        tensor.mul_(2)


@pytest.mark.parametrize("call", ["torch", "ours"])
def test_torchs_custom_planners_work_unchanged(repo: Repository, call: str) -> None:
    def save(planner: Any, what: Any) -> None:
        if call == "torch":
            dcp.save(what, storage_writer=Writer(repo), planner=planner)
        else:
            dcpstore.save(what, repo, planner=planner)

    save(Rename(), state())
    assert "old.model.w" in {e.fqn for e in repo.entries()}
    save(Half(), state())
    assert repo.read()["model.w"].dtype == torch.float16
    assert repo.read()["optim.betas"] == (0.9, 0.99)
    save(Extra(), state())
    assert Reader(repo).read_metadata().planner_data == [{"mine": 1}]
    asking = Asking()
    if call == "torch":
        dcp.load(empty(), storage_reader=Reader(repo), planner=asking)
    else:
        dcpstore.load(empty(), repo, planner=asking)
    assert asking.given == [{"mine": 1}]
    filled = {"model": {"w": torch.zeros(4, 3)}}
    if call == "torch":
        dcp.load(filled, storage_reader=Reader(repo), planner=Doubled())
    else:
        dcpstore.load(filled, repo, planner=Doubled())
    assert torch.equal(filled["model"]["w"], state()["model"]["w"] * 2)
    wider = {"model": {"w": torch.zeros(4, 3), "new": torch.ones(2)}}
    partial = dcp.DefaultLoadPlanner(allow_partial_load=True)
    if call == "torch":
        dcp.load(wider, storage_reader=Reader(repo), planner=partial)
    else:
        dcpstore.load(wider, repo, planner=partial)
    assert torch.equal(wider["model"]["new"], torch.ones(2))


def test_our_planners_work_on_torchs_storage(tmp_path: Path) -> None:
    plain = {"model": state()["model"], "step": 7, "betas": (0.9, 0.99)}
    torchs = dcp.FileSystemWriter(tmp_path / "t")
    dcpstore.save(plain, storage_writer=torchs, planner=dcpstore.DefaultSavePlanner())
    filled = {"model": empty()["model"], "step": 0, "betas": None}
    dcpstore.load(filled, storage_reader=dcp.FileSystemReader(tmp_path / "t"))
    assert_equal(filled, plain)


def test_plan_caching_saves_the_current_values(repo: Repository) -> None:
    class Cached(dcp.DefaultSavePlanner):
        """A class of its own, because torch's cache is keyed by the name."""

    for step in range(3):
        tensor = torch.full((4,), float(step))
        planner = Cached(enable_plan_caching=True)
        dcp.save({"w": tensor, "step": step}, storage_writer=Writer(repo), planner=planner)
        assert torch.equal(repo.read()["w"], tensor)
        assert repo.read()["step"] == step
    for step in range(3, 6):
        planner = Cached(enable_plan_caching=True)
        dcpstore.save({"w": torch.full((4,), float(step)), "step": step}, repo, planner=planner)
        assert torch.equal(repo.read()["w"], torch.full((4,), float(step)))
    assert len(repo.log()) == 6


def save_cached_on_ranks(rank: int, place: Place) -> None:
    """Save through torch with cached plans; the plan of one rank changes in some steps."""
    cached = type(
        f"Cached{place.url}", (dcp.DefaultSavePlanner,), {}
    )  # torch's cache is keyed by the name
    for step in range(5):
        whole = torch.arange(35.0).reshape(7, 5) + step
        own = torch.full((3 + (step > 0) + (step > 3),), float(step))
        state = {
            "w": distribute_tensor(whole, mesh((2,)), [Shard(0)]),
            f"own{rank}": own if rank else own[:2],
        }
        dcp.save(
            state,
            # a new branch has no parent whose grids could be kept
            storage_writer=Writer(place.url, branch="main" if step < 4 else "new"),
            planner=cached(enable_plan_caching=True),
        )


def test_plan_caching_when_the_plan_of_one_rank_changes(place: Place, two_ranks: RankPool) -> None:
    place.open().close()
    two_ranks.run(save_cached_on_ranks, place)
    with place.open() as repo:
        for step in range(5):
            read = repo.read(step + 1)
            assert torch.equal(read["w"], torch.arange(35.0).reshape(7, 5) + step)
            assert read["own0"].tolist() == [step] * 2
            assert read["own1"].tolist() == [step] * (3 + (step > 0) + (step > 3))
        assert_sound(repo)


class Pieces(torch.Tensor):
    """A tensor of which this rank holds two pieces, in torch's protocol for sharded subclasses."""

    PLACES = (0, 6)
    SIZES = torch.Size([3])

    def __create_write_items__(self, fqn: str, tensor: Any) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(fqn, torch.Size([at])),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(torch.Size([at]), self.SIZES),
                    TensorProperties(dtype=self.dtype),
                    self.size(),
                ),
            )
            for at in self.PLACES
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size([at]), self.SIZES) for at in self.PLACES]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        (at,) = index.offset
        return self.as_subclass(torch.Tensor)[at : at + 3]


@since_2_9
def test_a_save_of_whole_tensors_after_a_partial_parent_is_complete(repo: Repository) -> None:
    held = torch.arange(12.0)
    dcp.save(
        {"w": held.as_subclass(Pieces), "v": held[:9].as_subclass(Pieces)},
        storage_writer=Writer(repo),
        planner=dcp.DefaultSavePlanner(),
        no_dist=True,
        use_collectives=False,
    )
    assert repo.show("main/rank-0").nbytes == 48
    for branch, added in (("same", 0), ("other", 100)):
        state = {"w": held + added, "v": held[:9] + added}
        version = dcpstore.save(state, repo, branch=branch, parent="main/rank-0")
        assert version.nbytes == 84
        read = repo.read(branch)
        assert all(torch.equal(read[fqn], state[fqn]) for fqn in state)


def torch_on_ranks(rank: int, place: Place, how: dict[str, Any]) -> None:
    """Save and load through torch on two ranks, in one of its ways."""
    whole = torch.arange(24.0).reshape(8, 3)

    def shards(filled: bool) -> dict[str, Any]:
        source = whole if filled else torch.zeros(8, 3)
        return {
            "w": distribute_tensor(source, mesh((2,)), [Shard(0)]),
            "r": distribute_tensor(source, mesh((2,)), [Replicate()]),
            "plain": source.clone(),
            "step": 5 if filled else 0,
        }

    how = dict(how)
    group = first_ranks(2) if how.pop("group", False) else None
    writer = Writer(place.url, branch="main")
    coordinator = how.pop("coordinator_rank", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if coordinator:
            dcp.save_state_dict(shards(True), writer, group, coordinator_rank=coordinator)
        elif how.pop("asynchronous", False):
            dcp.async_save(shards(True), storage_writer=writer, process_group=group, **how).result()
        else:
            dcp.save(shards(True), storage_writer=writer, process_group=group, **how)
        dist.barrier()
        filled = shards(False)
        reader = Reader(place.url)
        if coordinator:
            dcp.load_state_dict(filled, reader, group, coordinator_rank=coordinator)
        else:
            dcp.load(filled, storage_reader=reader, process_group=group)
    for fqn, tensor in shards(True).items():
        if fqn == "step":
            assert filled[fqn] == 5
        elif fqn == "plain":
            assert torch.equal(filled[fqn], tensor)
        else:
            assert torch.equal(filled[fqn].to_local(), tensor.to_local())


@pytest.mark.slow_on_postgres
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"group": True},
        {"coordinator_rank": 1},
        pytest.param({"use_collectives": False}, marks=since_2_9),
        {"planner": dcpstore.DefaultSavePlanner()},
        {"asynchronous": True},
        {"asynchronous": True, "async_checkpointer_type": AsyncCheckpointerType.PROCESS},
    ],
    ids="-".join,
)
def test_torch_on_two_ranks(place: Place, two_ranks: RankPool, how: dict[str, Any]) -> None:
    place.open().close()
    two_ranks.run(torch_on_ranks, place, how)
    with place.open() as repo:
        alone = how.get("use_collectives") is False
        assert len(repo.log()) == (2 if alone else 1)
        assert_sound(repo)
