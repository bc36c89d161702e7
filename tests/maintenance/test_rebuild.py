"""A lost catalog is rebuilt from the data folder alone, and answers like the old one."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dcpstore
from dcpstore import AlreadyExistsError, NotFoundError, Repository
from dcpstore.catalog.db.url import sqlite_url
from dcpstore.catalog.maintenance import journal
from dcpstore.catalog.maintenance import restore as restoring
from dcpstore.formats.journal_entry import operation_key
from dcpstore.formats.manifest import manifest_key
from dcpstore.maintenance import gc as collecting
from dcpstore.maintenance.rebuild import rebuild
from dcpstore.repository import open as open_repository
from tests.maintenance.conftest import Save, no_room_for_operations, views
from tests.soundness import Place, assert_sound

pytestmark = pytest.mark.slow_on_postgres


@pytest.fixture
def repo(place: Place) -> Iterator[Repository]:
    """A repository whose data folder gets a second catalog."""
    with place.open() as opened:
        yield opened


def live(repo: Repository) -> None:
    """Do to a repository all that can be done."""
    for step in range(6):
        dcpstore.save(
            {"w": torch.full((100,), step), "kept": torch.arange(1000), "lr": 0.1 * step},
            repo,
            step=step,
            metrics={"loss": 1 / (step + 1), "odd": [float("nan"), float("inf"), 2.0][step % 3]},
            labels={"lr": "3e-4"},
            tags=[f"t{step}"] if step % 2 else [],
            message="ünder\nway",
        )
    repo.branch("side", at=3)
    dcpstore.save({"w": torch.zeros(3)}, repo, branch="side")
    repo.rollback("main~2")
    dcpstore.save({"w": torch.ones(7), "kept": torch.arange(1000)}, repo)
    repo.delete_tag("t5")
    repo.undo()
    repo.delete_tag("t3")
    repo.delete_branch("side")
    repo.undo()
    repo.add_metrics(2, {"later": 1.5})
    repo.add_labels(2, {"good": "yes"})
    repo.undo()
    repo.expire(keep_last=2)
    repo.gc()
    repo.gc(grace="0s")


def test_a_version_is_lost_with_a_page_of_it_and_not_with_its_plan(
    place: Place, repo: Repository, tmp_path: Path
) -> None:
    state = {"w": torch.arange(100), "lr": 0.1}
    first = dcpstore.save(state, repo)
    second = dcpstore.save({**state, "lr": 0.2}, repo)
    dcpstore.save(state, repo)  # all of it lies in the page of the first
    data = Path(place.data)
    (data / f"plans/{first.uid}.json").write_bytes(b"{}")
    page = data / f"pages/{first.uid}.page"
    whole = page.read_bytes()
    page.write_bytes(whole[:-1])
    report = rebuild(place.data, tmp_path / "new")
    assert (report.versions, report.lost) == ((2,), (1, 3))
    lost = [problem for problem in report.problems if f"pages/{first.uid}.page: " in problem]
    assert len(lost) == 2
    assert any(problem.startswith(f"plans/{first.uid}.json: ") for problem in report.problems)
    with open_repository(tmp_path / "new", create=False) as rebuilt:
        assert torch.equal(rebuilt.read(2)["w"], state["w"])
        rebuilt.gc(grace="0s")
        assert rebuilt.verify(deep=True).damaged == ()
        assert f"pages/{second.uid}.page" in set(rebuilt.storage.list("pages"))
        assert_sound(rebuilt)


def test_many_versions_are_rebuilt_in_batches_and_a_lost_one_takes_no_other_with_it(
    place: Place, repo: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restoring, "_BATCH", 4)
    kept = {f"kept.{i:03}": i for i in range(200)}  # in sets that batches share
    for step in range(10):
        dcpstore.save({"w": torch.full((5,), step // 2), **kept}, repo, step=step)
    first = repo.show(5).uid  # the pack of v5 and v6, which no operation names any more
    (Path(place.data) / "packs" / first / "0-0.pack").unlink()
    (Path(place.data) / operation_key(6)).unlink()
    report = rebuild(place.data, tmp_path / "new")
    assert report.versions == (1, 2, 3, 4, 7, 8, 9, 10)
    with open_repository(tmp_path / "new", create=False) as rebuilt:
        for number in report.versions:
            assert rebuilt.read(number)["w"][0] == (number - 1) // 2
        assert_sound(rebuilt)


def test_rebuilt_and_original_answer_every_view_alike(
    place: Place, repo: Repository, tmp_path: Path
) -> None:
    live(repo)
    assert_sound(repo)
    report = rebuild(place.data, tmp_path / "new")
    assert (report.lost, report.problems, report.unfinished, report.moved_refs) == ((), (), (), ())
    with open_repository(tmp_path / "new", create=False) as rebuilt:
        assert rebuilt.about.uid == repo.about.uid
        assert rebuilt.about.chunk == repo.about.chunk
        assert rebuilt.operations() == repo.operations()
        assert (rebuilt.tags(), rebuilt.branches()) == (repo.tags(), repo.branches())
        assert repr([*map(vars, rebuilt.log())]) == repr(
            [*map(vars, repo.log())]
        )  # a NaN does not equal itself
        old, new = views(repo), views(rebuilt)
        for name in old:
            assert _told(new[name]) == _told(old[name]), name
        for version in repo.log():
            here, there = repo.read(version.number), rebuilt.read(version.number)
            assert here.keys() == there.keys()
            for fqn, value in here.items():
                same = torch.equal(value, there[fqn]) if torch.is_tensor(value) else None
                assert value == there[fqn] if same is None else same
        assert_sound(rebuilt)
        again = dcpstore.save(repo.read(), rebuilt)
        assert again.number == repo.log()[0].number + 1
        assert again.nbytes_written == 0


def _told(rows: list[tuple[object, ...]]) -> list[str]:
    """Return rows without what the databases write in two ways: times."""
    return sorted(repr([v for v in row if not _is_time(v)]) for row in rows)


def _is_time(value: object) -> bool:
    return hasattr(value, "tzinfo") or (isinstance(value, str) and value[4:5] == "-" == value[7:8])


def test_rebuilding_into_another_database(place: Place, repo: Repository, tmp_path: Path) -> None:
    live(repo)
    url = sqlite_url(tmp_path / "elsewhere.db")
    rebuild(place.data, url)
    with open_repository(url, create=False) as rebuilt:
        assert _told(views(rebuilt)["history"]) == _told(views(repo)["history"])


def test_an_embedded_repository_is_rebuilt_in_its_folder_and_may_move(tmp_path: Path) -> None:
    folder = tmp_path / "ckpts"
    with open_repository(folder) as repo:
        live(repo)
        before = views(repo)
    for file in folder.glob("catalog.db*"):
        file.unlink()
    rebuild(folder, folder)
    folder.rename(tmp_path / "moved")
    with open_repository(tmp_path / "moved", create=False) as moved:
        assert views(moved) == before
        assert moved.verify(deep=True).damaged == ()


def test_a_catalog_that_is_there_is_never_changed(
    place: Place, repo: Repository, save: Save, tmp_path: Path
) -> None:
    save()
    with open_repository(tmp_path / "full") as full:
        before = views(full)
        with pytest.raises(AlreadyExistsError, match="not empty"):
            rebuild(place.data, tmp_path / "full")
        assert views(full) == before
    with pytest.raises(AlreadyExistsError, match="not empty"):
        rebuild(place.data, place.url)


def test_the_folders_of_a_new_catalog_are_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dcpstore.save({"w": torch.arange(4)}, tmp_path / "old")
    sync, synced = os.fsync, set()

    def spy(descriptor: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    rebuild(tmp_path / "old", tmp_path / "deep" / "new")
    assert {tmp_path, tmp_path / "deep"} <= synced


def test_a_folder_without_a_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(NotFoundError, match="no operations"):
        rebuild(tmp_path / "photos", tmp_path / "new")
    with pytest.raises(NotFoundError, match=r"no data folder .*nowhere'; give the folder that"):
        rebuild(tmp_path / "nowhere", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_versions_without_a_sound_manifest_are_reported_and_left_out(
    place: Place, repo: Repository, save: Save, tmp_path: Path, how: str
) -> None:
    versions = [save(tags=[f"t{i}"]) for i in range(3)]
    path = Path(place.data) / manifest_key(versions[2].uid)
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[:-9])
    report = rebuild(place.data, tmp_path / "new")
    assert (report.versions, report.lost) == ((1, 2), (3,))
    assert report.moved_refs == ("main", "t2")
    assert len(report.problems) == 1
    with open_repository(tmp_path / "new", create=False) as rebuilt:
        assert rebuilt.show().number == 2  # the branch went back to what is left
        assert [tag.name for tag in rebuilt.tags()] == ["t0", "t1"]
        assert torch.equal(rebuilt.read()["kept"], torch.arange(50))
        with pytest.raises(NotFoundError, match="expired"):
            rebuilt.show(3)
    path.write_bytes(whole)


def test_a_damaged_operation_is_reported_and_the_rest_comes_back(
    place: Place, repo: Repository, save: Save, tmp_path: Path
) -> None:
    save()
    repo.tag("lost")
    repo.tag("kept")
    path = Path(place.data) / operation_key(3)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"lost", b"last"))
    report = rebuild(place.data, tmp_path / "new")
    assert [problem.split(":")[0] for problem in report.problems] == [operation_key(3)]
    with open_repository(tmp_path / "new", create=False) as rebuilt:
        assert [tag.name for tag in rebuilt.tags()] == ["kept"]
    path.write_bytes(whole)


def test_what_was_never_finished_stays_out(
    place: Place, repo: Repository, save: Save, tmp_path: Path
) -> None:
    version = save()
    key = manifest_key("ab" * 16)
    repo.storage.put(key, repo.storage.get(manifest_key(version.uid)))
    report = rebuild(place.data, tmp_path / "new")
    assert report.unfinished == ("ab" * 16,)
    assert report.versions == (1,)
    repo.storage.delete(key)


def test_a_crash_before_the_journal_is_made_good_by_the_next_change(
    place: Place, repo: Repository, save: Save, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save()
    with monkeypatch.context() as crashed:
        crashed.setattr(journal, "_write", lambda catalog, storage, entries: None)
        save()
        repo.tag("unwritten")
    assert operation_key(3) not in set(repo.storage.list("operations"))
    repo.tag("written")
    stored = repo.storage.get(operation_key(3))
    assert json.loads(stored)["version"]["number"] == 2
    rebuild(place.data, tmp_path / "new")
    with open_repository(tmp_path / "new", create=False) as rebuilt:
        assert _told(views(rebuilt)["history"]) == _told(views(repo)["history"])


def test_a_journal_that_cannot_be_written_fails_no_change(
    repo: Repository, save: Save, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save()
    with no_room_for_operations(repo, monkeypatch):
        repo.tag("made")
        assert save().number == 2
    assert "the disk is full" in caplog.text
    assert [tag.name for tag in repo.tags()] == ["made"]
    repo.tag("after")


def test_a_rebuild_after_a_crash_between_move_and_manifest(
    place: Place, repo: Repository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    big, small = torch.randn(1000), torch.randn(10)
    dcpstore.save({"big": big, "small": small}, repo)
    dcpstore.save({"small": small}, repo)
    repo.expire(keep_last=1)
    with monkeypatch.context() as crash:
        crash.setattr(collecting, "are_stale", lambda catalog: False)
        repo.gc()
    rebuild(place.data, tmp_path / "new")
    with open_repository(tmp_path / "new", create=False) as rebuilt:
        assert torch.equal(rebuilt.read()["small"], small)
        rebuilt.gc(grace="0s")
        assert torch.equal(rebuilt.read()["small"], small)
        assert rebuilt.verify(deep=True).damaged == ()
