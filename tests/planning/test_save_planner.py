"""Our save planner: the items of a rank, the data of each item, and the plan of all ranks."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner as TorchPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItemType

from dcpstore.errors import InvalidInputError
from dcpstore.geometry.boxes import Box
from dcpstore.planning.global_plan import plan_globally
from dcpstore.planning.save_planner import DefaultSavePlanner, planner_of, recorded_by

from .plans import item, joined, rows_of, value


def planned(state: dict[str, Any], **options: bool) -> tuple[DefaultSavePlanner, SavePlan]:
    planner = DefaultSavePlanner(**options)
    planner.set_up_planner(state, is_coordinator=True)
    return planner, planner.create_local_plan()


def test_a_plan_has_an_item_for_each_tensor_and_each_value() -> None:
    _, plan = planned({"model": {"w": torch.ones(2, 3)}, "steps": [1, {"lr": 2}]})
    items = {i.index.fqn: (i.type, i.tensor_data and tuple(i.tensor_data.size)) for i in plan.items}
    assert items == {
        "model.w": (WriteItemType.TENSOR, (2, 3)),
        "steps.0": (WriteItemType.BYTE_IO, None),
        "steps.1.lr": (WriteItemType.BYTE_IO, None),
    }
    assert plan.planner_data["model.w"] == ("model", "w")


def test_a_flat_state_keeps_its_names_and_records_no_paths() -> None:
    planner, plan = planned({"model": {"w": 1}}, flatten_state_dict=False)
    assert [i.index.fqn for i in plan.items] == ["model"]
    assert plan.planner_data is None
    planner.create_global_plan([plan])
    assert recorded_by(planner) == {}


def test_a_tensor_is_resolved_to_the_callers_own_memory() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    planner, plan = planned({"w": weight})
    data = planner.resolve_data(plan.items[0])
    assert isinstance(data, torch.Tensor)
    assert data.data_ptr() == weight.data_ptr()
    assert not data.requires_grad


def test_an_unchanged_item_is_the_same_object_again() -> None:
    state = {"w": torch.ones(2, 3), "lr": 0.5}
    _, first = planned(state)
    _, again = planned({"w": torch.zeros(2, 3), "lr": 0.25})
    assert [one is other for one, other in zip(first.items, again.items, strict=True)] == [True] * 2


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(torch.ones(2, 3, dtype=torch.int32), id="dtype"),
        pytest.param(torch.ones(3, 2), id="shape"),
        pytest.param(torch.ones(2, 3, requires_grad=True), id="gradient"),
        pytest.param(0.5, id="value"),
    ],
)
def test_a_changed_item_of_the_same_name_is_a_new_one(changed: Any) -> None:
    _, first = planned({"w": torch.ones(2, 3)})
    _, again = planned({"w": changed})
    assert again.items[0] != first.items[0]
    data = again.items[0].tensor_data
    if isinstance(changed, torch.Tensor):
        assert data is not None
        assert (data.size, data.properties.dtype) == (changed.size(), changed.dtype)
        assert data.properties.requires_grad == changed.requires_grad
    else:
        assert data is None


def test_a_planner_of_another_class_gets_items_of_its_own() -> None:
    class Changing(DefaultSavePlanner):
        def create_local_plan(self) -> SavePlan:
            plan = super().create_local_plan()
            assert plan.items[0].tensor_data is not None
            plan.items[0].tensor_data.properties.dtype = torch.float16
            return plan

    state = {"w": torch.ones(2, 3)}
    planner = Changing()
    planner.set_up_planner(state, is_coordinator=True)
    items = [*planner.create_local_plan().items, *planned(state)[1].items]
    dtypes = [one.tensor_data and one.tensor_data.properties.dtype for one in items]
    assert dtypes == [torch.float16, torch.float32]


def test_a_value_is_resolved_to_torchs_bytes() -> None:
    planner, plan = planned({"v": {"x": [1, None]}}, flatten_state_dict=False)
    data = planner.resolve_data(plan.items[0])
    assert isinstance(data, io.BytesIO)
    data.seek(0)
    assert torch.load(data, weights_only=True) == {"x": [1, None]}
    assert planner.lookup_object(MetadataIndex("v")) == {"x": [1, None]}


def test_the_plans_of_all_ranks_are_described_as_torchs_metadata() -> None:
    planner, _ = planned({})
    plans, described = planner.create_global_plan([rows_of(rank, 2) for rank in range(2)])
    assert [[i.index.fqn for i in plan.items] for plan in plans] == [
        ["w0", "w1", "w2", "step"],
        ["w0", "w1", "w2"],
    ]
    kept = described.state_dict_metadata["w1"]
    assert isinstance(kept, TensorStorageMetadata)
    assert [tuple(chunk.offsets) for chunk in kept.chunks] == [(0, 0), (4, 0)]
    assert described.state_dict_metadata["step"] == BytesStorageMetadata()


def test_replicas_go_to_the_lowest_rank_on_request() -> None:
    plan = SavePlan([item(f"r{i}", Box((0,), (3,)), (3,)) for i in range(4)])
    spread, _ = planned({})
    lowest, _ = planned({}, dedup_save_to_lowest_rank=True)
    assert [len(p.items) for p in spread.create_global_plan([plan, plan])[0]] == [2, 2]
    assert [len(p.items) for p in lowest.create_global_plan([plan, plan])[0]] == [4, 0]


def test_an_empty_box_is_kept_only_if_no_rank_holds_elements() -> None:
    empty, whole = item("w", Box((0,), (0,)), (4,)), item("w", Box((0,), (4,)), (4,))
    table = plan_globally(joined(SavePlan([empty]), SavePlan([whole])), to_lowest_rank=False)
    assert [table.kept(rank).tolist() for rank in range(2)] == [[], [0]]
    with pytest.raises(InvalidInputError, match="rank 0 hold 0 of 4 elements"):
        plan_globally(joined(SavePlan([empty])), to_lowest_rank=False)


def test_the_plan_of_one_rank_alone_need_not_fill_its_tensors() -> None:
    part = joined(SavePlan([item("w", Box((2,), (2,)), (4,))]))
    with pytest.raises(InvalidInputError, match="hold 2 of 4 elements"):
        plan_globally(part, to_lowest_rank=False)
    assert len(plan_globally(part, to_lowest_rank=False, is_whole=False).rows) == 1
    planner = planner_of(None, is_whole=False)
    planner.set_up_planner({}, is_coordinator=True)
    planner.create_global_plan([SavePlan([item("w", Box((2,), (2,)), (4,)), value("v")])])


def test_the_planner_of_the_caller_is_used_unchanged() -> None:
    ours, theirs = DefaultSavePlanner(), TorchPlanner()
    assert planner_of(ours, is_whole=False) is ours
    assert not ours.is_whole
    assert planner_of(theirs, is_whole=False) is theirs
    assert not hasattr(theirs, "is_whole")
    assert recorded_by(theirs) == {}
