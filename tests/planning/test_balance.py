"""Each replicated item is written once, by a rank that holds it, and no rank writes too much."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.planner import SavePlan

from dcpstore.geometry.boxes import Box
from dcpstore.planning.balance import item_nbytes, share_out
from dcpstore.planning.plan_checks import check_tiling
from dcpstore.planning.plan_table import GlobalTable, PlanTable

from .plans import item, joined, rows_of, value


def test_an_item_weighs_what_its_own_box_holds() -> None:
    assert item_nbytes(item("w", Box((2, 0), (3, 5)), (9, 5), torch.bfloat16)) == 30
    assert item_nbytes(item("w", Box((0,), (0,)), (9,))) == 0
    assert item_nbytes(value("step")) == 0


@given(st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=12), st.booleans())
@settings(deadline=None)
def test_each_replica_is_left_to_one_of_its_holders(
    holders: list[set[int]], to_lowest_rank: bool
) -> None:
    whole = {i: Box((0,), (i + 1,)) for i in range(len(holders))}
    held = {rank: [i for i, ranks in enumerate(holders) if rank in ranks] for rank in range(4)}
    plans = [SavePlan([item(f"t{i}", whole[i], (i + 1,)) for i in held[rank]]) for rank in range(4)]
    table = share_out(joined(*plans), to_lowest_rank=to_lowest_rank)
    check_tiling(table)
    written = {rank: [held[rank][at] for at in table.kept(rank).tolist()] for rank in range(4)}
    assert Counter(i for mine in written.values() for i in mine) == Counter(range(len(holders)))
    if to_lowest_rank:
        assert all(rank == min(holders[i]) for rank, mine in written.items() for i in mine)


def test_replicas_even_out_what_single_items_weigh() -> None:
    heavy = item("heavy", Box((0,), (90,)), (90,))
    both = [item(f"r{i}", Box((0,), (30,)), (30,)) for i in range(3)]
    table = share_out(joined(SavePlan([heavy, *both]), SavePlan(both)))
    assert table.kept(0).tolist() == [0]
    assert table.kept(1).tolist() == [0, 1, 2]


def test_the_largest_replica_is_given_first() -> None:
    sizes = (10, 20, 70, 40)
    plan = SavePlan([item(f"t{n}", Box((0,), (n,)), (n,)) for n in sizes])
    table = share_out(joined(plan, plan))
    assert [sum(sizes[i] for i in table.kept(rank).tolist()) for rank in range(2)] == [70, 70]


def test_values_and_buffers_stay_together_with_the_lowest_rank_that_holds_them() -> None:
    box = Box((0,), (9,))
    shared = [item("bn.mask", box, (9,)), item("bn.running_mean", box, (9,)), value("lr")]
    plans = [SavePlan([item("heavy", box, (9,))]), SavePlan(shared), SavePlan(shared)]
    tables = [PlanTable.of(plan, buffers=["bn.mask"]) for plan in plans]
    table = share_out(GlobalTable.of(tables))
    assert [table.kept(rank).tolist() for rank in range(3)] == [[0], [0, 1, 2], []]


def test_a_table_without_replicas_stays_as_it_is() -> None:
    table = joined(rows_of(0, 2), SavePlan(rows_of(1, 2).items[:-1]))
    assert share_out(table) is table
