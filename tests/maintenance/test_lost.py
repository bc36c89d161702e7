"""What a rebuild makes of a folder that lost some of its operations, manifests or packs too."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import dcpstore
from dcpstore import InvalidInputError, Repository
from dcpstore.cli.app import commands
from dcpstore.formats.journal_entry import operation_key
from dcpstore.formats.manifest import manifest_key
from dcpstore.maintenance import gc
from dcpstore.maintenance.rebuild import RebuildReport, rebuild
from dcpstore.repository import open as open_repository
from dcpstore.zarr.stored_references import reference_key
from tests.maintenance.conftest import no_room_for_operations
from tests.soundness import assert_sound

pytestmark = pytest.mark.slow_on_postgres

NOW = "0s"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a repository is whose catalog is lost."""
    return tmp_path / "ckpts"


@contextmanager
def rebuilt(folder: Path, url: str) -> Iterator[tuple[RebuildReport, Repository]]:
    """Rebuild the catalog into a new database, and use it; it must be sound before and after."""
    report = rebuild(folder, url)
    with open_repository(url, create=False) as repo:
        assert_sound(repo)
        assert repo.verify(deep=True).damaged == ()
        yield report, repo
        assert_sound(repo)


def save(repo: Repository, count: int, **options: Any) -> None:
    """Save versions that share a tensor; `w` is what number of them it is."""
    for i in range(1, count + 1):
        dcpstore.save({"w": torch.full((4,), float(i)), "kept": torch.arange(100)}, repo, **options)


def repacked(folder: Path, collect: Callable[[Repository], object]) -> None:
    """Make two versions whose common tensor is in a pack that is mostly garbage; collect it."""
    with open_repository(folder) as repo:
        dcpstore.save({"kept": torch.arange(100), "big": torch.randn(10_000)}, repo)
        save(repo, 2)
        repo.expire(keep_last=2)
        collect(repo)


