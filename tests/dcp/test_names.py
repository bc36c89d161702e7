"""Each of torch's public names that dcpstore offers, used as its torch documentation says.

On one rank and on two. A use is a function of the rank and an empty folder that all ranks share.
"""

from __future__ import annotations

import dataclasses
import io
import warnings
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.futures import Future

import dcpstore
from dcpstore.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from tests.dcp.test_page import ours, public_names
from tests.ranks import RankPool, mesh

WHOLE = torch.arange(15.0).reshape(5, 3)  # 5 rows: three on one rank, two on the other
Use = Callable[[int, Path], None]
USES: dict[str, Use] = {}


def use_of(*names: str) -> Callable[[Use], Use]:
    """Register a function as the use of these names."""

    def register(use: Use) -> Use:
        USES.update(dict.fromkeys(names, use))
        return use

    return register


def state(*, filled: bool = True) -> dict[str, Any]:
    whole = WHOLE.clone() if filled else torch.zeros(5, 3)
    if dist.is_initialized():
        whole = distribute_tensor(whole, mesh((dist.get_world_size(),)), [Shard(0)])
    plain = torch.ones(4) if filled else torch.zeros(4)
    return {"w": whole, "nest": {"p": plain, "list": [plain.clone(), 3]}, "step": 7 * filled}


def assert_filled(found: dict[str, Any]) -> None:
    whole = found["w"].full_tensor() if isinstance(found["w"], DTensor) else found["w"]
    assert torch.equal(whole, WHOLE)
    assert torch.equal(found["nest"]["p"], torch.ones(4))
    assert torch.equal(found["nest"]["list"][0], torch.ones(4))
    assert (found["nest"]["list"][1], found["step"]) == (3, 7)


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@use_of("save", "load", "FileSystemWriter", "FileSystemReader")
def save_and_load(rank: int, folder: Path) -> None:
    """With a storage object, and with an id alone."""
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
    alone = world() == 1  # as torch's, these look for a process group unless told so
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
    """A storage of one's own: a file an item, and a note of every call that torch promises."""

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
    told = ["global"] if rank == 0 else []
    assert [c for c in shelf.calls if c != "read_metadata"] == ["set_up", "local", *told, "read"]
    assert_filled(found)


