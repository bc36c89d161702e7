"""Versions copied from one repository to another, on every pair of databases that there is."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import dcpstore
from dcpstore import (
    AlreadyExistsError,
    ConflictError,
    CorruptionError,
    InvalidInputError,
    NotFoundError,
    Repository,
)
from dcpstore.catalog.write.saves import advance_branch
from dcpstore.formats.manifest import decode_manifest, manifest_key
from dcpstore.maintenance import copy as copying
from dcpstore.maintenance.rebuild import rebuild
from dcpstore.repository import open as open_repository
from tests.maintenance.conftest import Save, packs_of, saver, views
from tests.soundness import Place, assert_sound

pytestmark = pytest.mark.slow_on_postgres


def contents(repo: Repository) -> dict[str, dict[str, str]]:
    """Return each version by uid, with its values and digests by FQN."""
    return {
        version.uid: {
            entry.fqn: entry.tensor.digest if entry.tensor else str(entry.value)
            for entry in repo.entries(version.number)
        }
        for version in repo.log()
    }


def test_everything_is_copied_once(repo: Repository, other: Repository, save: Save) -> None:
    for i in range(3):
        save(step=i, tags=[f"t{i}"], metrics={"loss": float(i)}, labels={"a": "b"}, message="m")
    save(branch="side", parent=2)
    report = repo.copy_to(other)
    assert report.copied == ((1, 1), (2, 2), (3, 3), (4, 4))
    assert report.refs == ("main", "side", "t0", "t1", "t2")
    assert (report.present, report.refused, report.left) == ((), (), ())
    assert contents(other) == contents(repo)
    assert repr([*map(vars, other.log())]) == repr([*map(vars, repo.log())])
    assert (other.tags(), other.branches()) == (repo.tags(), repo.branches())
    assert report.nbytes_written == sum(v.nbytes_written for v in repo.log())
    before = views(other)
    again = repo.copy_to(other)
    assert (again.copied, again.refs, again.nbytes_written) == ((), (), 0)
    assert again.present == report.copied
    assert views(other) == before
    save()
    assert repo.copy_to(other).copied == ((5, 5),)
    assert other.show("main").number == 5
    for version in repo.log():
        assert decode_manifest(other.storage.get(manifest_key(version.uid))).draft.branch == (
            version.branch
        )
    assert_sound(other)


def test_some_versions_get_new_numbers_and_the_nearest_parent(
    repo: Repository, other: Repository, save: Save
) -> None:
    for _ in range(4):
        save()
    repo.tag("best", 3)
    assert repo.copy_to(other, ["v1", "best"]).copied == ((1, 1), (3, 2))
    assert [(v.number, v.parent) for v in other.log()] == [(2, 1), (1, None)]
    assert [(t.name, t.version) for t in other.tags()] == [("best", 2)]
    assert other.branches() == []
    assert repo.copy_to(other, ["main"]).copied == ((4, 3),)
    assert other.show("main").parent == 2
    assert_sound(other)


def test_chunks_that_the_target_holds_are_not_written(repo: Repository, other: Repository) -> None:
    big, small = torch.randn(1000), torch.randn(10)
    dcpstore.save({"big": big}, other)
    dcpstore.save({"big": big, "small": small, "lr": 0.1}, repo)
    report = repo.copy_to(other)
    assert report.nbytes_written == small.nbytes
    assert report.left == ("main",)  # both have one, and neither is ahead of the other
    copied = other.read(2)
    assert torch.equal(copied["big"], big)
    assert copied["lr"] == 0.1
    assert_sound(other)


def test_it_goes_both_ways(repo: Repository, other: Repository, save: Save) -> None:
    save()
    repo.copy_to(other)
    there = saver(other)
    there()
    assert other.copy_to(repo).copied == ((2, 2),)
    assert repo.show("main").number == 2
    assert contents(repo) == contents(other)


def test_a_version_that_the_target_expired_stays_away(
    repo: Repository, other: Repository, save: Save
) -> None:
    save()
    save()
    repo.copy_to(other)
    other.expire(keep_last=1)
    report = repo.copy_to(other)
    assert (report.refused, report.copied) == ((1,), ())
    assert [v.number for v in other.log()] == [2]


def test_a_tag_that_means_something_else_there_stays(
    repo: Repository, other: Repository, save: Save
) -> None:
    save(tags=["best"])
    saver(other)(tags=["best"])
    report = repo.copy_to(other)
    assert report.left == ("best", "main")
    assert other.show("best").number == 1


def test_a_tag_that_is_called_as_a_branch_of_the_source_stops_no_copy(
    repo: Repository, other: Repository, save: Save, tmp_path: Path
) -> None:
    save(branch="exp")
    save(branch="exp")
    there = saver(other)
    there(tags=["exp"])
    report = repo.copy_to(other)
    assert (report.copied, report.refs, report.left) == (((1, 2), (2, 3)), (), ("exp",))
    assert other.show("exp").number == 1  # the tag is what it was
    assert [version.branch for version in other.log()] == ["exp", "exp", "main"]
    with pytest.raises(AlreadyExistsError, match="'exp' is taken: it is a tag of v1"):
        there(branch="exp")
    repo.delete_branch("exp")
    repo.tag("exp", 2)  # where it was saved, it is a tag by now
    assert repo.copy_to(other, ["exp"]).left == ("exp",)
    assert_sound(other)
    rebuild(str(tmp_path / "other"), into=str(tmp_path / "again"))
    with open_repository(tmp_path / "again") as again:
        assert again.log() == other.log()


def test_a_branch_that_went_or_is_a_tag_by_now_is_not_moved(repo: Repository, save: Save) -> None:
    save(tags=["a"])
    save()
    assert not advance_branch(repo.catalog, "gone", 2, author="ada")
    assert not advance_branch(repo.catalog, "a", 2, author="ada")
    assert repo.show("a").number == 1


def test_damage_is_not_copied(place: Place, repo: Repository, other: Repository) -> None:
    version = dcpstore.save({"w": torch.randn(100)}, repo)
    path = Path(place.data) / "packs" / version.uid / "0-0.pack"
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(CorruptionError, match="offset 0"):
        repo.copy_to(other)
    assert other.log() == []
    assert packs_of(other) == set()
    path.write_bytes(whole)
    assert repo.copy_to(other).copied == ((1, 1),)
    assert_sound(other)


def test_a_copy_that_was_killed_is_done_by_the_next(
    repo: Repository, other: Repository, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    save()

    def killed(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(copying, "commit_copy", killed)
        with pytest.raises(KeyboardInterrupt):
            repo.copy_to(other)
    assert other.log() == []
    assert repo.copy_to(other).copied == ((1, 1),)
    other.gc(grace="0s", lease="0s")
    assert contents(other) == contents(repo)
    assert_sound(other)


def test_two_copies_of_one_version_at_once(
    repo: Repository, other: Repository, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    save()
    commit = copying.commit_copy

    def commit_second(*args: object, **options: object) -> object:
        monkeypatch.setattr(copying, "commit_copy", commit)
        with ThreadPoolExecutor(1) as pool:  # a thread that copies may not do so inside itself
            pool.submit(repo.copy_to, other).result()
        return commit(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(copying, "commit_copy", commit_second)
    with pytest.raises(ConflictError, match="meanwhile"):
        repo.copy_to(other)
    other.gc(grace="0s", lease="0s")
    assert contents(other) == contents(repo)
    assert_sound(other)


def test_what_cannot_be_meant(repo: Repository, other: Repository, save: Save) -> None:
    save()
    with pytest.raises(NotFoundError):
        repo.copy_to(other, ["v1", "v9"])
    with pytest.raises(InvalidInputError, match="list"):
        repo.copy_to(other, "main")
    with pytest.raises(InvalidInputError, match="same repository"):
        repo.copy_to(repo)
    assert other.log() == []