def test_a_gc_that_is_killed_before_its_journal_loses_no_version(
    folder: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = gc.write_journal, []

    def die(*place: Any) -> bool:
        calls.append(place)
        if len(calls) == 2:  # the first writes what is left of before
            raise KeyboardInterrupt
        return write(*place)

    def collect(repo: Repository) -> None:
        with monkeypatch.context() as killed:
            killed.setattr(gc, "write_journal", die)
            with pytest.raises(KeyboardInterrupt):
                repo.gc()

    repacked(folder, collect)
    with rebuilt(folder, database_url) as (report, repo):
        assert (report.versions, report.lost, report.problems) == ((2, 3), (), ())
        repo.gc(grace=NOW, lease=NOW)
        repo.gc(grace=NOW, lease=NOW)
        assert torch.equal(repo.read(2)["kept"], torch.arange(100))


def test_no_manifest_names_a_pack_of_which_the_journal_has_not_heard(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collect(repo: Repository) -> None:
        manifests = {key: repo.storage.get(key) for key in repo.storage.list("manifests")}
        with no_room_for_operations(repo, monkeypatch):
            assert repo.gc(grace=NOW).repacked
            left = {manifest_key(v.uid) for v in repo.log()}
            assert {key: repo.storage.get(key) for key in left} == {
                key: manifests[key] for key in left
            }
        assert repo.gc(grace=NOW).deleted  # after the manifests are written again
        assert_sound(repo)

    repacked(folder, collect)


def test_a_pack_that_only_a_manifest_names_is_taken(folder: Path, database_url: str) -> None:
    repacked(folder, lambda repo: repo.gc(grace=NOW))
    number, _, _ = forget_repacking(folder)
    with rebuilt(folder, database_url) as (report, repo):
        assert (report.versions, report.lost) == ((2, 3), ())
        assert report.problems == (f"{operation_key(number)}: it is missing",)
        repo.gc(grace=NOW, lease=NOW)
        assert torch.equal(repo.read(2)["kept"], torch.arange(100))


def forget_repacking(folder: Path) -> tuple[int, str, int]:
    """Remove the operation that a repacking was; return its number, the new pack and its size."""
    for path in folder.glob("operations/*.json"):
        operation = json.loads(path.read_bytes())
        if added := (operation["detail"] or {}).get("added"):
            path.unlink()
            return operation["operation"], added[0][0], added[0][1]
    raise AssertionError("nothing was repacked")


@pytest.mark.parametrize("how", ["gone", "short"])
def test_a_version_whose_pack_nobody_has_is_lost_and_said_why(
    folder: Path, database_url: str, how: str
) -> None:
    repacked(folder, lambda repo: repo.gc(grace=NOW))
    _, key, nbytes = forget_repacking(folder)
    if how == "gone":
        (folder / key).unlink()
    else:
        (folder / key).write_bytes(b"x" * (nbytes - 1))
    result = CliRunner().invoke(commands, ["rebuild", str(folder), "--into", database_url])
    assert result.exit_code == 3
    assert f"needs {nbytes} bytes of {key}" in result.output
    assert f"{nbytes - 1} bytes of it" in result.output or how == "gone"
    assert "lost versions: v2, v3" in result.output


@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_every_version_comes_back_though_the_operation_of_one_is_lost(
    folder: Path, database_url: str, how: str
) -> None:
    with open_repository(folder) as repo:
        save(repo, 2)
        save(repo, 1, branch="side")
        repo.tag("best", 1)
        save(repo, 1)
        before = known(repo)
    for number in (2, 3):  # the saves of v1, whose pack holds what they share, and of v2
        path = folder / operation_key(number)
        path.unlink() if how == "missing" else path.write_bytes(path.read_bytes()[:-1])
    with rebuilt(folder, database_url) as (report, repo):
        assert (report.versions, report.lost) == ((1, 2, 3, 4), ())
        assert len(report.problems) == (1 if how == "missing" else 2)
        assert known(repo) == before
        assert {tag.name: tag.version for tag in repo.tags()} == {"best": 1}
        assert repo.show("main~1").number == 2
        assert [o.kind for o in repo.operations()][-3:] == ["lost", "lost", "init"]
        for version in before:
            assert torch.equal(repo.read(version.number)["kept"], torch.arange(100))
        repo.gc(grace=NOW, lease=NOW)
    with rebuilt(folder, f"sqlite:///{folder}-again.db") as (report, repo):
        assert (report.problems, known(repo)) == ((), before)


def known(repo: Repository) -> list[dcpstore.Version]:
    """Return the versions, but for what no manifest can say: how long it took to write it."""
    return [replace(version, seconds={}) for version in repo.log()]


def test_a_version_that_no_operation_names_keeps_its_number_and_bytes(
    folder: Path, database_url: str, other: Repository
) -> None:
    save(other, 2)
    with open_repository(folder) as repo:
        dcpstore.save({"x": torch.ones(3)}, repo)
        other.copy_to(repo, ["v1"])
        save(repo, 1)
        copy = repo.show(2)
        ours = repo.show(3)
    (folder / operation_key(3)).unlink()
    with rebuilt(folder, database_url) as (report, repo):
        assert (report.versions, report.lost, report.unfinished) == ((1, 3), (2,), (copy.uid,))
        assert "v2: no remaining operation names it" in report.problems
        assert repo.log()[0] == ours
        stored = set(repo.storage.list("packs"))
        cleared = repo.gc(grace=NOW, lease=NOW)
        assert (cleared.cleared, set(repo.storage.list("packs"))) == ((), stored)
    with rebuilt(folder, f"sqlite:///{folder}-again.db") as (report, repo):
        assert (report.versions, report.lost, report.problems) == ((1, 3), (), ())


def test_what_an_unknown_copy_needs_outlives_a_collection(
    folder: Path, database_url: str, other: Repository
) -> None:
    save(other, 2)
    with open_repository(folder) as repo:
        dcpstore.save({"x": torch.ones(3)}, repo)
        other.copy_to(repo, ["v1"])
    last = folder / operation_key(3)
    data = last.read_bytes()
    last.unlink()  # as if the crash came between the commit and its journal
    with rebuilt(folder, database_url) as (report, repo):
        assert (report.versions, len(report.unfinished)) == ((1,), 1)
        stored = set(repo.storage.list())
        cleared = repo.gc(grace=NOW, lease=NOW)
        assert (cleared.cleared, len(cleared.unknown)) == ((), 4)  # pack, page, plan, manifest
        assert set(repo.storage.list()) == stored
        damage(folder / manifest_key(report.unfinished[0]))  # then anything may be its own
        assert len(repo.gc(grace=NOW, lease=NOW).unknown) == 4
        damage(folder / manifest_key(report.unfinished[0]))
    last.write_bytes(data)  # it was found again
    with rebuilt(folder, f"sqlite:///{folder}-again.db") as (report, repo):
        assert report.versions == (1, 2)
        assert torch.equal(repo.read(2)["kept"], torch.arange(100))


def damage(path: Path) -> None:
    """Change one byte of a file, or change it back."""
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("number", [1, 3, 7], ids=["first", "amid", "last"])
@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_a_gap_in_the_journal_is_closed(
    folder: Path, database_url: str, how: str, number: int
) -> None:
    with open_repository(folder) as repo:
        for i in range(3):
            save(repo, 1, tags=[f"t{i}"])
    path = folder / operation_key(number)
    path.unlink() if how == "missing" else damage(path)
    with rebuilt(folder, database_url) as (report, repo):
        assert report.versions == (1, 2, 3)
        assert len(report.problems) == (0 if (how, number) == ("missing", 7) else 1)
        repo.tag("next", 1)
        cleared = repo.gc(grace=NOW).cleared
        assert cleared in ((), (reference_key(repo.show().uid),))  # whose tag may be lost


def test_a_name_that_claims_too_many_lost_operations_is_not_believed(
    folder: Path, database_url: str
) -> None:
    with open_repository(folder) as repo:
        save(repo, 2)
    (folder / operation_key(2)).unlink()
    (folder / operation_key(10**15)).write_bytes(b"{}")
    report = rebuild(folder, database_url)
    assert report.versions == (1, 2)
    with open_repository(database_url, create=False) as repo:
        assert [o.number for o in repo.operations()] == [3, 2, 1]
    (folder / operation_key(10**15)).unlink()


@pytest.mark.parametrize("tagged", [False, True])
def test_an_undo_goes_on_from_where_a_rebuild_moved_a_branch(
    folder: Path, database_url: str, tagged: bool
) -> None:
    with open_repository(folder) as repo:
        save(repo, 2)
        repo.branch("side", at=2)
        save(repo, 1, tags=["t"] if tagged else [])
        repo.tag("first", 1)
        lost = repo.show().uid
    (folder / manifest_key(lost)).unlink()
    with rebuilt(folder, database_url) as (report, repo):
        assert set(report.moved_refs) == ({"main", "t"} if tagged else {"main"})
        assert repo.show().number == 2
        repo.undo()  # of the tag
        repo.undo()  # of the branch: the save that is lost is undone already
        assert (repo.tags(), [b.name for b in repo.branches()]) == ([], ["main"])
        repo.undo()
        assert repo.show().number == 1
        repo.undo()
        with pytest.raises(InvalidInputError, match="nothing is left"):
            repo.undo()
    with rebuilt(folder, f"sqlite:///{folder}-again.db") as (report, repo):
        assert (report.problems, repo.branches()) == ((), [])


def test_an_undo_passes_over_what_is_lost(folder: Path, database_url: str) -> None:
    with open_repository(folder) as repo:
        save(repo, 2)
        repo.rollback("v1")
        save(repo, 1)
    (folder / operation_key(4)).unlink()  # the rollback
    with rebuilt(folder, database_url) as (_, repo):
        assert (repo.show().number, repo.show().parent) == (3, 1)
        repo.undo()
        assert repo.show().number == 1
        repo.undo()  # the save of v2 is: v1 came after it
        with pytest.raises(InvalidInputError, match="nothing is left"):
            repo.undo()