class ByHand(dcpstore.SavePlanner):
    """A save planner from nothing but torch's interface, for flat states of tensors and values."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        self.calls.append("set_up")
        self.held = state_dict

    def create_local_plan(self) -> dcpstore.SavePlan:
        self.calls.append("local")
        made = dcpstore.DefaultSavePlanner(flatten_state_dict=False)
        made.set_up_planner({k: v for k, v in self.held.items() if torch.is_tensor(v)})
        items = made.create_local_plan().items
        for fqn, value in self.held.items():
            if not torch.is_tensor(value):
                items.append(dcpstore.WriteItem(MetadataIndex(fqn), WriteItemType.BYTE_IO))
        assert all(isinstance(item, dcpstore.WriteItem) for item in items)
        return dcpstore.SavePlan(items)

    def create_global_plan(
        self, all_plans: list[dcpstore.SavePlan]
    ) -> tuple[list[dcpstore.SavePlan], Metadata]:
        self.calls.append("global")
        return dcpstore.DefaultSavePlanner(flatten_state_dict=False).create_global_plan(all_plans)

    def finish_plan(self, new_plan: dcpstore.SavePlan) -> dcpstore.SavePlan:
        self.calls.append("finish")
        return new_plan

    def resolve_data(self, write_item: dcpstore.WriteItem) -> torch.Tensor | io.BytesIO:
        self.calls.append("resolve")
        found = self.held[write_item.index.fqn]
        if isinstance(found, torch.Tensor):
            return found.to_local() if isinstance(found, DTensor) else found
        if isinstance(found, str):
            return io.BytesIO(b"my own form: " + found.encode())
        data = io.BytesIO()
        torch.save(found, data)
        return data


@use_of("SavePlanner", "SavePlan", "WriteItem")
def save_planner(rank: int, folder: Path) -> None:
    planner = ByHand()
    flat = {"w": state()["w"], "step": 7, "plain": torch.ones(4)}
    dcpstore.save(flat, folder, planner=planner)
    told = ["global"] if rank == 0 else []
    assert planner.calls[: 3 + len(told)] == ["set_up", "local", *told, "finish"]
    assert set(planner.calls[3 + len(told) :]) == {"resolve"}
    found: dict[str, Any] = {"w": state(filled=False)["w"], "step": 0, "plain": torch.zeros(4)}
    dcpstore.load(found, folder)
    assert_filled({**state(), "w": found["w"], "step": found["step"]})


class ByHandLoad(dcpstore.LoadPlanner):
    """A load planner from nothing but torch's interface, for plain tensors and values."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        self.calls.append("set_up")
        self.held, self.stored = state_dict, metadata

    def create_local_plan(self) -> dcpstore.LoadPlan:
        self.calls.append("local")
        assert self.stored is not None
        items = []
        for fqn, value in self.held.items():
            index, start = MetadataIndex(fqn), torch.Size(())
            if not torch.is_tensor(value):
                kind = LoadItemType.BYTE_IO
                items.append(dcpstore.ReadItem(kind, index, start, index, start, start))
                continue
            for i, box in enumerate(self.stored.state_dict_metadata[fqn].chunks):
                stored = MetadataIndex(fqn, box.offsets, i)
                none = torch.Size([0] * value.dim())
                items.append(
                    dcpstore.ReadItem(
                        LoadItemType.TENSOR, index, box.offsets, stored, none, box.sizes
                    )
                )
        return dcpstore.LoadPlan(items)

    def create_global_plan(self, global_plan: list[dcpstore.LoadPlan]) -> list[dcpstore.LoadPlan]:
        self.calls.append("global")
        return global_plan

    def finish_plan(self, central_plan: dcpstore.LoadPlan) -> dcpstore.LoadPlan:
        self.calls.append("finish")
        return central_plan

    def load_bytes(self, read_item: dcpstore.ReadItem, value: io.BytesIO) -> None:
        self.calls.append("bytes")
        head, own = b"my own form: ", value.getvalue()
        self.held[read_item.dest_index.fqn] = (
            own.removeprefix(head).decode()
            if own.startswith(head)
            else torch.load(value, weights_only=True)
        )

    def resolve_tensor(self, read_item: dcpstore.ReadItem) -> torch.Tensor:
        self.calls.append("resolve")
        found: torch.Tensor = self.held[read_item.dest_index.fqn]
        for dim, (start, n) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            found = found.narrow(dim, start, n)
        return found

    def commit_tensor(self, read_item: dcpstore.ReadItem, tensor: torch.Tensor) -> None:
        self.calls.append("commit")


@use_of("LoadPlanner", "LoadPlan", "ReadItem")
def load_planner(rank: int, folder: Path) -> None:
    dcpstore.save({"w": state()["w"], "step": 7, "text": "hi"}, folder, planner=ByHand())
    planner, found = ByHandLoad(), {"w": torch.zeros(5, 3), "step": 0, "text": ""}
    dcpstore.load(found, folder, planner=planner)
    assert_filled({**state(), "w": found["w"], "step": found["step"]})
    assert found["text"] == "hi"
    told = ["global"] if rank == 0 else []
    assert planner.calls[: 3 + len(told)] == ["set_up", "local", *told, "finish"]
    assert sorted(planner.calls[3 + len(told) :]) == ["bytes", "bytes", "commit", "resolve"]


class Renamed(dcpstore.DefaultSavePlanner):
    """Torch's first example: rewrite the state dict."""

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        renamed = {"foo_" + key: value for key, value in state_dict.items()}
        super().set_up_planner(renamed, storage_meta, is_coordinator)


class Halved(dcpstore.DefaultSavePlanner):
    """Torch's second: change the local plan and the lookup."""

    def create_local_plan(self) -> dcpstore.SavePlan:
        plan = super().create_local_plan()
        for item in plan.items:
            if item.tensor_data is not None:
                item.tensor_data.properties.dtype = torch.float16
        return plan

    def resolve_data(self, write_item: dcpstore.WriteItem) -> torch.Tensor | io.BytesIO:
        found = super().resolve_data(write_item)
        return found.to(torch.float16) if isinstance(found, torch.Tensor) else found


