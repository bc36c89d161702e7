"""Plans in columns: shared out, checked and told in full only once."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from dcpstore.errors import InvalidInputError
from dcpstore.geometry.boxes import Box
from dcpstore.planning.balance import share_out
from dcpstore.planning.plan_checks import check_agreement, check_tiling, item_box
from dcpstore.planning.plan_table import GlobalTable, PlanTable
from dcpstore.planning.save_planner import DefaultSavePlanner
from dcpstore.records import ChunkDefaults, EntryRecord, TensorRecord
from dcpstore.saving.layout import Layout
from dcpstore.saving.plan_exchange import LocalPlan, PlanMemory, reply_to_offers

CHUNK = ChunkDefaults(nbytes=1 << 20, codec="none")


def item(
    fqn: str, box: Box, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> WriteItem:
    offsets = torch.Size(box.offsets)
    return WriteItem(
        MetadataIndex(fqn, offsets),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            ChunkStorageMetadata(offsets, torch.Size(box.sizes)),
            TensorProperties(dtype),
            torch.Size(shape),
        ),
    )


def rows_of(rank: int, ranks: int, tensors: int = 3) -> SavePlan:
    """Return the plan of a rank that holds its rows of each tensor, and one value."""
    boxes = [Box((4 * rank, 0), (4, 8)) for _ in range(tensors)]
    items = [item(f"w{i}", box, (4 * ranks, 8)) for i, box in enumerate(boxes)]
    return SavePlan([*items, WriteItem(MetadataIndex("step"), WriteItemType.BYTE_IO)])


def joined(*plans: SavePlan) -> GlobalTable:
    return GlobalTable.of([PlanTable.of(plan) for plan in plans])


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


def test_what_two_ranks_mean_otherwise_is_named() -> None:
    box = Box((0,), (4,))
    plans = SavePlan([item("w", box, (4,))]), SavePlan([item("w", box, (4,), torch.float16)])
    with pytest.raises(InvalidInputError, match=r"'w' is float32 \(4,\) on rank 0, float16 .* 1"):
        check_agreement(joined(*plans))


def test_boxes_that_overlap_in_no_grid_are_found() -> None:
    boxes = [Box((0, 0), (2, 4)), Box((2, 0), (2, 2)), Box((1, 2), (2, 2))]
    with pytest.raises(
        InvalidInputError, match=r"at \(0, 0\).*rank 0 overlaps.*at \(1, 2\).*rank 2"
    ):
        check_tiling(joined(*(SavePlan([item("w", box, (4, 4))]) for box in boxes)))


def test_the_shard_index_names_each_box_once() -> None:
    plans = [rows_of(rank, 2) for rank in range(2)]
    record = share_out(joined(*plans)).record
    assert record.ranks == 2
    told = [(s.fqn, s.rank, s.box) for s in record.shards]
    assert told == sorted(
        (i.index.fqn, rank, item_box(i))
        for rank, plan in enumerate(plans)
        for i in plan.items
        if i.tensor_data is not None
    )
    turned = [SavePlan(plan.items[::-1]) for plan in plans]
    assert share_out(joined(*turned)).record == record


class Rank:
    """One rank of a save that is planned in this process, with what it remembers."""

    def __init__(self) -> None:
        self.memory = PlanMemory()

    def propose(self, plan: SavePlan) -> LocalPlan:
        return LocalPlan(plan, DefaultSavePlanner(), self.memory)


def plan_together(
    ranks: list[Rank], plans: list[SavePlan], parent: dict[str, EntryRecord] | None = None
) -> tuple[int, list[tuple[SavePlan, dict[str, Layout]]]]:
    """Return how many tables were told, and what each rank is to write."""
    proposals = [rank.propose(plan) for rank, plan in zip(ranks, plans, strict=True)]
    offers = [proposal.offer() for proposal in proposals]
    tables = sum(offer.table is not None for offer in offers)

    def answered(offers: list) -> tuple:
        return reply_to_offers(
            offers, ranks[0].memory, chunk=CHUNK, parent=parent or {}, to_lowest_rank=False
        )

    plan, replies = answered(offers)
    if plan is None:
        assert all(reply.asks for reply in replies)
        offers = [proposal.offer(whole=True) for proposal in proposals]
        tables += len(offers)
        plan, replies = answered(offers)
    assert plan is not None
    taken = zip(proposals, replies, strict=True)
    return tables, [(mine, dict(cut)) for p, a in taken for mine, cut in [p.take(a)]]


def test_a_known_plan_is_told_by_its_digest() -> None:
    ranks, plans = [Rank(), Rank()], [rows_of(rank, 2) for rank in range(2)]
    tables, first = plan_together(ranks, plans)
    assert tables == 2
    tables, again = plan_together(ranks, [rows_of(rank, 2) for rank in range(2)])
    assert tables == 0
    assert again == first
    tables, _ = plan_together(ranks, [rows_of(rank, 2, tensors=4) for rank in range(2)])
    assert tables == 2
    assert plan_together(ranks, plans) == (0, first)


def test_whoever_forgot_is_told_again() -> None:
    plans = [rows_of(rank, 2) for rank in range(2)]
    ranks = [Rank(), Rank()]
    _, first = plan_together(ranks, plans)
    ranks[1] = Rank()  # begun anew, and tells its table
    tables, again = plan_together(ranks, plans)
    assert (tables, again) == (1, first)
    ranks[0] = Rank()  # the coordinator: it must ask for what rank 1 did not tell
    tables, again = plan_together(ranks, plans)
    assert again == first
    assert tables == 3


def test_grids_that_the_parent_has_meanwhile_are_kept() -> None:
    ranks, plans = [Rank(), Rank()], [rows_of(rank, 2) for rank in range(2)]
    _, first = plan_together(ranks, plans)
    grid = first[0][1]["w0"].grids[0]
    finer = type(grid)(grid.offsets, grid.shape, (2, 8))
    tensor = TensorRecord(1, "0" * 64, "float32", (8, 8), "none", 256, (finer,))
    parent = {"w0": EntryRecord("w0", ("w0",), "tensor", tensor)}
    for _ in range(2):
        _, taken = plan_together(ranks, plans, parent)
        assert [cut["w0"].grids for _, cut in taken] == [(finer,), (finer,)]
        assert taken[0][1]["w1"] == first[0][1]["w1"]
    _, taken = plan_together(ranks, plans, parent)
    assert all(cut["w0"].grids == (finer,) for _, cut in taken)
