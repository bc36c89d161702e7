"""A version read without a template: nested as it was saved, by glob or by subtree."""

from __future__ import annotations

import sqlite3
from collections import OrderedDict
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner as TorchPlanner

import dcpstore
from dcpstore import CorruptionError, NotFoundError, Repository
from dcpstore.maintenance.rebuild import rebuild
from tests.convert.states import equal
from tests.ranks import RankPool
from tests.soundness import Place


def tricky() -> dict[str, Any]:
    return {
        "dict": {1: torch.ones(2), "x": {}, 10: [], None: 3, (1, "a"): 4, False: 5, 2.5: {}},
        "ordered": OrderedDict([("z", 1), ("a", OrderedDict()), ("m", OrderedDict([(3, 4)]))]),
        "tuple": (torch.zeros(1), {"k": (1, 2)}, [[torch.ones(1)]]),
        "list": [{}, [], {"a": 1}, [{}]],
        "empty": {},
        "flat": [[1, 2], (3,)],
        "dots": {"a.b": 1, "a": {"c": torch.ones(())}},
    }


def exact(found: Any, saved: Any) -> None:
    """Check that two states are equal, with the types of keys and the order of OrderedDicts."""
    assert equal(found, saved)
    assert type(found) is type(saved)
    if isinstance(saved, dict):
        assert [*map(type, found)] == [*map(type, saved)]
        assert list(found) == list(saved)
        for key, inner in saved.items():
            exact(found[key], inner)
    elif isinstance(saved, list | tuple):
        for one, other in zip(found, saved, strict=True):
            exact(one, other)


def test_a_nested_state_is_restored_as_it_was(repo: Repository) -> None:
    saved = tricky()
    dcpstore.save(saved, repo)
    dcpstore.save(saved, repo)  # which finds its plan in memory
    for ref in (1, 2):
        exact(repo.read(ref, nested=True), {key: saved[key] for key in sorted(saved)})
    dcpstore.save({}, repo)
    assert repo.read(nested=True) == {}


def test_copies_and_rebuilt_catalogs_keep_the_nested_state(
    repo: Repository, tmp_path: Path
) -> None:
    saved = tricky()
    dcpstore.save(saved, repo)
    with dcpstore.open(tmp_path / "copy") as other:
        repo.copy_to(other)
    rebuild(repo.storage.url, tmp_path / "rebuilt")
    for folder in ("copy", "rebuilt"):
        with dcpstore.open(tmp_path / folder) as other:
            exact(other.read(nested=True), {key: saved[key] for key in sorted(saved)})


