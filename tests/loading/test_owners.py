"""What is handed back to whoever owns a state: modules, `Stateful` objects, containers."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

import dcpstore
from dcpstore import PerRank, RankFailure
from tests.ranks import RankPool


class Holder:
    """Gives a state, and keeps what it gets."""

    def __init__(self, state: dict[str, Any], *, refuses: bool = False) -> None:
        self.state = state
        self._refuses = refuses

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._refuses:
            raise KeyError("mine")
        self.state = state_dict


def load_where_one_refuses(rank: int, folder: Path) -> str:
    try:
        dcpstore.load({"a": Holder({"n": 0}, refuses=rank == 1)}, folder)
    except RankFailure as error:
        return str(error)
    return "loaded"


def test_a_rank_that_refuses_its_state_fails_all(tmp_path: Path, two_ranks: RankPool) -> None:
    dcpstore.save({"a": Holder({"n": 1})}, tmp_path)
    first, second = two_ranks.run(load_where_one_refuses, tmp_path)
    assert first == second
    assert "load_state_dict failed on 1 of the ranks" in first
    assert "rank 1: KeyError: 'mine'" in first


class Tied(torch.nn.Module):
    """Two layers with one weight, and a norm, whose state has a version."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(3, 3, bias=False)
        self.b = torch.nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
        self.norm = torch.nn.BatchNorm1d(3)


def test_tied_weights_on_the_meta_device_stay_tied(tmp_path: Path) -> None:
    model = Tied()
    dcpstore.save({"model": model}, tmp_path)
    state = model.state_dict()
    dcpstore.save({"model": {k: state[k] for k in state if k != "a.weight"}}, tmp_path)
    for ref, options in ((1, {}), (2, {"strict": False})):
        with torch.device("meta"):
            empty = Tied()
        empty.a.weight.requires_grad_(False)
        dcpstore.load({"model": empty}, tmp_path, ref, **options)  # type: ignore[call-overload]
        assert empty.a.weight is empty.b.weight
        assert torch.equal(empty.a.weight, model.a.weight)
        assert not empty.a.weight.requires_grad
        assert int(empty.norm.num_batches_tracked or 0) == 0


def own_in_a_holder(rank: int, folder: Path) -> Any:
    holder = Holder({"rng": PerRank(torch.full((2,), rank)), "n": 1})
    if rank == 0:
        dcpstore.save({"h": holder}, folder / "one", no_dist=True)
    dcpstore.save({"h": holder}, folder / "two")
    found = []
    for name in ("two", "one"):
        other = Holder({"rng": PerRank(torch.full((2,), -1)), "n": 0})
        report = dcpstore.load({"h": other}, folder / name)
        assert isinstance(other.state["rng"], PerRank)
        found.append((other.state["rng"].value.tolist(), other.state["n"], report.missing))
    return found


def test_per_rank_values_of_a_stateful_come_back_as_they_were_given(
    tmp_path: Path, two_ranks: RankPool
) -> None:
    first, second = two_ranks.run(own_in_a_holder, tmp_path)
    missing = ("h.rng.rank-1",)
    assert first == [([0, 0], 1, ()), ([0, 0], 1, missing)]
    assert second == [([1, 1], 1, ()), ([-1, -1], 1, missing)]


def test_containers_beside_a_per_rank_value_are_the_callers_own(tmp_path: Path) -> None:
    def fill(rng: int, epoch: int) -> dict[str, Any]:
        inner = OrderedDict(rng=PerRank(rng), epoch=epoch, more=[{"own": PerRank(rng)}, epoch])
        return {"t": inner}

    dcpstore.save(fill(1, 3), tmp_path)
    state = fill(0, 0)
    inner = state["t"]
    own, more = inner["rng"], inner["more"]
    dcpstore.load(state, tmp_path)
    assert state["t"] is inner
    assert inner["rng"] is own
    assert inner["more"] is more
    assert (own.value, inner["epoch"], more[0]["own"].value, more[1]) == (1, 3, 1, 3)
