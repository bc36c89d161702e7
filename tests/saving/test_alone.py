"""With `use_collectives=False` each rank saves and loads its own version, without the others."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import dcpstore
from dcpstore import AlreadyExistsError, InvalidInputError, NotFoundError, PerRank, Retention
from tests.ranks import RankPool, mesh
from tests.saving.test_ranks import caught
from tests.soundness import Place, assert_sound
from tests.torch_release import since_2_9

Save = Callable[..., dcpstore.Version]
SAVES: dict[str, Save] = {
    "save": dcpstore.save,
    "async": lambda *given, **how: dcpstore.async_save(*given, **how).result(),
    "torch's planner": lambda *given, **how: dcpstore.save(
        *given, planner=dcp.DefaultSavePlanner(), **how
    ),
}


def state(rank: int | None) -> dict[str, Any]:
    """Return a state that differs between ranks; with None, a state to load into."""
    of = -1 if rank is None else rank
    whole = torch.zeros(5, 3) if rank is None else torch.arange(15.0).reshape(5, 3)
    return {
        "w": torch.full((3,), float(of)),
        "step": of,
        "deep": [{"t": torch.tensor(of)}],
        "own": PerRank(f"rank {of}"),
        "sharded": distribute_tensor(whole, mesh((2,)), [Shard(0)]),
        "few": distribute_tensor(whole[:1], mesh((2,)), [Shard(0)]),
        "replicated": distribute_tensor(whole, mesh((2,)), [Replicate()]),
    }


def values_of(of: dict[str, Any]) -> list[Any]:
    """Return the values that a state has on this rank, as lists."""
    sharded = [of[key].to_local().tolist() for key in ("sharded", "few", "replicated")]
    return [of["w"].tolist(), of["step"], of["deep"][0]["t"].item(), of["own"].value, *sharded]


def save_and_load(rank: int, place: Place, call: str) -> bool:
    """Save twice on each rank, and load the tip and the version before it."""
    with place.open() as repo:
        own = state(rank)
        for step in (1, 2):
            version = SAVES[call](
                own, repo, step=step, tags=[f"t{step}"], metrics={"loss": float(rank)},
                labels={"of": rank}, retention=Retention(keep_last=5), use_collectives=False,
            )  # fmt: skip
        assert version.branch == f"main/rank-{rank}"
        assert version.tags == (f"t2/rank-{rank}",)
        assert (dict(version.metrics), dict(version.labels)) == ({"loss": rank}, {"of": str(rank)})
        for ref, number in ((None, 2), ("main", 2), ("main~1", 1), ("t1", 1), ("main@step=1", 1)):
            filled = state(None)
            report = dcpstore.load(filled, repo, ref)
            assert values_of(filled) == values_of(own), ref
            assert report.version.step == number
            assert report.version.branch == f"main/rank-{rank}"
    return True


@pytest.mark.parametrize(
    "call",
    # the planner of torch 2.8 refuses a plan that is not of whole tensors
    [pytest.param(call, marks=since_2_9) if call == "torch's planner" else call for call in SAVES],
)
def test_each_rank_saves_and_loads_its_own_version(
    place: Place, two_ranks: RankPool, call: str
) -> None:
    place.open().close()
    assert two_ranks.run(save_and_load, place, call) == [True, True]
    with place.open() as repo:
        assert [ref.name for ref in repo.branches()] == ["main/rank-0", "main/rank-1"]
        assert len(repo.log()) == 4
        assert {v.ranks for v in repo.log()} == {1}
        assert_sound(repo)


def call_on_one(rank: int, place: Place, call: str) -> str:
    """Save and load on one rank of two, while the other one makes no call."""
    if rank == 0:
        return "idle"
    with place.open() as repo:
        SAVES[call]({"w": torch.ones(3)}, repo, use_collectives=False)
        filled = {"w": torch.zeros(3)}
        dcpstore.load(filled, repo, "main/rank-1", no_dist=True)
        return str(filled["w"].tolist())


@pytest.mark.parametrize("call", ["save", "async"])
def test_one_rank_of_two_saves_and_returns(place: Place, two_ranks: RankPool, call: str) -> None:
    place.open().close()
    assert two_ranks.run(call_on_one, place, call) == ["idle", "[1.0, 1.0, 1.0]"]
    assert two_ranks.run(reduce_ranks) == [1, 1]  # the process group still works


def reduce_ranks(rank: int) -> int:
    total = torch.tensor(rank)
    dist.all_reduce(total)
    return int(total)


def load_on_one(rank: int, place: Place) -> list[float] | str:
    """Load on one rank of two, by the branch's plain name, what each rank saved for itself."""
    with place.open() as repo:
        dcpstore.save({"w": torch.full((2,), rank + 1.0)}, repo, use_collectives=False)
    dist.barrier()
    if rank == 0:
        return "idle"
    with place.open() as repo:
        filled = {"w": torch.zeros(2)}
        dcpstore.load(filled, repo)
    return filled["w"].tolist()


