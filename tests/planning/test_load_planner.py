"""Our load planner: what it asks for, what it refuses all at once, and where values go."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from dcpstore import LoadOptions
from dcpstore.errors import InvalidInputError, MismatchError, UnsafeDataError
from dcpstore.geometry.grids import Grid
from dcpstore.planning.load_planner import DefaultLoadPlanner, ValueFile
from dcpstore.planning.torch_metadata import describe_version
from dcpstore.records import EntryRecord, TensorRecord


def version(*entries: EntryRecord) -> Metadata:
    return describe_version(entries, StorageMeta())


def tensor(fqn: str, *parts: Grid, shape: tuple[int, ...] = (4, 3)) -> EntryRecord:
    grids = parts or (Grid((0,) * len(shape), shape, shape),)
    stored = TensorRecord(1, "0" * 64, "float32", shape, "none", 0, grids)
    return EntryRecord(fqn, tuple(fqn.split(".")), "tensor", stored)


def value(fqn: str) -> EntryRecord:
    return EntryRecord(fqn, tuple(fqn.split(".")), "value")


def set_up(
    state: dict[str, Any], metadata: Metadata, **options: Any
) -> tuple[DefaultLoadPlanner, LoadPlan]:
    planner = DefaultLoadPlanner(options=LoadOptions(**options))
    planner.set_up_planner(state, metadata, is_coordinator=True)
    return planner, planner.create_local_plan()


def only(plan: LoadPlan) -> ReadItem:
    (item,) = plan.items
    return item


def test_a_plan_contains_the_tensors_and_values_of_the_state_only() -> None:
    state = {"m": {"w": torch.zeros(4, 3)}, "step": 0}
    planner, plan = set_up(state, version(tensor("m.w"), tensor("other"), value("step")))
    asked = {item.dest_index.fqn: (item.type, tuple(item.lengths)) for item in plan.items}
    assert asked == {
        "m.w": (LoadItemType.TENSOR, (4, 3)),
        "step": (LoadItemType.BYTE_IO, (0,)),
    }
    assert planner.stored == {"m.w", "step"}
    assert planner.missing == planner.cast == []


def test_a_tensor_is_found_in_the_callers_own_memory() -> None:
    weight = torch.zeros(4, 3)
    planner, plan = set_up({"w": weight}, version(tensor("w")))
    view = planner.resolve_tensor(only(plan))
    view.fill_(7)
    assert weight.unique().tolist() == [7]
    assert [(fqn, offsets) for fqn, offsets, _ in planner.targets()] == [("w", (0, 0))]


def test_a_value_is_set_in_the_callers_own_containers() -> None:
    state: dict[str, Any] = {"opt": {"groups": [{"lr": 0.1}]}}
    groups = state["opt"]["groups"]
    planner, plan = set_up(state, version(value("opt.groups.0.lr")))
    planner.load_value(only(plan), 0.5)
    assert state == {"opt": {"groups": [{"lr": 0.5}]}}
    assert state["opt"]["groups"] is groups
    planner.load_bytes(only(plan), ValueFile(0.25))
    assert groups[0]["lr"] == 0.25


def test_bytes_that_would_run_code_are_refused() -> None:
    planner, plan = set_up({"v": None}, version(value("v")))
    odd = io.BytesIO()
    torch.save(pickle.Unpickler, odd)
    odd.seek(0)
    with pytest.raises(UnsafeDataError, match="'v' is a pickle that could run code"):
        planner.load_bytes(only(plan), odd)


def test_one_error_names_all_that_does_not_fit() -> None:
    state = {
        "shape": torch.zeros(5),
        "dtype": torch.zeros(4, 3, dtype=torch.float16),
        "kind": 1,
        "weights": torch.zeros(4, 3),
        "stacked": torch.zeros(1, 1).expand(4, 3),
    }
    names = ("shape", "dtype", "kind", "weight", "stacked")
    with pytest.raises(MismatchError) as caught:
        set_up(state, version(*map(tensor, names)))
    message = str(caught.value)
    assert all(f"'{name}'" in message for name in state)
    assert "on_dtype='cast'" in message


def test_what_the_options_exclude_is_not_planned() -> None:
    state = {"m": {"w": torch.zeros(4, 3), "new": torch.zeros(2)}, "step": 0}
    stored = version(tensor("m.w"), value("step"))
    planner, plan = set_up(state, stored, include=["m.*"], exclude=["*.new"])
    assert only(plan).dest_index.fqn == "m.w"
    planner, plan = set_up(state, stored, strict=False)
    assert planner.missing == ["m.new"]
    assert planner.missing_tensor("m.new") is state["m"]["new"]  # type: ignore[index]
    planner, plan = set_up({"old": torch.zeros(4, 3)}, stored, rename={"old": "m.w"})
    assert (only(plan).dest_index.fqn, only(plan).storage_index.fqn) == ("old", "m.w")


def test_values_of_another_dtype_are_converted_only_on_request() -> None:
    state = {"w": torch.zeros(4, 3, dtype=torch.float64)}
    planner, plan = set_up(state, version(tensor("w")), on_dtype="cast")
    assert planner.cast == ["w"]
    assert only(plan).type is LoadItemType.TENSOR


def test_a_tensor_that_is_stored_only_in_part_is_refused() -> None:
    half = version(tensor("w", Grid((2, 0), (2, 3), (2, 3))))
    with pytest.raises(MismatchError, match="only a part of 'w': 6 elements of this rank's box"):
        set_up({"w": torch.zeros(4, 3)}, half)


def test_a_value_in_a_tuple_that_cannot_be_rebuilt_is_refused() -> None:
    class Odd(tuple[Any, ...]):
        __slots__ = ()

        def __new__(cls, first: Any, second: Any) -> Odd:
            return super().__new__(cls, (first, second))

    stored = version(tensor("a.0"), value("a.1"))
    with pytest.raises(InvalidInputError, match=r"'a\.1' is inside a Odd"):
        set_up({"a": Odd(torch.zeros(4, 3), 2)}, stored)


def test_a_tensor_on_the_meta_device_gets_memory() -> None:
    weight = torch.empty(4, 3, device="meta")
    state: dict[str, Any] = {"a": weight, "b": weight}
    planner, plan = set_up(state, version(tensor("a"), tensor("b")))
    assert state["a"].is_meta
    planner.finish_plan(plan)
    assert state["a"].device.type == "cpu"
    assert state["a"] is state["b"]  # one tensor by two names stays one
