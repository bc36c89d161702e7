"""Uses of torch's load planners: one from scratch, and the changes of its documentation to ours."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType

import dcpstore
from tests.dcp.save_planners import ByHand, Renamed
from tests.dcp.uses import assert_filled, state, use_of


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
    of_coordinator = ["global"] if rank == 0 else []
    assert planner.calls[: 3 + len(of_coordinator)] == [
        "set_up",
        "local",
        *of_coordinator,
        "finish",
    ]
    assert sorted(planner.calls[3 + len(of_coordinator) :]) == [
        "bytes",
        "bytes",
        "commit",
        "resolve",
    ]


class RenamedLoad(dcpstore.DefaultLoadPlanner):
    """Torch's first example: rewrite the state dict; the base class is not called."""

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
    """Torch's second example: load into other tensors than those of the state."""

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