class Dealt(dcpstore.DefaultSavePlanner):
    """Torch's third: a central decision, who writes what."""

    def create_global_plan(
        self, all_plans: list[dcpstore.SavePlan]
    ) -> tuple[list[dcpstore.SavePlan], Metadata]:
        turns = [iter(all_plans[0].items)] * len(all_plans)
        dealt = zip(*zip_longest(*turns), strict=True)
        plans = [
            dataclasses.replace(plan, items=[item for item in items if item is not None])
            for plan, items in zip(all_plans, dealt, strict=True)
        ]
        return super().create_global_plan(plans)


class Noted(dcpstore.DefaultSavePlanner):
    """Torch's fourth: extra data of each rank, kept with the checkpoint."""

    def create_local_plan(self) -> dcpstore.SavePlan:
        return dataclasses.replace(super().create_local_plan(), planner_data="per-rank-data")

    def create_global_plan(
        self, all_plans: list[dcpstore.SavePlan]
    ) -> tuple[list[dcpstore.SavePlan], Metadata]:
        plans, described = super().create_global_plan(all_plans)
        return plans, dataclasses.replace(described, planner_data=[p.planner_data for p in plans])


@use_of("DefaultSavePlanner")
def default_save_planner(rank: int, folder: Path) -> None:
    dcpstore.save(state(), folder, planner=Renamed(), branch="renamed")
    found = {f"foo_{key}": value for key, value in state(filled=False).items()}
    dcpstore.load(found, folder, "renamed")
    assert_filled({key.removeprefix("foo_"): value for key, value in found.items()})
    dcpstore.save(state(), folder, planner=Halved(), branch="halved")
    plain = {"nest": {"p": torch.zeros(4, dtype=torch.float16)}, "step": 0}
    dcpstore.load(plain, folder, "halved")
    assert plain == {"nest": {"p": plain["nest"]["p"]}, "step": 7}
    assert torch.equal(plain["nest"]["p"], torch.ones(4, dtype=torch.float16))
    copies = {f"t{i}": torch.full((3,), float(i)) for i in range(5)}
    dcpstore.save(copies, folder, planner=Dealt(), branch="dealt")
    empty = {fqn: torch.zeros(3) for fqn in copies}
    dcpstore.load(empty, folder, "dealt")
    assert all(torch.equal(empty[fqn], copies[fqn]) for fqn in copies)
    flat = {"w": state()["w"], "step": 7}
    dcpstore.save(flat, folder, planner=Noted(flatten_state_dict=False), branch="noted")
    reader = dcpstore.RepositoryReader(folder, "noted")
    assert reader.read_metadata().planner_data == ["per-rank-data"] * world()
    for planner in (
        dcpstore.DefaultSavePlanner(dedup_save_to_lowest_rank=True),
        dcpstore.DefaultSavePlanner(enable_plan_caching=True),
        dcpstore.DefaultSavePlanner(enable_plan_caching=True),
    ):
        writer = dcpstore.RepositoryWriter(folder, branch="torchs")
        dcpstore.save(state(), storage_writer=writer, planner=planner)
        again = state(filled=False)
        dcpstore.load(again, folder, "torchs")
        assert_filled(again)


class RenamedLoad(dcpstore.DefaultLoadPlanner):
    """Torch's first example: rewrite the state dict, without a call of its own set-up."""

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        self.original_state_dict = state_dict
        self.flatten_state_dict = False
        self.state_dict = {"foo_" + key: value for key, value in state_dict.items()}
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def load_bytes(self, read_item: dcpstore.ReadItem, value: io.BytesIO) -> None:
        fqn = read_item.dest_index.fqn.removeprefix("foo_")
        self.original_state_dict[fqn] = torch.load(value, weights_only=True)


