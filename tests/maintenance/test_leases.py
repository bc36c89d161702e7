"""What a save has begun is its own while its lease lasts, and cleared after."""

import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update

from dcpstore import ConflictError, InvalidInputError, Repository
from dcpstore.catalog.schema import tables as schema
from dcpstore.catalog.write import saves as saves_module
from dcpstore.catalog.write.saves import abort_save, commit_save, kept_lease
from dcpstore.formats.manifest import manifest_key
from dcpstore.storage.packs import PackWriter
from tests.maintenance.conftest import Save, begin

NOW = "0s"


def test_what_crashed_saves_left_is_cleared_after_their_lease(repo: Repository, save: Save) -> None:
    save()
    draft = begin(repo)
    writer = PackWriter(repo.storage, draft.uid, 0)
    writer.append(b"x" * 1000)
    writer.finish()
    killed = repo.storage.create(f"packs/{draft.uid}/1-0.pack")
    killed.write(b"y" * 10_000)
    repo.storage.put(manifest_key(draft.uid), b"{}")
    assert repo.gc().cleared == ()
    report = repo.gc(lease=NOW, grace=NOW)
    assert report.crashed == (draft.uid,)
    assert len(report.cleared) in (2, 3)  # what was buffered of the third may not be a file yet
    assert not [key for key in repo.storage.list() if draft.uid in key]
    killed.discard()
    with pytest.raises(ConflictError, match="aborted"):
        commit_save(repo.catalog, draft.uid, None)  # type: ignore[arg-type]
    assert repo.gc(lease=NOW, grace=NOW).cleared == ()


def test_a_save_that_lapses_while_gc_runs_keeps_what_it_wrote(
    repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commit does not know that it was abandoned, so it may still succeed."""
    draft = begin(repo)
    writer = PackWriter(repo.storage, draft.uid, 0)
    writer.append(b"x" * 1000)
    writer.finish()
    listed = repo.storage.list

    def lapse_and_list(prefix: str = "") -> Any:
        if prefix:  # all is listed after crashed saves were found
            return listed(prefix)
        with repo.catalog.database.write() as connection:
            silent = datetime.now(UTC) - timedelta(hours=2)
            connection.execute(update(schema.version).values(touched_at=silent))
        return listed(prefix)

    monkeypatch.setattr(repo.storage, "list", lapse_and_list)
    report = repo.gc()
    monkeypatch.undo()
    assert (report.crashed, report.cleared) == ((), ())
    preview = repo.gc(dry_run=True)
    assert preview.crashed == (draft.uid,)
    assert preview.cleared == (f"packs/{draft.uid}/0-0.pack",)
    report = repo.gc()  # gives it up first
    assert (report.crashed, report.cleared) == (preview.crashed, preview.cleared)


def test_a_grace_shorter_than_a_running_save_is_refused(repo: Repository, save: Save) -> None:
    save()
    save()
    repo.expire(keep_last=1)
    draft = begin(repo)
    before = repo.operations()
    with pytest.raises(InvalidInputError, match=r"'ada' on 'node1'.*gc --lease 1m' gives it up"):
        repo.gc(grace=NOW)
    assert repo.operations() == before
    assert repo.gc(grace="1h").repacked
    abort_save(repo.catalog, draft.uid, "given up")
    assert repo.gc(grace=NOW).deleted


def test_a_running_save_renews_its_lease(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = begin(repo)

    def touched() -> datetime:
        (row,) = repo.sql("SELECT touched_at FROM version WHERE uid = :uid", uid=draft.uid)
        at = row.touched_at
        return datetime.fromisoformat(at) if isinstance(at, str) else at.replace(tzinfo=None)

    before = touched()
    renewed = threading.Event()
    touch = saves_module.touch_save

    def touch_and_tell(*args: Any) -> None:
        touch(*args)
        renewed.set()

    monkeypatch.setattr(saves_module, "touch_save", touch_and_tell)
    with kept_lease(repo.catalog, draft.uid, seconds=0.01):
        assert renewed.wait(10)
    assert touched() > before
    abort_save(repo.catalog, draft.uid, "done")
