"""A plan that does not tile its tensors is refused before a byte is written, with FQN and ranks."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from dcpstore.errors import InvalidInputError
from dcpstore.geometry.boxes import Box
from dcpstore.planning.plan_checks import (
    check_agreement,
    check_names,
    check_results,
    check_tiling,
)

from .plans import item, joined, rows_of, value


def test_a_plan_that_tiles_its_tensors_passes_every_check() -> None:
    table = joined(rows_of(0, 2), SavePlan(rows_of(1, 2).items[:-1]))
    check_names(table)
    check_agreement(table)
    check_tiling(table)


def test_a_name_that_no_catalog_keeps_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="FQN"):
        check_names(joined(SavePlan([value("a\0b")])))


def test_a_tensor_of_too_many_dimensions_is_refused() -> None:
    shape = (1,) * 65
    box = Box((0,) * 65, shape)
    with pytest.raises(InvalidInputError, match=r"'w': a tensor of 65 dimensions.*reshape"):
        check_names(joined(SavePlan([item("w", box, shape)])))


def test_what_two_ranks_mean_otherwise_is_named() -> None:
    box = Box((0,), (4,))
    plans = SavePlan([item("w", box, (4,))]), SavePlan([item("w", box, (4,), torch.float16)])
    with pytest.raises(InvalidInputError, match=r"'w' is float32 \(4,\) on rank 0, float16 .* 1"):
        check_agreement(joined(*plans))


def test_a_tensor_on_one_rank_and_a_value_on_others_is_named() -> None:
    tensor, other = SavePlan([item("w", Box((0,), (4,)), (4,))]), SavePlan([value("w")])
    with pytest.raises(
        InvalidInputError, match=r"'w' is a value on ranks 0, 2, float32 \(4,\) on rank 1"
    ):
        check_agreement(joined(other, tensor, other))


@pytest.mark.parametrize(
    ("boxes", "problem"),
    [
        ([Box((0, 0), (4, 4)), Box((4, 0), (1, 4))], r"at \(4, 0\).*rank 1 reaches outside"),
        ([Box((0, 0), (2, 4)), Box((1, 0), (3, 4))], r"of rank 0 overlaps .* of rank 1"),
        ([Box((0, 0), (2, 4)), Box((3, 0), (1, 4))], r"ranks 0, 1 hold 12 of 16 elements"),
        ([Box((0, 0), (3, 4)), Box((-1, 0), (1, 4))], r"at \(-1, 0\).*rank 1 reaches outside"),
        # as many elements as the tensor has, and yet not a tiling
        ([Box((0, 0), (3, 4)), Box((2, 0), (1, 4))], r"of rank 0 overlaps .* of rank 1"),
    ],
)
def test_boxes_that_do_not_tile_are_named(boxes: list[Box], problem: str) -> None:
    plans = [SavePlan([item("w", box, (4, 4))]) for box in boxes]
    with pytest.raises(InvalidInputError, match=rf"'w' of shape \(4, 4\): .*{problem}"):
        check_tiling(joined(*plans))


def test_boxes_that_overlap_in_no_grid_are_found() -> None:
    boxes = [Box((0, 0), (2, 4)), Box((2, 0), (2, 2)), Box((1, 2), (2, 2))]
    with pytest.raises(
        InvalidInputError, match=r"at \(0, 0\).*rank 0 overlaps.*at \(1, 2\).*rank 2"
    ):
        check_tiling(joined(*(SavePlan([item("w", box, (4, 4))]) for box in boxes)))


def test_a_value_that_two_ranks_plan_is_named() -> None:
    with pytest.raises(InvalidInputError, match="value 'step' is planned by ranks 0, 1"):
        check_tiling(joined(rows_of(0, 2), rows_of(1, 2)))


def test_of_many_problems_the_first_are_shown() -> None:
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
    with pytest.raises(InvalidInputError, match=r"nobody wrote \['d'\] \(1 in all\)"):
        check_results(more, [results("a", "b"), results("c")], table)
