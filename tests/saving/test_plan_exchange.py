"""What ranks send of their plans: the whole table once, and then its digest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.planner import SavePlan

from dcpstore.planning.save_planner import DefaultSavePlanner
from dcpstore.records import ChunkDefaults, EntryRecord, TensorRecord
from dcpstore.saving.layout import Layout
from dcpstore.saving.plan_exchange import LocalPlan, PlanMemory, reply_to_offers
from tests.planning.plans import rows_of

CHUNK = ChunkDefaults(nbytes=1 << 20, codec="none")


class Rank:
    """One rank of a save that is planned in this process, with its cache."""

    def __init__(self) -> None:
        self.memory = PlanMemory()

    def plan(self, plan: SavePlan) -> LocalPlan:
        return LocalPlan(plan, DefaultSavePlanner(), self.memory)


def plan_together(
    ranks: list[Rank], plans: list[SavePlan], parent: dict[str, EntryRecord] | None = None
) -> tuple[int, list[tuple[SavePlan, dict[str, Layout]]]]:
    """Return how many tables were sent, and what each rank writes."""
    local_plans = [rank.plan(plan) for rank, plan in zip(ranks, plans, strict=True)]
    offers = [local.offer() for local in local_plans]
    tables = sum(offer.table is not None for offer in offers)

    def reply(offers: list) -> tuple:
        return reply_to_offers(
            offers, ranks[0].memory, chunk=CHUNK, parent=parent or {}, to_lowest_rank=False
        )

    plan, replies = reply(offers)
    if plan is None:
        assert all(reply.wants_table for reply in replies)
        offers = [local.offer(whole=True) for local in local_plans]
        tables += len(offers)
        plan, replies = reply(offers)
    assert plan is not None
    taken = zip(local_plans, replies, strict=True)
    return tables, [(plan, dict(cut)) for p, a in taken for plan, cut in [p.take(a)]]


def test_a_cached_plan_is_sent_as_its_digest() -> None:
    ranks, plans = [Rank(), Rank()], [rows_of(rank, 2) for rank in range(2)]
    tables, first = plan_together(ranks, plans)
    assert tables == 2
    tables, again = plan_together(ranks, [rows_of(rank, 2) for rank in range(2)])
    assert tables == 0
    assert again == first
    tables, _ = plan_together(ranks, [rows_of(rank, 2, tensors=4) for rank in range(2)])
    assert tables == 2
    assert plan_together(ranks, plans) == (0, first)


def test_a_new_process_gets_the_plan_again() -> None:
    plans = [rows_of(rank, 2) for rank in range(2)]
    ranks = [Rank(), Rank()]
    _, first = plan_together(ranks, plans)
    ranks[1] = Rank()  # a new process, which sends its table
    tables, again = plan_together(ranks, plans)
    assert (tables, again) == (1, first)
    ranks[0] = Rank()  # the coordinator: it must ask rank 1 for its table
    tables, again = plan_together(ranks, plans)
    assert again == first
    assert tables == 3


def test_new_grids_of_the_parent_replace_those_of_a_cached_plan() -> None:
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


class Other(DefaultSavePlanner):
    """A planner of the caller, which may change its items in place."""


def offered(
    state: dict[str, Any], memory: PlanMemory, planner: type[DefaultSavePlanner], *buffers: str
) -> bytes:
    """Return the digest of the plan that a rank offers."""
    made = planner()
    made.set_up_planner(state, is_coordinator=True)
    return LocalPlan(made.create_local_plan(), made, memory, buffers=buffers).offer().digest


@pytest.mark.parametrize(
    "state",
    [
        pytest.param({"b": torch.ones(2), "m": {"a": torch.ones(2, 3).int()}}, id="dtype"),
        pytest.param({"b": torch.ones(2), "m": {"a": torch.ones(3, 2)}}, id="shape"),
        pytest.param({"b": torch.ones(2), "m": {"a": 1.5}}, id="kind"),
        pytest.param({"m": {"a": torch.ones(2, 3)}, "b": torch.ones(2)}, id="order"),
        pytest.param({"b": torch.ones(2), "m.a": torch.ones(2, 3)}, id="path"),
        pytest.param({"b": torch.ones(2), "m": {"a": torch.ones(2, 3)}, "c": 1}, id="one more"),
        pytest.param({"m": {"a": torch.ones(2, 3)}}, id="one less"),
    ],
)
def test_another_plan_of_the_same_names_is_not_taken_for_the_cached_one(
    state: dict[str, Any],
) -> None:
    memory = PlanMemory()
    first = {"b": torch.ones(2), "m": {"a": torch.ones(2, 3)}}
    known = offered(first, memory, DefaultSavePlanner)
    assert offered(first, memory, DefaultSavePlanner) == known == offered(first, memory, Other)
    assert offered(state, memory, DefaultSavePlanner) == offered(state, PlanMemory(), Other)
    assert offered(state, memory, DefaultSavePlanner) != known
    assert offered(first, memory, DefaultSavePlanner, "b") != known


def test_items_that_were_changed_in_place_are_read_again() -> None:
    plan = rows_of(0, 1)
    memory = PlanMemory()
    known = LocalPlan(plan, Other(), memory).offer().digest
    assert plan.items[0].tensor_data is not None
    plan.items[0].tensor_data.properties.dtype = torch.float16
    assert LocalPlan(plan, Other(), memory).offer().digest != known