def test_one_rank_of_two_loads_and_returns(place: Place, two_ranks: RankPool) -> None:
    place.open().close()
    assert two_ranks.run(load_on_one, place) == ["idle", [2.0, 2.0]]
    with place.open() as repo, pytest.raises(NotFoundError, match="branch or tag 'other'"):
        dcpstore.load({"w": torch.zeros(2)}, repo, "other")


def load_where_one_rank_saved(rank: int, place: Place) -> tuple[str, str, dict[int, str]]:
    with place.open() as repo:
        if rank == 0:
            dcpstore.save({"w": torch.ones(2)}, repo, use_collectives=False)
        dist.barrier()
        return caught(lambda: dcpstore.load({"w": torch.zeros(2)}, repo))


def test_a_rank_that_saved_nothing_gets_an_error(place: Place, two_ranks: RankPool) -> None:
    place.open().close()
    first, second = two_ranks.run(load_where_one_rank_saved, place)
    assert first[0] == "nothing"
    assert second[0] == "NotFoundError"
    assert "rank 1 has no version 'main/rank-1'" in second[1]


def through_torch(rank: int, place: Place) -> list[Any]:
    """Save with torch's calls and load with ours, and the other way round."""
    values = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = dcpstore.RepositoryWriter(place.url, tags=["t"])
        dcp.save({"w": torch.full((2,), rank + 1.0)}, storage_writer=writer, use_collectives=False)
        filled = {"w": torch.zeros(2)}
        with place.open() as repo:
            dcpstore.load(filled, repo, "t")
            values.append(filled["w"].tolist())
            dcpstore.save({"w": torch.full((2,), rank + 3.0)}, repo, use_collectives=False)
        dist.barrier()
        dcp.load(filled, storage_reader=dcpstore.RepositoryReader(place.url))
        values.append(filled["w"].tolist())
        sharded = {"d": distribute_tensor(torch.arange(4.0), mesh((2,)), [Shard(0)])}
        own = dcpstore.RepositoryWriter(place.url)
        dcpstore.save(sharded, storage_writer=own, use_collectives=False)
    return values


@since_2_9
def test_torchs_calls_use_the_same_names(place: Place, two_ranks: RankPool) -> None:
    place.open().close()
    values = two_ranks.run(through_torch, place)
    assert values == [[[1.0, 1.0], [3.0, 3.0]], [[2.0, 2.0], [4.0, 4.0]]]


def test_options_that_need_other_ranks_are_refused(place: Place) -> None:
    with place.open() as repo:
        with pytest.raises(InvalidInputError, match="metrics_from='rank0'"):
            dcpstore.save({}, repo, metrics_from="rank0", use_collectives=False)
        dcpstore.save({"x": 1}, repo, tags=["a"], use_collectives=False)
        with pytest.raises(AlreadyExistsError, match="'a/rank-0' is taken"):
            dcpstore.save({"x": 1}, repo, tags=["a"], use_collectives=False)
        assert len(repo.log()) == 1


def test_a_plain_branch_that_hides_a_rank_s_version_is_named(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    with place.open() as repo:
        dcpstore.save({"x": 1}, repo, use_collectives=False)
        assert caplog.text.count("with collectives before") == 0
        dcpstore.save({"x": 2}, repo)
        dcpstore.save({"x": 3}, repo, use_collectives=False)
        assert caplog.text.count("'main' was saved with collectives before") == 1
        filled = {"x": 0}
        dcpstore.load(filled, repo)
        assert filled == {"x": 2}
        dcpstore.load(filled, repo, "main/rank-0")
        assert filled == {"x": 3}


def test_without_a_process_group_it_is_rank_0(place: Place) -> None:
    with place.open() as repo:
        version = dcpstore.save({"x": 1}, repo, use_collectives=False)
        assert version.branch == "main/rank-0"
        filled = {"x": 0}
        dcpstore.load(filled, repo)
        assert filled == {"x": 1}