def trained() -> dict[str, Any]:
    """Return a model, an optimizer that has taken steps, and its scheduler."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 12), torch.nn.BatchNorm1d(12))
    parameters = [*model.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": parameters[:3], "lr": 0.5}, {"params": parameters[3:]}], betas=(0.8, 0.9)
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
    return {"model": model, "optim": optimizer, "scheduler": scheduler}


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_a_nested_read_fits_load_state_dict(
    make: Callable[..., torch.optim.Optimizer], tmp_path: Path
) -> None:
    state = trained()
    model = state["model"]
    many = [torch.nn.Parameter(torch.ones(2)) for _ in range(12)]  # numbers of two digits
    state["other"] = make(many, lr=0.1)
    model(torch.ones(4, 3)).sum().backward()
    sum(p.sum() for p in many).backward()  # type: ignore[union-attr]
    for name in ("optim", "other", "scheduler"):
        state[name].step()
    saved = {name: state[name].state_dict() for name in sorted(state)}
    dcpstore.save(state, tmp_path)
    with dcpstore.open(tmp_path) as repo:
        found = repo.read(nested=True)
    assert equal(found, saved)
    assert type(found["model"]) is OrderedDict
    assert list(found["model"]) == list(saved["model"])
    assert list(found["other"]["state"]) == list(saved["other"]["state"])
    for name, one in {**trained(), "other": make([*map(torch.zeros_like, many)], lr=0.3)}.items():
        one.load_state_dict(found[name])
        assert equal(one.state_dict(), saved[name])


def test_a_text_is_a_name_a_subtree_or_a_glob(repo: Repository) -> None:
    state = {
        "model": {"a": {"weight": torch.ones(1), "bias": torch.zeros(1)}, "ab": 1, "b[0]": 2},
        "models": 5,
        "step": 3,
    }
    dcpstore.save(state, repo)
    below = ["model.a.bias", "model.a.weight", "model.ab", "model.b[0]"]
    assert list(repo.read(None, "model")) == list(repo.read(None, "model.*")) == below
    assert list(repo.read(None, "model.a")) == below[:2]
    assert list(repo.read(None, "*.bias")) == ["model.a.bias"]
    assert list(repo.read(None, "model.a?")) == ["model.ab"]
    assert list(repo.read(None, "model.b[0]")) == ["model.b[0]"]
    assert repo.read(None, "step") == {"step": 3}
    assert repo.read(None, "*", nested=True).keys() == state.keys()
    nested = repo.read(None, "model.a", nested=True)
    assert equal(nested, {"model": {"a": state["model"]["a"]}})  # type: ignore[index]
    assert repo.read(None, ["models", "step"], nested=True) == {"models": 5, "step": 3}
    assert list(repo.read(None, ["*.weight", "step"])) == ["model.a.weight", "step"]
    assert list(repo.read(None, ["model.a?", "model.ab", "model.b[0]"])) == below[2:]
    with pytest.raises(NotFoundError, match="matches 'nothing'"):
        repo.read(None, ["*.weight", "nothing"])
    sliced = repo.read(None, {"model.a.weight": 0}, nested=True)
    assert equal(sliced, {"model": {"a": {"weight": torch.tensor(1.0)}}})
    for pattern in ("mode", "model.c*", "Model.*", "model.", ""):
        with pytest.raises(
            NotFoundError, match=f"matches '{pattern}'".replace("*", r"\*")
        ) as caught:
            repo.read(None, pattern)
        assert not pattern or "'model" in str(caught.value)


def test_a_missing_item_of_a_list_is_none(repo: Repository) -> None:
    dcpstore.save({"l": [{"a": 1}, {"b": 2}, {"c": 3}]}, repo)
    assert repo.read(None, "l.1", nested=True) == {"l": [None, {"b": 2}]}


def test_per_rank_values_are_dicts_by_rank(
    repo: Repository, two_ranks: RankPool, place: Place
) -> None:
    two_ranks.run(save_own, place)
    assert repo.read(None, "rng", nested=True) == {"rng": {"rank-0": [0], "rank-1": [1]}}
    assert repo.read(nested=True)["each"] == {
        "empty": {"by": {1: "b"}},
        "list": [{"a": 0}, {}],
        "number": {0: 0, 1: 1, "x": 5},
    }


def save_own(rank: int, place: Place) -> None:
    number = {rank: rank, "x": 5} if rank else {rank: rank}
    each = {
        "empty": {"by": {1: "b"}} if rank else {},
        "list": [{"a": 0}, {}],
        "number": number,
    }
    with place.open() as repo:
        dcpstore.save({"rng": dcpstore.PerRank([rank]), "each": each}, repo)


def test_composed_tensors_are_put_together_in_their_places(repo: Repository) -> None:
    sparse = torch.tensor([0.0, 1.0, 2.0]).to_sparse()
    dcpstore.save({"a": {1: [sparse, {"b": (sparse, 5)}]}}, repo)
    found = repo.read(nested=True)
    assert torch.equal(found["a"][1][0].to_dense(), sparse.to_dense())
    first, second = found["a"][1][1]["b"]
    assert (torch.equal(first.to_dense(), sparse.to_dense()), second) == (True, 5)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_versions_saved_by_torch_are_read_too(tmp_path: Path) -> None:
    state = {"o": {"param_groups": [{"params": [0]}], "state": {0: {"m": torch.ones(1)}}}}
    with dcpstore.open(tmp_path) as repo:
        for planner in (TorchPlanner(), dcpstore.DefaultSavePlanner()):
            writer = dcpstore.RepositoryWriter(repo)
            dcp.save(dict(state), storage_writer=writer, planner=planner, no_dist=True)
            assert equal(repo.read(nested=True), state)
        dcp.save(
            {"a": (torch.ones(1), {}), "b": {1: {}}},
            storage_writer=dcpstore.RepositoryWriter(repo),
            planner=dcpstore.DefaultSavePlanner(),
            no_dist=True,
        )
        assert equal(repo.read(nested=True), {"a": (torch.ones(1), {}), "b": {1: {}}})


def test_hostile_paths_are_corruption(tmp_path: Path) -> None:
    paths = ['["x",1000000000000]', '[["x"],"vv"]', '[["x"],5]', "[[1.5]]", '[["x"],"v"]']
    dcpstore.save({"x": torch.ones(2), "z": 1}, tmp_path)
    for path in paths:
        with closing(sqlite3.connect(tmp_path / "catalog.db")) as catalog, catalog:
            catalog.execute("UPDATE fqn SET path = ? WHERE name = 'x'", (path,))
        with dcpstore.open(tmp_path) as repo, pytest.raises(CorruptionError):
            repo.read(nested=True)
