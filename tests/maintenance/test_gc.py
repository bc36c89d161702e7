"""What gc condemns, repacks, deletes and clears, and what it must never touch."""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import dcpstore
from dcpstore import ConflictError, DcpstoreError, InvalidInputError, NotFoundError, Repository
from dcpstore import repository as repository_module
from dcpstore.catalog.read.entries import load_chunks
from dcpstore.core.uids import new_uid
from dcpstore.formats.manifest import manifest_key
from dcpstore.maintenance import gc as collecting
from dcpstore.maintenance import rewrite as rewriting
from dcpstore.saving import commit as committing
from dcpstore.saving import save_state
from dcpstore.storage.packs import PackReader
from tests.maintenance.conftest import Save, open_intruder, packs_named, packs_of
from tests.soundness import Place

NOW = "0s"


def test_condemned_first_deleted_after_the_grace_time(repo: Repository, save: Save) -> None:
    versions = [save() for _ in range(3)]
    repo.expire(keep_last=1)
    stored = packs_of(repo)
    preview = repo.gc(dry_run=True)
    report = repo.gc()
    lost = versions[1].nbytes_written
    assert preview.condemned == report.condemned
    assert [pack.key for pack in report.condemned] == [f"packs/{versions[1].uid}/0-0.pack"]
    assert len(report.repacked) == 1  # v1's holds the kept tensor too
    assert report.nbytes_condemned == lost + versions[0].nbytes_written
    assert (report.nbytes_freed, report.deleted) == (0, ())
    assert packs_of(repo) >= stored - {f"packs/{versions[0].uid}/0-0.pack"}
    assert repo.gc().condemned == ()
    final = repo.gc(grace=NOW)
    assert {pack.key for pack in final.deleted} >= {f"packs/{versions[1].uid}/0-0.pack"}
    assert final.nbytes_freed > lost
    assert manifest_key(versions[1].uid) not in set(repo.storage.list("manifests"))
    assert repo.verify(deep=True).damaged == ()
    assert repo.gc(grace=NOW).nbytes_freed == 0
    assert torch.equal(repo.read()["kept"], torch.arange(50))


def test_a_dry_run_changes_nothing(repo: Repository, save: Save) -> None:
    for _ in range(3):
        save()
    repo.expire(keep_last=1)
    before = (repo.operations(), list(repo.storage.list()), repo.sql("SELECT * FROM storage"))
    report = repo.gc(grace=NOW, dry_run=True)
    assert report.deleted
    assert (repo.operations(), list(repo.storage.list()), repo.sql("SELECT * FROM storage")) == (
        before
    )
    real = repo.gc(grace=NOW)
    assert real.repacked  # and the old packs deleted
    assert set(report.condemned) <= set(real.condemned)
    assert set(report.deleted) == set(real.deleted)
    assert (report.cleared, report.nbytes_freed) == (real.cleared, real.nbytes_freed)


def test_a_pack_mostly_dead_is_repacked_and_versions_stay_readable(repo: Repository) -> None:
    big, small = torch.randn(1000), torch.randn(10)
    first = dcpstore.save({"big": big, "small": small}, repo)
    second = dcpstore.save({"big": big + 1, "small": small}, repo)
    repo.expire(keep_last=1)
    report = repo.gc()
    ((old, new),) = report.repacked
    assert old.key == f"packs/{first.uid}/0-0.pack"
    assert new is not None
    assert new.nbytes == small.nbytes
    assert old.key in packs_of(repo)  # who holds the old place still finds it
    assert torch.equal(repo.read()["small"], small)
    named = packs_named(repo, second.uid)
    assert named == {new.key, f"packs/{second.uid}/0-0.pack"}
    repo.gc(grace=NOW)
    assert packs_of(repo) == named
    assert torch.equal(repo.read()["small"], small)
    assert repo.verify(deep=True).damaged == ()
    third = dcpstore.save({"big": big + 1, "small": small}, repo)
    assert third.nbytes_written == 0


