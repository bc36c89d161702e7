"""A `Version` as a ref: every call takes it, and none takes that of another repository."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import dcpstore
from dcpstore import NotFoundError, Repository, RepositoryReader, Version
from dcpstore.convert import export_dcp, export_safetensors, export_torch, export_zarr
from tests.ranks import RankPool
from tests.soundness import Place

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")  # of no process group


def state(number: float) -> dict[str, Any]:
    return {"w": torch.full((4,), number)}


def saved(repo: Repository, count: int) -> list[Version]:
    return [dcpstore.save(state(i), repo, metrics={"loss": i}) for i in range(1, count + 1)]


def read_by_torch(repo: Repository, ref: Version) -> float:
    reader = RepositoryReader(repo, ref)
    reader.read_metadata()  # raises its own error, while dcp.load only quotes it
    target = state(0)
    dcp.load(target, storage_reader=reader, no_dist=True)
    return float(target["w"][0])


def loaded(repo: Repository, ref: Version) -> float:
    target = state(0)
    dcpstore.load(target, repo, ref)
    return float(target["w"][0])


def calls(repo: Repository, folder: Path) -> dict[str, tuple[Callable[[Version], Any], Any]]:
    """Return every call that takes a ref, by name, and what it returns for the first version."""
    return {
        "load": (lambda v: loaded(repo, v), 1.0),
        "a dry run": (lambda v: dcpstore.load(state(0), repo, v, dry_run=True).version.number, 1),
        "RepositoryReader": (lambda v: read_by_torch(repo, v), 1.0),
        "export_safetensors": (
            lambda v: export_safetensors(repo, v, folder / "s.safetensors").version.number,
            1,
        ),
        "export_torch": (lambda v: export_torch(repo, v, folder / "t.pt").version.number, 1),
        "export_dcp": (lambda v: export_dcp(repo, v, folder / "d").version.number, 1),
        "export_zarr": (lambda v: export_zarr(repo, v, folder / "z").version.number, 1),
        "parent": (lambda v: dcpstore.save(state(7), repo, branch="side", parent=v).parent, 1),
        "expect_tip": (
            lambda v: dcpstore.save(state(8), repo, branch="old", expect_tip=v).parent,
            1,
        ),
        "show": (lambda v: repo.show(v).number, 1),
        "log": (lambda v: [one.number for one in repo.log(v)], [1]),
        "entries": (lambda v: [one.fqn for one in repo.entries(v)], ["w"]),
        "read": (lambda v: float(repo.read(v)["w"][0]), 1.0),
        "zarr": (lambda v: type(repo.zarr(v)).__name__, "VersionStore"),
        "diff": (lambda v: len(repo.diff(v, "v2").changed), 1),
        "tag": (lambda v: repo.tag("first", v).version, 1),
        "branch": (lambda v: repo.branch("more", at=v).version, 1),
        "add_metrics": (lambda v: repo.add_metrics(v, {"new": 1}).number, 1),
        "add_labels": (lambda v: repo.add_labels(v, {"new": "x"}).number, 1),
        "delete_tag": (lambda v: repo.delete_tag("first", expect=v).version, 1),
        "forget": (lambda v: [one.number for one in repo.forget([v], dry_run=True).versions], [1]),
        "rollback": (lambda v: repo.rollback(v).version, 1),
    }


def test_every_call_takes_a_version(tmp_path: Path, subtests: pytest.Subtests) -> None:
    with dcpstore.open(tmp_path / "r") as repo:
        first, _ = saved(repo, 2)
        repo.branch("old", at=first)
        for name, (call, expected) in calls(repo, tmp_path).items():
            with subtests.test(name):
                assert call(first) == expected


def test_a_version_of_another_repository_is_refused(
    tmp_path: Path, subtests: pytest.Subtests
) -> None:
    with dcpstore.open(tmp_path / "r") as repo, dcpstore.open(tmp_path / "s") as other:
        first, *_ = saved(repo, 2)
        repo.branch("old", at=first)
        repo.tag("first", first)
        foreign = saved(other, 1)[0]
        known = len(repo.log()), len(repo.operations())
        for name, (call, _) in calls(repo, tmp_path).items():
            with (
                subtests.test(name),
                pytest.raises(NotFoundError, match=rf"v1 .*{foreign.uid} .*another repository"),
            ):
                call(foreign)
        assert (len(repo.log()), len(repo.operations())) == known


def test_a_copied_version_is_found_under_its_new_number(tmp_path: Path) -> None:
    with dcpstore.open(tmp_path / "r") as repo, dcpstore.open(tmp_path / "s") as other:
        saved(repo, 2)
        third = [*saved(other, 2), dcpstore.save(state(5), other)][2]
        assert other.copy_to(repo, [third]).copied == ((3, 3),)
        fourth = dcpstore.save(state(6), other)
        dcpstore.save(state(9), repo)
        assert other.copy_to(repo, [fourth]).copied == ((4, 5),)
        assert loaded(repo, fourth) == 6.0
        assert repo.show(fourth).number == 5
        assert [one.number for one in repo.forget([fourth, 1], dry_run=True).versions] == [1, 5]


def use_best(rank: int, place: Place, is_same: bool) -> tuple[str, float, int | None]:
    with place.open() as repo:
        best = repo.best("loss") if is_same or rank == 0 else repo.show("main")
        if rank == 1:  # which read it after another process had added a metric
            best = replace(best, metrics={**best.metrics, "later": 1.0})
        target = state(0)
        try:
            dcpstore.load(target, repo, best)
            kept = dcpstore.save(state(3), repo, branch="side", parent=best)
        except dcpstore.DcpstoreError as error:
            return f"{type(error).__name__}: {error}", 0.0, None
        return "", float(target["w"][0]), kept.parent


def test_ranks_agree_on_a_version_whatever_was_added_to_it(
    place: Place, two_ranks: RankPool
) -> None:
    with place.open() as repo:
        first, second = saved(repo, 2)
    assert two_ranks.run(use_best, place, True) == [("", 1.0, 1)] * 2
    one, two = two_ranks.run(use_best, place, False)
    assert one == two
    assert f"v1 (uid {first.uid})" in one[0]
    assert f"v2 (uid {second.uid})" in one[0]
    assert "pass the same ref" in one[0]
