"""Dry runs and scans report what a change would do, and take no lock that a save needs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

import dcpstore
from dcpstore import Repository
from dcpstore.catalog.write.operations import lock_repository
from tests.maintenance.conftest import Save, begin
from tests.soundness import Place, assert_sound

NOW = "0s"


@contextmanager
def another_writes(repo: Repository) -> Iterator[None]:
    """Let another thread hold the lock that every change takes, inside the block."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with repo.catalog.database.write() as connection:
            lock_repository(connection)
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(60)
        yield
    finally:
        done.set()
        thread.join()


def test_dry_runs_and_scans_end_while_another_holds_the_lock(
    place: Place, repo: Repository, save: Save
) -> None:
    for _ in range(4):
        save()
    repo.forget(1)
    save(branch="side")
    crashed = begin(repo)
    repo.verify()  # which notes how far it came, so that the next one has nothing to note
    with place.open() as other, another_writes(repo):
        collected = other.gc(lease=NOW, dry_run=True)
        expired = other.expire(keep_last=1, dry_run=True)
        forgotten = other.forget(["side", 2], dry_run=True)
        verified = other.verify()
    assert collected.crashed == (crashed.uid,)
    assert verified.damaged == ()
    assert repo.forget(["side", 2]) == replace(forgotten, dry_run=False)
    assert repo.expire(keep_last=1).expired == (3,)
    assert expired.expired == (2, 3)


def test_a_dry_run_finds_what_a_collection_does(database_url: str, tmp_path: Path) -> None:
    small = torch.zeros(7)
    big = torch.arange(4_000)  # 250 chunks of 128 bytes or more, in runs
    with Place(database_url, str(tmp_path / "data"), chunk_nbytes=128).open() as repo:
        for i in range(5):
            state = {f"layer.{k:03}": small + k for k in range(300)}
            changed = big.clone()
            changed[100 * i] = -1
            state |= {"big": changed, f"layer.{i:03}": small - 1 - i}
            dcpstore.save(state, repo, branch=f"b{i % 2}", tags=["kept"] if i == 3 else [])
        dcpstore.save({"alone": big + 5_000}, repo, branch="other")  # with a plan of its own
        repo.forget(["other", 5])
        repo.expire(keep_last=1)
        begin(repo)
        looked = repo.gc(grace=NOW, lease=NOW, dry_run=True)
        again = repo.gc(grace=NOW, lease=NOW, dry_run=True)
        assert again == looked
        done = repo.gc(grace=NOW, lease=NOW)
        assert {key.split("/")[0] for key in looked.cleared} == {"pages", "plans", "manifests"}
        assert looked.crashed
        assert looked.repacked
        assert looked.condemned
        assert looked.condemned == done.condemned
        assert [old for old, _ in looked.repacked] == [old for old, _ in done.repacked]
        assert set(looked.deleted) == set(done.deleted)
        assert (looked.cleared, looked.crashed) == (done.cleared, done.crashed)
        named = {f"pages/{key.split('/')[1]}" for key in repo.storage.list("pages")}
        assert len(named) == int(repo.sql("SELECT count(*) AS n FROM page")[0].n) - 1  # a plan
        assert_sound(repo)


def test_pages_of_runs_go_with_the_runs(database_url: str, tmp_path: Path) -> None:
    with Place(database_url, str(tmp_path / "data"), chunk_nbytes=128).open() as repo:
        dcpstore.save({"big": torch.arange(4_000)}, repo)
        dcpstore.save({"small": torch.zeros(3)}, repo)
        assert len(list(repo.storage.list("pages"))) == 2
        repo.expire(keep_last=1)
        looked = repo.gc(grace=NOW, dry_run=True)
        assert repo.gc(grace=NOW).cleared == looked.cleared
        assert len(list(repo.storage.list("pages"))) == 1
        assert_sound(repo)