def test_a_load_that_holds_old_places_goes_on_until_the_grace_ends(repo: Repository) -> None:
    big, small = torch.randn(1000), torch.randn(10)
    dcpstore.save({"big": big, "small": small}, repo)
    dcpstore.save({"small": small}, repo)
    entry = repo.entries(2, ["small"])[0]
    assert entry.tensor is not None
    places = load_chunks(repo.catalog, [dcpstore.records.ChunkRange(entry.tensor.id, 0, 0, 0)])
    repo.expire(keep_last=1)
    assert repo.gc().repacked
    reader = PackReader(repo.storage)
    data = reader.read(places[0].pack, places[0].offset, places[0].length)
    assert len(data) == small.nbytes


def test_a_save_does_not_reuse_what_is_condemned(repo: Repository) -> None:
    old = torch.randn(100)
    dcpstore.save({"w": old}, repo)
    dcpstore.save({"w": old + 1}, repo)
    repo.expire(keep_last=1)
    repo.gc()
    version = dcpstore.save({"w": old}, repo)
    assert version.nbytes_written == old.nbytes
    repo.gc(grace=NOW)
    assert torch.equal(repo.read()["w"], old)


def by_another(change: Callable[[], Any]) -> Any:
    """Return the result of a change in another thread, since no thread may nest changes."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(change).result()


def test_a_save_that_meant_to_reuse_collected_bytes_fails_and_shows_nothing(
    repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = torch.randn(100)
    dcpstore.save({"w": old}, repo)
    dcpstore.save({"w": old + 1}, repo)
    found = save_state.find_tensors_and_lost

    def find_and_collect(catalog: Any, digests: Any) -> Any:
        known = found(catalog, digests)
        monkeypatch.setattr(save_state, "find_tensors_and_lost", found)
        assert known[0]
        by_another(lambda: repo.expire(keep_last=1))
        by_another(lambda: repo.gc(grace="1h"))
        return known

    monkeypatch.setattr(save_state, "find_tensors_and_lost", find_and_collect)
    with pytest.raises(ConflictError, match="again"):
        dcpstore.save({"w": old}, repo)
    assert [v.number for v in repo.log()] == [2]


def test_a_save_goes_through_while_what_it_reuses_is_repacked(
    repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    big, small = torch.randn(1000), torch.randn(10)
    dcpstore.save({"big": big, "small": small}, repo)
    dcpstore.save({"small": small}, repo)
    put = repo.storage.put

    def put_and_repack(key: str, data: Any) -> None:
        put(key, data)
        if key.startswith("manifests/"):  # of the save: what it names moves now
            monkeypatch.setattr(repo.storage, "put", put)
            by_another(lambda: repo.expire(keep_last=1))
            assert by_another(lambda: repo.gc(grace="1h")).repacked

    monkeypatch.setattr(repo.storage, "put", put_and_repack)
    version = dcpstore.save({"small": small, "more": big + 1}, repo)
    repo.gc(grace=NOW)
    named = packs_named(repo, version.uid)
    assert named <= packs_of(repo)
    assert torch.equal(repo.read()["small"], small)


def test_no_manifest_names_what_goes_of_two_saves_that_wrote_the_same(
    repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = torch.randn(100)
    commit = committing.commit_save

    def commit_second(*args: Any) -> Any:
        monkeypatch.setattr(committing, "commit_save", commit)
        by_another(lambda: dcpstore.save({"same": same}, repo, branch="rival"))
        return commit(*args)

    monkeypatch.setattr(committing, "commit_save", commit_second)
    version = dcpstore.save({"same": same}, repo)
    (gone,) = repo.gc(grace=NOW).deleted
    assert gone.key == f"packs/{version.uid}/0-0.pack"
    named = packs_named(repo, version.uid)
    assert named == packs_of(repo)


def test_what_died_while_it_wrote_an_object_is_cleared(repo: Repository, save: Save) -> None:
    version = save()
    keys = [
        "operations/000000000002.json",
        manifest_key(version.uid),
        *(f"{folder}/{version.uid}.x" for folder in ("pages", "plans", "references")),
        "README.txt",
        "references.py",
    ]
    killed = [repo.storage.create(key) for key in keys]
    left = [key for key in repo.storage.list() if key.endswith(".tmp")]
    assert len(left) == len(keys)
    repo.storage.put(f"mine.{version.uid}.tmp", b"somebody's own")
    assert repo.gc().cleared == ()  # who writes them may live
    assert set(repo.gc(lease=NOW, grace=NOW).cleared) == set(left)
    (kept,) = [key for key in repo.storage.list() if key.endswith(".tmp")]
    assert kept.startswith("mine")
    for sink in killed:
        sink.discard()


def test_unknown_objects_are_left_alone_until_they_are_old(
    repo: Repository, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    save()
    uid = new_uid()
    repo.storage.put(f"packs/{uid}/0-0.pack", b"of someone who is about to begin")
    repo.storage.put("packs/restored by hand".replace(" ", "-") + "/0-0.pack", b"of no uid of ours")
    report = repo.gc()
    assert len(report.unknown) == 2
    assert report.cleared == ()
    report = repo.gc(grace=NOW, lease=NOW)
    assert report.cleared == (f"packs/{uid}/0-0.pack",)
    assert len(report.unknown) == 1


def test_a_data_folder_of_another_repository_is_left_alone(
    place: Place, repo: Repository, tmp_path: Path
) -> None:
    with open_intruder(tmp_path / "second", place.data) as second:
        dcpstore.save({"w": torch.ones(3)}, repo)
        journal = [repo.storage.get(key) for key in repo.storage.list("operations")]
        dcpstore.save({"w": torch.zeros(3)}, second)
        second.tag("mine")
        with pytest.raises(DcpstoreError, match="belongs to repository"):
            second.gc(grace=NOW, lease=NOW)
    assert [repo.storage.get(key) for key in repo.storage.list("operations")] == journal
    assert repo.gc(grace=NOW, lease=NOW).cleared == ()


def test_two_collections_at_once_do_no_harm(place: Place, repo: Repository, save: Save) -> None:
    for _ in range(6):
        save()
    repo.expire(keep_last=1)
    failures: list[BaseException] = []

    def collect() -> None:
        try:
            with place.open() as mine:
                for _ in range(3):
                    mine.gc(grace=NOW)
        except BaseException as error:  # raised again by the test
            failures.append(error)

    threads = [threading.Thread(target=collect) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert repo.verify(deep=True).damaged == ()


@pytest.mark.parametrize("how", ["emptied", "damaged"])
def test_a_pack_that_cannot_be_repacked_is_passed_over(
    place: Place, repo: Repository, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    kept, more = torch.randn(10), torch.randn(10)
    dcpstore.save({"big": torch.randn(1000), "kept": kept}, repo)
    dcpstore.save({"big": torch.randn(1000), "more": more}, repo)
    dcpstore.save({"kept": kept}, repo)
    dcpstore.save({"more": more}, repo)
    repo.expire(keep_every=2, keep_last=2)
    plan = rewriting.plan_pack

    spoilt: list[tuple[Path, bytes]] = []

    def collect() -> None:
        with place.open() as rival:
            rival.expire(keep_last=1)
            rival.gc(grace="1h")

    def plan_and_spoil(self: Any, old: str, new: str, **options: Any) -> bool:
        monkeypatch.setattr(rewriting, "plan_pack", plan)
        if how == "damaged":
            path = Path(place.data) / old
            spoilt.append((path, path.read_bytes()))
            path.write_bytes(b"")
        done = plan(self, old, new, **options)
        if how == "emptied":  # by another collection
            by_another(collect)
        return done

    monkeypatch.setattr(rewriting, "plan_pack", plan_and_spoil)
    repo.gc(grace="1h")
    assert {row.status for row in repo.sql("SELECT status FROM pack")} == {"live", "condemned"}
    for path, whole in spoilt:
        path.write_bytes(whole)
    assert torch.equal(repo.read()["more"], more)


@pytest.mark.parametrize("step", ["copied", "switched", "renewed", "deleted"])
def test_a_collection_that_is_killed_is_finished_by_the_next(
    repo: Repository, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    big, small = torch.randn(1000), torch.randn(10)
    dcpstore.save({"big": big, "small": small}, repo)
    dcpstore.save({"small": small}, repo)
    repo.expire(keep_last=1)
    targets: dict[str, tuple[object, str]] = {
        "copied": (rewriting, "switch_pack"),
        "switched": (collecting, "are_stale"),
        "renewed": (rewriting, "clear_stale_page"),
        "deleted": (collecting, "forget_packs"),
    }
    with monkeypatch.context() as broken:
        broken.setattr(*targets[step], _killed)
        with pytest.raises(KeyboardInterrupt):
            repo.gc(grace=NOW)
    assert torch.equal(repo.read()["small"], small)
    repo.gc(grace=NOW, lease=NOW)
    repo.gc(grace=NOW, lease=NOW)
    assert torch.equal(repo.read()["small"], small)
    assert repo.verify(deep=True).damaged == ()
    assert sum(repo.storage.size(key) for key in packs_of(repo)) == small.nbytes


def _killed(*args: object, **options: object) -> None:
    raise KeyboardInterrupt


def test_a_version_that_expires_while_it_is_read_is_said_to(
    repo: Repository, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    save()
    save()
    entries = repository_module.load_entries

    def entries_and_collect(*args: Any) -> Any:
        found = entries(*args)
        repo.expire(keep_last=1)
        repo.gc()
        return found

    monkeypatch.setattr(repository_module, "load_entries", entries_and_collect)
    with pytest.raises(NotFoundError, match="expired"):
        repo.read(1)
    monkeypatch.undo()


def test_grace_is_a_span_of_time(repo: Repository) -> None:
    for wrong in ("soon", "-1h", timedelta(seconds=-1), 5):
        with pytest.raises(InvalidInputError, match="not a valid duration") as caught:
            repo.gc(grace=wrong)  # type: ignore[arg-type]
        assert ("timedelta" in str(caught.value)) == (not isinstance(wrong, str))
    for right in ("1.5h", "2w", "30 m", timedelta(days=1)):
        assert repo.gc(grace=right).nbytes_freed == 0


def test_the_longest_span_is_taken(repo: Repository, save: Save) -> None:
    save()
    save()
    repo.expire(keep_last=1)
    report = repo.gc(grace="100000d", lease="100000d")
    assert (report.deleted, report.cleared, report.crashed) == ((), (), ())


def test_dead_plans_pages_and_tensors_leave_no_rows_and_no_objects(repo: Repository) -> None:
    for i in range(4):
        dcpstore.save({f"w{i}": torch.randn(5 + i)}, repo)
    repo.expire(keep_last=1)
    repo.gc(grace=NOW)

    def count(table: str) -> int:
        return int(repo.sql(f"SELECT count(*) AS n FROM {table}")[0].n)

    others = {key.split("/")[0] for key in repo.storage.list() if repo.show().uid not in key}
    assert others == {"operations", "README.txt", "references.py"}
    assert count("page") == 2  # and the plan
    assert {
        t: count(t) for t in ("tensor", "chunk", "entry", "fqn", "pack", "plan")
    } == dict.fromkeys(("tensor", "chunk", "entry", "fqn", "pack", "plan"), 1)
    assert datetime.now(UTC) > repo.show().created_at
    assert math.prod(repo.read()["w3"].shape) == 8
