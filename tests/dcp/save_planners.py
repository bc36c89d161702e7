"""Uses of torch's save planners: one from scratch, and the changes of its documentation to ours."""

import dataclasses
import io
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.tensor import DTensor

import dcpstore
from tests.dcp.uses import assert_filled, state, use_of, world


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
    of_coordinator = ["global"] if rank == 0 else []
    assert planner.calls[: 3 + len(of_coordinator)] == [
        "set_up",
        "local",
        *of_coordinator,
        "finish",
    ]
    assert set(planner.calls[3 + len(of_coordinator) :]) == {"resolve"}
    found: dict[str, Any] = {"w": state(filled=False)["w"], "step": 0, "plain": torch.zeros(4)}
    dcpstore.load(found, folder)
    assert_filled({**state(), "w": found["w"], "step": found["step"]})


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
    """Torch's second example: change the local plan and the lookup."""

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
    """Torch's third example: the coordinator decides which rank writes what."""

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
    """Torch's fourth example: extra data of each rank, stored with the checkpoint."""

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
