"""Plans in columns: they hold the same as the plans, and their digests differ if they differ."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.checkpoint.planner import SavePlan

from dcpstore.geometry.boxes import Box
from dcpstore.planning.global_plan import share_out
from dcpstore.planning.plan_table import Named, PlanTable, item_box, item_nbytes

from .plans import item, joined, rows_of, value


def test_the_bytes_of_an_item_are_those_of_its_own_box() -> None:
    assert item_nbytes(item("w", Box((2, 0), (3, 5)), (9, 5), torch.bfloat16)) == 30
    assert item_nbytes(item("w", Box((0,), (0,)), (9,))) == 0
    assert item_nbytes(value("step")) == 0


def test_dtype_and_shape_of_an_fqn_are_those_of_its_item() -> None:
    named = Named.by(item("w", Box((0,), (2,)), (4,), torch.bfloat16))
    assert (named, named.itemsize) == (("w", "bfloat16", (4,)), 2)
    assert (Named.by(value("lr")), Named.by(value("lr")).itemsize) == (("lr", None, ()), 0)


def test_items_of_all_dimensions_are_in_one_table() -> None:
    plan = SavePlan(
        [
            item("scalar", Box((), ()), ()),
            item("cube", Box((1, 0, 2), (1, 2, 3)), (2, 2, 5), torch.int64),
            value("step"),
            item("cube", Box((0, 0, 0), (1, 2, 3)), (2, 2, 5), torch.int64),
        ]
    )
    table = joined(plan)
    assert [name.fqn for name in table.names] == ["scalar", "cube", "step"]
    assert table.is_tensor.tolist() == [True, True, False]
    assert table.numbers_of(0).tolist() == [0, 1, 2, 1]
    assert table.nbytes.tolist() == [4, 48, 0, 48]
    assert table.rows_of(1).tolist() == [1, 3]
    assert table.boxes(table.rows_of(1)) == [item_box(plan.items[1]), item_box(plan.items[3])]
    assert table.boxes(table.rows_of(0)) == [Box((), ())]


def test_the_rows_of_each_rank_are_found_by_rank() -> None:
    plans = [rows_of(0, 3), SavePlan([]), rows_of(2, 3, tensors=1)]
    table = joined(*plans)
    assert table.starts.tolist() == [0, 4, 4, 6]
    assert [table.kept(rank).tolist() for rank in range(3)] == [[0, 1, 2, 3], [], [0, 1]]
    taken = table.take(table.rows_of(0))
    assert [taken.kept(rank).tolist() for rank in range(3)] == [[0], [], [0]]


@pytest.mark.parametrize(
    "other",
    [
        SavePlan([item("v", Box((0,), (2,)), (4,))]),
        SavePlan([item("w", Box((2,), (2,)), (4,))]),
        SavePlan([item("w", Box((0,), (1,)), (4,))]),
        SavePlan([item("w", Box((0,), (2,)), (8,))]),
        SavePlan([item("w", Box((0,), (2,)), (4,), torch.int32)]),
        SavePlan([item("w", Box((0,), (2,)), (4,))], planner_data={"w": ("w",)}),
        SavePlan([value("w")]),
        SavePlan([]),
    ],
)
def test_two_plans_have_one_digest_only_if_they_are_equal(other: SavePlan) -> None:
    plan = SavePlan([item("w", Box((0,), (2,)), (4,))])
    again = SavePlan([item("w", Box((0,), (2,)), (4,))])
    assert PlanTable.of(plan).digest == PlanTable.of(again).digest
    assert PlanTable.of(plan).digest != PlanTable.of(other).digest
    assert PlanTable.of(plan).digest != PlanTable.of(plan, buffers=["w"]).digest


def test_a_buffer_is_known_by_its_module_or_by_the_name_of_a_statistic() -> None:
    box = Box((0,), (2,))
    plan = SavePlan([item(f, box, (2,)) for f in ("a.mask", "a.weight", "a.running_mean")])
    assert PlanTable.of(plan, buffers=["a.mask"]).is_buffer.tolist() == [True, False, True]
    assert PlanTable.of(SavePlan([value("running_var")])).is_buffer.tolist() == [False]


def test_paths_are_those_of_all_ranks() -> None:
    first = SavePlan([value("a.b")], planner_data={"a.b": ("a", "b")})
    second = SavePlan([value("c")], planner_data={"c": ("c",)})
    assert joined(first, second).paths == {"a.b": ("a", "b"), "c": ("c",)}


def test_the_shard_index_has_each_box_once() -> None:
    plans = [rows_of(rank, 2) for rank in range(2)]
    record = share_out(joined(*plans)).record
    assert record.ranks == 2
    recorded = [(s.fqn, s.rank, s.box) for s in record.shards]
    assert recorded == sorted(
        (i.index.fqn, rank, item_box(i))
        for rank, plan in enumerate(plans)
        for i in plan.items
        if i.tensor_data is not None
    )
    turned = [SavePlan(plan.items[::-1]) for plan in plans]
    assert share_out(joined(*turned)).record == record
    assert record.shards[1] == record.shards[-5] == [*record.shards][1]
    assert [*record.shards[2:5]] == [*record.shards][2:5]
