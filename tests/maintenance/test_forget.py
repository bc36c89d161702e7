"""Versions that are forgotten by name: all or none, and back by an undo until gc."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import dcpstore
from dcpstore import ConflictError, InvalidInputError, NotFoundError, Repository
from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.db.url import sqlite_url
from dcpstore.catalog.write.undo import undo_last
from dcpstore.core.uids import new_uid
from dcpstore.formats.journal_entry import decode_operation, operation_key
from dcpstore.maintenance.rebuild import rebuild
from dcpstore.records import RefRecord, Version, VersionContent
from dcpstore.saving import commit as committing
from tests.hostile.parsers import sign_operation
from tests.maintenance.conftest import Save, packs_of, views
from tests.soundness import Place


def seen(repo: Repository) -> tuple[Any, ...]:
    """Return all facts of a repository, except its operations."""
    refs = {ref.name: ref.version for ref in (*repo.tags(), *repo.branches())}
    return (
        refs,
        repo.log(),
        {name: rows for name, rows in views(repo).items() if name != "operations"},
    )


@contextmanager
def rebuilt(place: Place) -> Iterator[Repository]:
    """Yield a repository whose catalog was made again from the data folder of another."""
    url = sqlite_url(f"{place.data}-{new_uid()}.db")
    assert rebuild(place.data, url).problems == ()
    with dcpstore.open(url, create=False) as again:
        yield again


def test_named_versions_go_in_one_operation_and_come_back(
    repo: Repository, save: Save, place: Place
) -> None:
    for step in range(4):
        save(step=step, tags=["best"] if step == 1 else [])
    before = seen(repo)
    read = repo.read(2)
    report = repo.forget([1, "best", "v2"], force=True)
    assert report.forgotten == (1, 2)
    assert report.versions == (before[1][3], before[1][2])
    assert (report.deleted, report.moved) == ((RefRecord("best", "tag", 2),), ())
    (done, last) = repo.operations(limit=2)
    assert (done.kind, done.target, done.old, done.new) == ("forget", "v1-v2", None, None)
    assert last.kind == "save"
    assert [v.number for v in repo.log("main")] == [4, 3]
    assert repo.show(3).parent == 2
    for ref in (1, "v2", "main~2", repo.log()[0].uid and before[1][3].uid[:12]):
        with pytest.raises(NotFoundError, match=r"forgotten on .*'dcpstore undo'"):
            repo.show(ref)
    with pytest.raises(NotFoundError, match="no branch or tag 'best'"):
        repo.show("best")
    with rebuilt(place) as again:
        assert views(again) == views(repo)
        undo_last(again.catalog, expect=done.number, author="")  # past the journal of both
        assert seen(again) == before
        assert set(again.read(2)) == set(read)
    undone = repo.undo(expect=done.number)
    assert (undone.kind, undone.target, undone.number) == ("undo", "v1-v2", done.number + 1)
    assert seen(repo) == before
    assert torch.equal(repo.read(2)["new"], read["new"])
    with rebuilt(place) as again:
        assert views(again) == views(repo)
    repo.undo()  # and the last save before it
    assert repo.show("main").number == 3


def test_what_is_refused_changes_nothing(repo: Repository, save: Save) -> None:
    for step in range(3):
        save(step=step, tags=["a", "b"] if step == 1 else [])
    before = seen(repo), repo.operations()
    with pytest.raises(
        InvalidInputError, match=r"v2 \(a\), v2 \(b\)\. Nothing was changed\. .*force"
    ):
        repo.forget([1, 2])
    for refs, error in (
        ([1, "bset"], NotFoundError),
        ([1, 9], NotFoundError),
        ([1, "main~7"], NotFoundError),
        ([1, None], InvalidInputError),
        (None, InvalidInputError),
        ([1, "a b"], InvalidInputError),
        ([True], InvalidInputError),
        (1.5, InvalidInputError),
    ):
        for dry_run in (False, True):
            with pytest.raises(error):
                repo.forget(refs, dry_run=dry_run)  # type: ignore[arg-type]
    assert repo.forget([]).versions == ()
    assert repo.forget(["main@step=1", 1], force=True, dry_run=True).forgotten == (1, 2)
    assert (seen(repo), repo.operations()) == before
    repo.forget("main~2")
    with pytest.raises(NotFoundError, match="v1 any more: it was forgotten"):
        repo.forget([1])


def test_a_branch_whose_tip_is_forgotten_moves_back_to_what_stays(
    repo: Repository, save: Save, place: Place
) -> None:
    for _ in range(3):
        save()
    save(branch="side", parent=1)
    repo.forget(2)
    before = seen(repo)
    report = repo.forget([repo.show(3), 4])
    assert set(report.moved) == {RefRecord("main", "branch", 1), RefRecord("side", "branch", 1)}
    assert (report.deleted, report.forgotten) == ((), (3, 4))
    with rebuilt(place) as again:
        assert views(again) == views(repo)
    repo.undo()
    assert seen(repo) == before
    gone = repo.forget([1, 3, 4])
    assert {ref.name for ref in gone.deleted} == {"main", "side"}
    assert repo.log() == repo.branches() == []
    with rebuilt(place) as again:
        undo_last(again.catalog, expect=None, author="")
        assert seen(again) == before
    assert save().parent is None  # main begins again
    repo.undo()
    repo.undo()
    assert seen(repo)[0] == {"main": 3, "side": 4}
    repo.forget(3)
    assert save().parent == 1


def test_gc_frees_what_was_forgotten_and_ends_the_undo(
    repo: Repository, save: Save, place: Place
) -> None:
    for _ in range(3):
        save()
    packs = packs_of(repo)
    repo.tag("late", 3)
    repo.forget([1, 2])
    forgotten = repo.operations(limit=1)[0].number
    assert repo.gc(grace="0s", dry_run=True).cleared  # it would take their manifests
    assert repo.gc(grace="1h").deleted == ()
    assert {o.kind for o in repo.operations(limit=1)} == {"gc"}
    for expect in (None, forgotten):
        with pytest.raises(NotFoundError, match=r"gc has dropped the forgotten versions.*--expect"):
            repo.undo(expect=expect)
    with pytest.raises(NotFoundError, match="v1 any more: it was expired"):
        repo.show(1)
    with rebuilt(place) as again:
        assert views(again) == views(repo)
        with pytest.raises(NotFoundError, match="gc has dropped"):
            undo_last(again.catalog, expect=None, author="")
    assert repo.gc(grace="0s").deleted
    assert len(packs_of(repo)) == len(packs) - 1  # what the third shares with the first stays
    with pytest.raises(ConflictError, match="is 5 "):
        repo.undo(expect=2)
    repo.undo(expect=forgotten - 1)  # by its number, what came before is undone
    assert repo.tags() == []
    with pytest.raises(NotFoundError, match="back to v2, which was expired"):
        repo.undo(expect=forgotten - 2)


def test_gc_that_ran_before_and_a_dry_one_leave_the_undo(repo: Repository, save: Save) -> None:
    for _ in range(2):
        save()
    repo.gc(grace="0s")
    before = seen(repo)
    repo.forget(1)
    repo.gc(grace="0s", dry_run=True)
    assert repo.verify(deep=True).damaged == ()
    repo.undo()
    assert seen(repo) == before


def test_a_save_that_runs_meanwhile_goes_on_from_what_stays(
    repo: Repository, save: Save, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        save()
    commit = committing.commit_save

    def after(change: Callable[[Repository], object]) -> Version:
        """Save, with a change by another process just before the commit."""

        def change_first(catalog: Catalog, uid: str, content: VersionContent) -> Version:
            with place.open() as other, ThreadPoolExecutor(1) as pool:
                pool.submit(change, other).result()
            return commit(catalog, uid, content)

        with monkeypatch.context() as patched:
            patched.setattr(committing, "commit_save", change_first)
            return save()

    assert after(lambda other: other.forget(3)).parent == 2  # not the tip that it began with
    assert after(lambda other: (other.forget("main"), other.undo())).parent == 4

    def forget_and_free(other: Repository) -> None:
        other.forget([1, 2, 4, 5])
        other.gc(grace="1h")

    # What it reuses is condemned.
    with pytest.raises(ConflictError, match="Save again, or copy again"):
        after(forget_and_free)
    assert save().parent is None


def test_a_journal_that_lies_about_refs_is_damage(repo: Repository, save: Save) -> None:
    save()
    save(tags=["a"])
    repo.forget(2, force=True)
    number = repo.operations(limit=1)[0].number
    body = json.loads(repo.storage.get(operation_key(number)))
    del body["format"], body["digest"]
    assert decode_operation(sign_operation(json.dumps(body).encode()))
    for change in (
        {"name": "../x"},
        {"name": "a@step=5"},
        {"kind": "head"},
        {"old": {"uid": "x", "version": 2}},
        {"new": 3},
    ):
        lie = json.loads(json.dumps(body))
        lie["detail"]["refs"][0] |= change
        with pytest.raises(dcpstore.CorruptionError):
            decode_operation(sign_operation(json.dumps(lie).encode()))
    for detail in ({"versions": ["x"], "refs": []}, {"versions": []}, {"refs": []}, None):
        with pytest.raises(dcpstore.CorruptionError):
            decode_operation(sign_operation(json.dumps(body | {"detail": detail}).encode()))
