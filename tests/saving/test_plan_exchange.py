"""What ranks tell each other of their plans: in full once, and then by a digest."""

from __future__ import annotations

from torch.distributed.checkpoint.planner import SavePlan

from dcpstore.planning.save_planner import DefaultSavePlanner
from dcpstore.records import ChunkDefaults, EntryRecord, TensorRecord
from dcpstore.saving.layout import Layout
from dcpstore.saving.plan_exchange import LocalPlan, PlanMemory, reply_to_offers
from tests.planning.plans import rows_of

CHUNK = ChunkDefaults(nbytes=1 << 20, codec="none")


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
        assert all(reply.wants_table for reply in replies)
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