class Materialized(dcpstore.DefaultLoadPlanner):
    """Torch's second: other tensors than those of the state are filled."""

    def resolve_tensor(self, read_item: dcpstore.ReadItem) -> torch.Tensor:
        return torch.empty_like(super().resolve_tensor(read_item), device="cpu")

    def commit_tensor(self, read_item: dcpstore.ReadItem, tensor: torch.Tensor) -> None:
        self.state_dict[read_item.dest_index.fqn] = tensor


@use_of("DefaultLoadPlanner")
def default_load_planner(rank: int, folder: Path) -> None:
    flat = {"w": state()["w"], "step": 7}
    dcpstore.save(flat, folder, planner=Renamed(), branch="renamed")
    found: dict[str, Any] = {"w": state(filled=False)["w"], "step": 0}
    dcpstore.load(found, folder, "renamed", planner=RenamedLoad())
    assert_filled({**state(), **found})
    dcpstore.save({"p": torch.ones(4)}, folder, branch="plain")
    planner = Materialized()
    dcpstore.load({"p": torch.empty(4, device="meta")}, folder, "plain", planner=planner)
    assert torch.equal(planner.state_dict["p"], torch.ones(4))
    wider = {"p": torch.zeros(4), "new": torch.full((2,), 5.0)}
    with pytest.raises(dcpstore.MismatchError, match="'new' is not in the version"):
        dcpstore.load(wider, folder, "plain", planner=dcpstore.DefaultLoadPlanner())
    planner = dcpstore.DefaultLoadPlanner(allow_partial_load=True)
    dcpstore.load(wider, folder, "plain", planner=planner)
    assert torch.equal(wider["p"], torch.ones(4))
    assert torch.equal(wider["new"], torch.full((2,), 5.0))


def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model: nn.Module = nn.Linear(3, 5)
    if dist.is_initialized():
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 / seed)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def assert_same_training(one: Any, other: Any) -> None:
    for a, b in zip(one[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(a, b)
        for name, value in one[1].state[a].items():
            assert torch.equal(value, other[1].state[b][name])
    assert one[1].param_groups[0]["lr"] == other[1].param_groups[0]["lr"]


@use_of("get_state_dict", "set_state_dict", "StateDictOptions")
def whole_state(rank: int, folder: Path) -> None:
    for options in (None, StateDictOptions(full_state_dict=True, cpu_offload=world() == 1)):
        saved, found = trained(1), trained(2)
        model, optim = get_state_dict(*saved, options=options)
        assert sorted(model) == ["bias", "weight"]
        assert sorted(optim["state"]) == ["bias", "weight"]
        dcpstore.save({"model": model, "optim": optim}, folder)
        model, optim = get_state_dict(*found, options=options)
        into = {"model": model, "optim": optim}
        dcpstore.load(into, folder)
        set_state_dict(
            *found,
            model_state_dict=into["model"],
            optim_state_dict=into["optim"],
            options=options,
        )
        assert_same_training(saved, found)


@use_of(
    "get_model_state_dict",
    "set_model_state_dict",
    "get_optimizer_state_dict",
    "set_optimizer_state_dict",
)
def state_by_parts(rank: int, folder: Path) -> None:
    saved, found = trained(1), trained(2)
    dcpstore.save(
        {"model": get_model_state_dict(saved[0]), "optim": get_optimizer_state_dict(*saved)},
        folder,
    )
    into = {"model": get_model_state_dict(found[0]), "optim": get_optimizer_state_dict(*found)}
    dcpstore.load(into, folder)
    set_model_state_dict(found[0], into["model"])
    set_optimizer_state_dict(*found, into["optim"])
    assert_same_training(saved, found)


def test_each_name_of_torchs_has_a_use() -> None:
    offered = {name for name in public_names() if ours(name) is not None}
    assert USES.keys() == offered


def quietly(rank: int, name: str, folder: Path) -> None:
    """Run the use of a name; torch may say that there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        USES[name](rank, folder)


@pytest.mark.parametrize("name", USES)
def test_on_one_rank(name: str, tmp_path: Path) -> None:
    quietly(0, name, tmp_path)


@pytest.mark.parametrize("name", USES)
def test_on_two_ranks(name: str, tmp_path: Path, two_ranks: RankPool) -> None:
    two_ranks.run(quietly, name, tmp_path)
