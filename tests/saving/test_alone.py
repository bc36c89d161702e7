"""`use_collectives=False`: each rank saves and loads its own, and waits for no other."""

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
    """Return a state that differs between ranks; None is one to be filled."""
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


def plain(of: dict[str, Any]) -> list[Any]:
    """Return what a state holds on this rank, as lists."""
    sharded = [of[key].to_local().tolist() for key in ("sharded", "few", "replicated")]
    return [of["w"].tolist(), of["step"], of["deep"][0]["t"].item(), of["own"].value, *sharded]


def save_and_load(rank: int, place: Place, face: str) -> bool:
    """Save on each rank, twice, and load the tip and the one before it."""
    with place.open() as repo:
        mine = state(rank)
        for step in (1, 2):
            version = SAVES[face](
                mine, repo, step=step, tags=[f"t{step}"], metrics={"loss": float(rank)},
                labels={"of": rank}, retention=Retention(keep_last=5), use_collectives=False,
            )  # fmt: skip
        assert version.branch == f"main/rank-{rank}"
        assert version.tags == (f"t2/rank-{rank}",)
        assert (dict(version.metrics), dict(version.labels)) == ({"loss": rank}, {"of": str(rank)})
        for ref, number in ((None, 2), ("main", 2), ("main~1", 1), ("t1", 1), ("main@step=1", 1)):
            filled = state(None)
            report = dcpstore.load(filled, repo, ref)
            assert plain(filled) == plain(mine), ref
            assert report.version.step == number
            assert report.version.branch == f"main/rank-{rank}"
    return True


@pytest.mark.parametrize(
    "face",
    # the planner of torch 2.8 refuses a plan that is not of whole tensors
    [pytest.param(face, marks=since_2_9) if face == "torch's planner" else face for face in SAVES],
)
def test_each_rank_saves_and_loads_its_own(place: Place, two_ranks: RankPool, face: str) -> None:
    place.open().close()
    assert two_ranks.run(save_and_load, place, face) == [True, True]
    with place.open() as repo:
        assert [ref.name for ref in repo.branches()] == ["main/rank-0", "main/rank-1"]
        assert len(repo.log()) == 4
        assert {v.ranks for v in repo.log()} == {1}
        assert_sound(repo)


def call_on_one(rank: int, place: Place, face: str) -> str:
    """Save and load on one rank of two, while the other has nothing to do with it."""
    if rank == 0:
        return "idle"
    with place.open() as repo:
        SAVES[face]({"w": torch.ones(3)}, repo, use_collectives=False)
        filled = {"w": torch.zeros(3)}
        dcpstore.load(filled, repo, "main/rank-1", no_dist=True)
        return str(filled["w"].tolist())


@pytest.mark.parametrize("face", ["save", "async"])
def test_one_rank_of_two_saves_and_returns(place: Place, two_ranks: RankPool, face: str) -> None:
    place.open().close()
    assert two_ranks.run(call_on_one, place, face) == ["idle", "[1.0, 1.0, 1.0]"]
    assert two_ranks.run(meet) == [1, 1]  # and the group is as it was


def meet(rank: int) -> int:
    told = torch.tensor(rank)
    dist.all_reduce(told)
    return int(told)


def load_on_one(rank: int, place: Place) -> list[float] | str:
    """Load on one rank of two, by the plain name, what each saved for itself."""
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


def load_where_there_is_less(rank: int, place: Place) -> tuple[str, str, dict[int, str]]:
    with place.open() as repo:
        if rank == 0:
            dcpstore.save({"w": torch.ones(2)}, repo, use_collectives=False)
        dist.barrier()
        return caught(lambda: dcpstore.load({"w": torch.zeros(2)}, repo))


def test_a_rank_that_saved_none_hears_so(place: Place, two_ranks: RankPool) -> None:
    place.open().close()
    first, second = two_ranks.run(load_where_there_is_less, place)
    assert first[0] == "nothing"
    assert second[0] == "NotFoundError"
    assert "rank 1 has no version 'main/rank-1'" in second[1]


def through_torch(rank: int, place: Place) -> list[Any]:
    """Save by one face and load by the other: the names are the same."""
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


def test_what_makes_no_sense_for_a_rank_alone_is_refused(place: Place) -> None:
    with place.open() as repo:
        with pytest.raises(InvalidInputError, match="metrics_from='rank0'"):
            dcpstore.save({}, repo, metrics_from="rank0", use_collectives=False)
        dcpstore.save({"x": 1}, repo, tags=["a"], use_collectives=False)
        with pytest.raises(AlreadyExistsError, match="'a/rank-0' is taken"):
            dcpstore.save({"x": 1}, repo, tags=["a"], use_collectives=False)
        assert len(repo.log()) == 1


def test_a_branch_that_hides_what_is_saved_is_named(
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
