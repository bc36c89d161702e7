"""What ranks send to one another in a load, and a rank that fails in one of its exchanges."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.distributed.checkpoint import default_planner as torch_planner
from torch.distributed.tensor import DTensor, Shard

import dcpstore
from dcpstore.reading import box_reads
from tests.exchanges import Sent, counted
from tests.ranks import RankPool, first_ranks, mesh
from tests.soundness import Place

TENSORS = 300
ERROR = 200  # bytes that suffice for a message without content


class Global(dcpstore.DefaultLoadPlanner):
    """Has a global plan of its own, which is torch's."""

    def create_global_plan(self, global_plan: list[dcpstore.LoadPlan]) -> list[dcpstore.LoadPlan]:
        self.seen = [len(plan.items) for plan in global_plan]
        return super().create_global_plan(global_plan)


class Refusing(dcpstore.DefaultLoadPlanner):
    """Fails in the step that it is given."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self._step = step

    def create_local_plan(self) -> dcpstore.LoadPlan:
        if self._step == "plan":
            raise OSError("no plan")
        return super().create_local_plan()

    def finish_plan(self, central_plan: dcpstore.LoadPlan) -> dcpstore.LoadPlan:
        if self._step == "finish":
            raise OSError("no finish")
        return super().finish_plan(central_plan)


def state(ranks: int, fill: float) -> dict[str, Any]:
    """Return different tensors of which each rank has its rows, and a value."""
    tensors: dict[str, Any] = {
        f"layer.{i}.weight": DTensor.from_local(
            torch.full((2, 4), fill * (i + 1)), mesh((ranks,)), [Shard(0)], run_check=False
        )
        for i in range(TENSORS)
    }
    return tensors | {"step": int(fill)}


def holds(target: dict[str, Any], fill: float) -> bool:
    """Tell whether the tensors are those of `state` with this fill."""
    return all(
        (target[f"layer.{i}.weight"].to_local() == fill * (i + 1)).all() for i in range(TENSORS)
    )


def planner_of(kind: str) -> dcpstore.LoadPlanner | None:
    if kind == "own global plan":
        return Global()
    if kind == "torch's":
        return torch_planner.DefaultLoadPlanner()
    if kind == "patched":
        patched = dcpstore.DefaultLoadPlanner()
        patched.create_global_plan = lambda plans: plans  # type: ignore[method-assign]
        return patched
    return None


def save_and_load(rank: int, folder: Path, ranks: int, kind: str) -> Sent:
    group = first_ranks(ranks)
    mesh((ranks,))
    if rank >= ranks:
        return {}
    dcpstore.save(state(ranks, 3.0), folder, process_group=group)
    target = state(ranks, 0.0)
    planner = planner_of(kind)
    with counted() as sent:
        dcpstore.load(target, folder, planner=planner, process_group=group)
    assert target["step"] == 3
    assert holds(target, 3.0)
    if isinstance(planner, Global) and rank == 0:
        assert planner.seen == [TENSORS + 1] * ranks
    return sent


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", ["ours", "torch's"])
def test_plans_of_torchs_global_plan_are_not_sent(
    tmp_path: Path, four_ranks: RankPool, ranks: int, kind: str
) -> None:
    for rank, sent in enumerate(four_ranks.run(save_and_load, tmp_path, ranks, kind)[:ranks]):
        assert [n <= ERROR for n in sent["plan"]] == [True], sent
        if rank == 0:
            assert [n <= ERROR for n in sent["plan, answers"]] == [True], sent


@pytest.mark.parametrize("kind", ["own global plan", "patched"])
def test_plans_go_to_a_planner_with_a_global_plan_of_its_own(
    tmp_path: Path, two_ranks: RankPool, kind: str
) -> None:
    for sent in two_ranks.run(save_and_load, tmp_path, 2, kind):
        assert sent["plan"][0] > 50 * TENSORS


def load_where_one_fails(rank: int, folder: Path, step: str) -> tuple[str, dict[int, str], bool]:
    target = state(2, 0.0)
    try:
        dcpstore.load(target, folder, planner=Refusing(step if rank == 1 else ""))
    except dcpstore.RankFailure as error:
        untouched = holds(target, 0.0)
        return str(error), {at: repr(one) for at, one in error.failures.items()}, untouched
    return "loaded", {}, False


@pytest.mark.parametrize("step", ["plan", "finish"])
def test_a_rank_that_fails_to_plan_makes_all_raise(
    tmp_path: Path, two_ranks: RankPool, step: str
) -> None:
    two_ranks.run(save_and_load, tmp_path, 2, "ours")
    first, second = two_ranks.run(load_where_one_fails, tmp_path, step)
    assert first == second
    assert first[1] == {1: f"OSError('no {step}')"}
    assert first[2]
    assert two_ranks.run(save_and_load, tmp_path, 2, "ours")  # the group can be used again


def load_with_statements(rank: int, place: Place, ranks: int) -> tuple[int, int, list[int]]:
    """Load on the first ranks; return the chunk look-ups of this rank, and the bytes of rows."""
    group = first_ranks(ranks)
    mesh((ranks,))
    if rank >= ranks:
        return 0, 0, []
    with place.open() as repo:
        dcpstore.save(state(ranks, 3.0), repo, process_group=group)
        target = state(ranks, 0.0)
        looked_up = 0
        load_chunks = box_reads.load_chunks

        def counted_load(*args: Any, **options: Any) -> Any:
            nonlocal looked_up
            looked_up += 1
            return load_chunks(*args, **options)

        with patch.object(box_reads, "load_chunks", counted_load), counted() as sent:
            report = dcpstore.load(target, repo, process_group=group)
        assert holds(target, 3.0)
        return looked_up, report.chunks, sent["find"] + sent.get("find, answers", [])


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_coordinator_looks_chunks_up_for_all_ranks(
    place: Place, four_ranks: RankPool, ranks: int
) -> None:
    place.open().close()
    done = four_ranks.run(load_with_statements, place, ranks)[:ranks]
    assert [looked_up for looked_up, _, _ in done] == [1] + [0] * (ranks - 1)
    assert {chunks for _, chunks, _ in done} == {ranks * TENSORS}
    for _, _, sent in done:
        assert 32 * TENSORS <= sent[0] < 32 * TENSORS + 500  # four numbers a range
    assert 90 * ranks * TENSORS < done[0][2][1] < 100 * ranks * TENSORS + 1000 * ranks


def lose_a_chunk(rank: int, place: Place) -> list[str]:
    """Load when the catalog lacks a chunk of the second rank, and again when it has it."""
    raised = []
    with place.open() as repo:
        dcpstore.save(state(2, 3.0), repo)
        load_chunks = box_reads.load_chunks
        for lost in (1, 0):
            target = state(2, 0.0)
            with patch.object(
                box_reads, "load_chunks", lambda *a, n=lost: load_chunks(*a)[: -n or None]
            ):
                try:
                    dcpstore.load(target, repo)
                    raised.append("")
                except dcpstore.CorruptionError as error:
                    raised.append(str(error))
            assert holds(target, 0.0 if lost else 3.0)
    return raised


def test_a_chunk_that_is_not_found_makes_all_ranks_raise(place: Place, two_ranks: RankPool) -> None:
    place.open().close()
    first, second = two_ranks.run(lose_a_chunk, place)
    assert first == second
    assert "the catalog lacks chunk" in first[0]
    assert first[1] == ""
