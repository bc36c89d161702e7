"""The global plan: what is refused, and each replica written once, by a rank that holds it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from dcpstore.errors import InvalidInputError
from dcpstore.geometry.boxes import Box
from dcpstore.planning.global_plan import (
    check_agreement,
    check_names,
    check_results,
    check_tiling,
    share_out,
)
from dcpstore.planning.plan_table import GlobalTable, PlanTable

from .plans import item, joined, rows_of, value


def test_a_plan_that_tiles_its_tensors_passes_every_check() -> None:
    table = joined(rows_of(0, 2), SavePlan(rows_of(1, 2).items[:-1]))
    check_names(table)
    check_agreement(table)
    check_tiling(table)


def test_a_name_that_the_catalog_cannot_store_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="FQN"):
        check_names(joined(SavePlan([value("a\0b")])))


def test_a_tensor_of_too_many_dimensions_is_refused() -> None:
    shape = (1,) * 65
    box = Box((0,) * 65, shape)
    with pytest.raises(InvalidInputError, match=r"'w': a tensor of 65 dimensions.*reshape"):
        check_names(joined(SavePlan([item("w", box, shape)])))


def test_an_fqn_with_two_meanings_is_refused_with_its_ranks() -> None:
    box = Box((0,), (4,))
    plans = SavePlan([item("w", box, (4,))]), SavePlan([item("w", box, (4,), torch.float16)])
    with pytest.raises(InvalidInputError, match=r"'w' is float32 \(4,\) on rank 0, float16 .* 1"):
        check_agreement(joined(*plans))


def test_a_tensor_on_one_rank_and_a_value_on_others_is_refused() -> None:
    tensor, other = SavePlan([item("w", Box((0,), (4,)), (4,))]), SavePlan([value("w")])
    with pytest.raises(
        InvalidInputError, match=r"'w' is a value on ranks 0, 2, float32 \(4,\) on rank 1"
    ):
        check_agreement(joined(other, tensor, other))


@pytest.mark.parametrize(
    ("boxes", "problem"),
    [
        ([Box((0, 0), (4, 4)), Box((4, 0), (1, 4))], r"at \(4, 0\).*rank 1 is partly outside"),
        ([Box((0, 0), (2, 4)), Box((1, 0), (3, 4))], r"of rank 0 overlaps .* of rank 1"),
        ([Box((0, 0), (2, 4)), Box((3, 0), (1, 4))], r"ranks 0, 1 hold 12 of 16 elements"),
        ([Box((0, 0), (3, 4)), Box((-1, 0), (1, 4))], r"at \(-1, 0\).*rank 1 is partly outside"),
        # as many elements as the tensor has, and yet not a tiling
        ([Box((0, 0), (3, 4)), Box((2, 0), (1, 4))], r"of rank 0 overlaps .* of rank 1"),
    ],
)
def test_boxes_that_do_not_tile_are_refused_with_their_ranks(
    boxes: list[Box], problem: str
) -> None:
    plans = [SavePlan([item("w", box, (4, 4))]) for box in boxes]
    with pytest.raises(InvalidInputError, match=rf"'w' of shape \(4, 4\): .*{problem}"):
        check_tiling(joined(*plans))


def test_boxes_that_overlap_outside_of_a_grid_are_found() -> None:
    boxes = [Box((0, 0), (2, 4)), Box((2, 0), (2, 2)), Box((1, 2), (2, 2))]
    with pytest.raises(
        InvalidInputError, match=r"at \(0, 0\).*rank 0 overlaps.*at \(1, 2\).*rank 2"
    ):
        check_tiling(joined(*(SavePlan([item("w", box, (4, 4))]) for box in boxes)))


def test_a_value_that_two_ranks_plan_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="value 'step' is planned by ranks 0, 1"):
        check_tiling(joined(rows_of(0, 2), rows_of(1, 2)))


def test_only_the_first_of_many_problems_are_shown() -> None:
    plan = SavePlan([item(f"w{i:02}", Box((0,), (1,)), (4,)) for i in range(11)])
    with pytest.raises(InvalidInputError, match=r"'w07'.*; and 3 more: the shards") as caught:
        check_tiling(joined(plan))
    assert "'w08'" not in str(caught.value)


def results(*fqns: str) -> list[WriteResult]:
    return [WriteResult(MetadataIndex(fqn), 0, None) for fqn in fqns]


def test_what_was_written_must_be_what_was_planned() -> None:
    table = joined(SavePlan([value("a"), value("b")]), SavePlan([value("c")]))
    described = Metadata({fqn: BytesStorageMetadata() for fqn in "abc"})
    check_results(described, [results("b", "a"), results("c")], table)
    with pytest.raises(InvalidInputError, match="rank 1 returned 0 results for 1 planned"):
        check_results(described, [results("a", "b"), []], table)
    with pytest.raises(InvalidInputError, match="rank 0 returned 2 results for 2 planned"):
        check_results(described, [results("a", "a"), results("c")], table)
    more = Metadata({fqn: BytesStorageMetadata() for fqn in "abcd"})
    with pytest.raises(InvalidInputError, match=r"no rank wrote \['d'\] \(1 in all\)"):
        check_results(more, [results("a", "b"), results("c")], table)


@given(st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=12), st.booleans())
@settings(deadline=None)
def test_each_replica_is_written_by_one_of_its_holders(
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


def test_replicas_balance_the_bytes_of_single_items() -> None:
    heavy = item("heavy", Box((0,), (90,)), (90,))
    both = [item(f"r{i}", Box((0,), (30,)), (30,)) for i in range(3)]
    table = share_out(joined(SavePlan([heavy, *both]), SavePlan(both)))
    assert table.kept(0).tolist() == [0]
    assert table.kept(1).tolist() == [0, 1, 2]


def test_the_largest_replica_is_assigned_first() -> None:
    sizes = (10, 20, 70, 40)
    plan = SavePlan([item(f"t{n}", Box((0,), (n,)), (n,)) for n in sizes])
    table = share_out(joined(plan, plan))
    assert [sum(sizes[i] for i in table.kept(rank).tolist()) for rank in range(2)] == [70, 70]


def test_values_and_buffers_go_to_the_lowest_rank_that_holds_them() -> None:
    box = Box((0,), (9,))
    shared = [item("bn.mask", box, (9,)), item("bn.running_mean", box, (9,)), value("lr")]
    plans = [SavePlan([item("heavy", box, (9,))]), SavePlan(shared), SavePlan(shared)]
    tables = [PlanTable.of(plan, buffers=["bn.mask"]) for plan in plans]
    table = share_out(GlobalTable.of(tables))
    assert [table.kept(rank).tolist() for rank in range(3)] == [[0], [0, 1, 2], []]


def test_a_table_without_replicas_is_returned_unchanged() -> None:
    table = joined(rows_of(0, 2), SavePlan(rows_of(1, 2).items[:-1]))
    assert share_out(table) is table
