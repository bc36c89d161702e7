"""Which versions expire, what stays of them, and what a save with retention does."""

import logging
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

import dcpstore
from dcpstore import InvalidInputError, NotFoundError, Repository, Retention
from dcpstore.catalog.maintenance import retention as module
from dcpstore.catalog.maintenance.expire import expire_slice
from dcpstore.catalog.write.operations import lock_repository
from tests.maintenance.conftest import Save
from tests.soundness import Place


def numbers(repo: Repository) -> list[int]:
    return [version.number for version in reversed(repo.log())]


def test_rules_are_a_union_and_say_what_they_keep(repo: Repository, save: Save) -> None:
    for step, loss in enumerate([5.0, 1.0, 2.0, 4.0, 3.0, float("nan"), 9.0]):
        save(step=10 * step, metrics={"loss": loss}, tags=["start"] if step == 0 else [])
    report = repo.expire(keep_last=1, keep_every=40, keep_best=("loss", 2), dry_run=True)
    assert report.dry_run
    assert report.expired == (4, 6)
    assert report.kept == (1, 2, 3, 5, 7)
    assert {v.version.number: v.kept_by for v in report.verdicts} == {
        1: ("tag start", "every 40 steps"),
        2: ("best 2 by loss",),
        3: ("best 2 by loss",),
        4: (),
        5: ("every 40 steps",),
        6: (),
        7: ("tip of main", "newest", "last 1 of main"),
    }
    assert numbers(repo) == list(range(1, 8))
    assert repo.expire(keep_last=1, keep_every=40, keep_best=("loss", 2)).expired == (4, 6)
    assert numbers(repo) == [1, 2, 3, 5, 7]
    assert repo.operations(limit=1)[0].kind == "expire"
    assert repo.operations(limit=1)[0].target == "v4,v6"
    before = repo.operations()
    assert repo.expire(keep_last=1, keep_every=40, keep_best=("loss", 2)).expired == ()
    assert repo.operations() == before  # what changes nothing is no operation


def test_the_largest_may_be_best(repo: Repository, save: Save) -> None:
    for accuracy in (0.5, 0.9, 0.7, 0.1):
        save(metrics={"accuracy": accuracy})
    assert repo.expire(keep_best=("accuracy", 1, "max"), dry_run=True).kept == (2, 4)
    assert repo.expire(keep_best=["accuracy", 1, "max"]).kept == (2, 4)  # type: ignore[arg-type]


def test_tips_tagged_and_newest_versions_never_expire(repo: Repository, save: Save) -> None:
    save()
    save(tags=["keep"])
    save()
    save(branch="side", parent=1)
    save()
    assert repo.expire(keep_tagged=True).expired == (1, 3)
    assert numbers(repo) == [2, 4, 5]
    repo.tag("late", 4)
    assert repo.expire(keep_since=timedelta(0)).expired == ()


def test_a_version_that_no_ref_names_stays_while_it_is_newest(repo: Repository, save: Save) -> None:
    for _ in range(3):
        save()
    repo.rollback(1)
    assert repo.expire(keep_tagged=True).expired == (2,)
    assert numbers(repo) == [1, 3]


def test_keep_last_counts_each_branch(repo: Repository, save: Save) -> None:
    for _ in range(3):
        save()
    for _ in range(3):
        save(branch="side")
    assert repo.expire(keep_last=2).expired == (1, 4)
    assert repo.expire(keep_last=1, branch="side").expired == (5,)
    with pytest.raises(NotFoundError, match=r"'sied'.*'side'"):
        repo.expire(keep_last=1, branch="sied")


def test_keep_since_takes_times_and_spans(repo: Repository, save: Save) -> None:
    save()
    middle = datetime.now(UTC)
    save()
    save()
    assert repo.expire(keep_since=middle, dry_run=True).expired == (1,)
    assert repo.expire(keep_since="1h", dry_run=True).expired == ()
    assert repo.expire(keep_since="0s", dry_run=True).expired == (1, 2)
    assert repo.expire(keep_since="100000d", dry_run=True).expired == ()
    with pytest.raises(InvalidInputError, match="longer than 100,000 days"):
        repo.expire(keep_since="100001d")


def test_an_expired_version_resolves_to_when_it_expired(repo: Repository, save: Save) -> None:
    for step in range(4):
        save(step=step)
    repo.expire(keep_last=1, keep_every=3)
    assert numbers(repo) == [1, 4]
    for ref in (2, "v3", "main~1"):
        with pytest.raises(NotFoundError, match="expired on"):
            repo.show(ref)
    with pytest.raises(NotFoundError, match="step"):
        repo.show("main@step=2")
    with pytest.raises(NotFoundError, match="expired on"):
        repo.tag("back", 2)
    assert repo.show("main~3").number == 1  # parents still lead through it
    assert [v.number for v in repo.log("main")] == [4, 1]
    assert [v.number for v in repo.log("main", limit=2)] == [4, 1]
    assert repo.show(4).parent == 3
    assert {row.version for row in repo.sql("SELECT version FROM entries")} == {1, 4}


def test_verdicts_are_on_the_versions_that_there_were(repo: Repository, save: Save) -> None:
    for loss in (3.0, 1.0, 2.0, 4.0):
        save(metrics={"{branch}": loss})
    rules = {"keep_best": ("{branch}", 1), "keep_last": 2}
    looked = repo.expire(**rules, dry_run=True)  # type: ignore[arg-type]
    report = repo.expire(**rules)  # type: ignore[arg-type]
    save(metrics={"{branch}": 0.0})
    kept = {2: ("best 1 by {branch}",), 3: ("last 2 of main",), 4: ("newest", "last 2 of main")}
    assert {v.version.number: v.kept_by for v in report.verdicts} == {1: (), **kept}
    assert report.verdicts[0].version.metrics == {"{branch}": 3.0}  # its row is kept
    assert (report.expired, report.kept) == ((1,), (2, 3, 4))
    assert looked.kept == (2, 3, 4)
    assert repr(report) == "ExpireReport(expired=(1,), dry_run=False)"


def test_steps_that_are_not_known_are_no_multiple(repo: Repository, save: Save) -> None:
    for step in (None, 0, 3, None):
        save(step=step)
    assert repo.expire(keep_every=1, dry_run=True).expired == (1,)
    assert repo.expire(keep_every=2**70, keep_last=2**70, dry_run=True).expired == ()
    assert repo.expire(keep_every=2**70, dry_run=True).expired == (1, 3)


def test_many_versions_expire_in_slices_and_the_rest_at_the_next_call(
    repo: Repository, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(8):
        save(step=step)
    monkeypatch.setattr(module, "SLICE", 2)
    monkeypatch.setattr(module, "_GLANCE", 1)
    assert repo.expire(keep_last=1, dry_run=True).expired == (1, 2, 3, 4, 5, 6, 7)
    slices = []

    def interrupted(*args: Any, **options: Any) -> list[int]:
        if slices:
            raise KeyboardInterrupt
        slices.append(expire_slice(*args, **options))
        return slices[0]

    with monkeypatch.context() as patch:
        patch.setattr(module, "expire_slice", interrupted)
        with pytest.raises(KeyboardInterrupt):
            repo.expire(keep_last=1)
    assert len(slices[0]) == 2
    left = tuple(set(range(1, 8)) - set(slices[0]))
    assert repo.expire(keep_last=1).expired == left
    assert numbers(repo) == [8]
    assert [operation.kind for operation in repo.operations(limit=4)] == ["expire"] * 4


def test_nobody_is_waited_for_where_nothing_expires(
    repo: Repository, save: Save, place: Place
) -> None:
    save()
    save()
    with place.open() as rival, rival.catalog.database.write() as connection:
        lock_repository(connection)
        assert repo.expire(keep_last=1, dry_run=True).expired == (1,)
        assert repo.expire(keep_last=2).expired == ()


MEANINGLESS: list[dict[str, object]] = [
    {},
    {"keep_last": 0},
    {"keep_last": True},
    {"keep_every": -1},
    {"keep_best": ("loss", 0)},
    {"keep_best": ("loss", 1, "least")},
    {"keep_best": "loss"},
    {"keep_since": "soon"},
    {"keep_since": datetime(2026, 1, 1)},  # of which zone?
    {"keep_since": timedelta(days=-1)},
    {"keep_since": "99999999d"},  # before there was time
    {"keep_since": "9999999999999999w"},
    {"keep_since": timedelta.max},
    {"keep_since": datetime.min.replace(tzinfo=timezone(timedelta(hours=9)))},
    {"keep_since": 7},
]


def test_rules_that_cannot_be_meant_change_nothing(
    repo: Repository, save: Save, subtests: pytest.Subtests
) -> None:
    save()
    save()
    for rules in MEANINGLESS:
        with subtests.test(rules=rules):
            with pytest.raises(InvalidInputError):
                repo.expire(**rules)  # type: ignore[arg-type]
            assert numbers(repo) == [1, 2]


def test_a_metric_that_no_version_has_expires_nothing(repo: Repository, save: Save) -> None:
    save(metrics={"val_loss": 1.0})
    save(metrics={"val_loss": 2.0})
    with pytest.raises(NotFoundError, match="'val_loss'"):
        repo.expire(keep_best=("val_los", 1))
    assert numbers(repo) == [1, 2]


def test_a_save_with_retention_expires_older_versions_of_its_branch(
    repo: Repository, save: Save
) -> None:
    save(branch="side")
    save(branch="side")
    for _ in range(4):
        save(retention=Retention(keep_last=2))
    assert numbers(repo) == [1, 2, 5, 6]


def test_retention_that_fails_leaves_the_save(
    repo: Repository, save: Save, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        version = save(retention=Retention(keep_best=("loss", 1)))
    assert repo.show() == version
    assert "no metric 'loss'" in caplog.text
    with pytest.raises(InvalidInputError, match="no rule"):
        dcpstore.Retention()


def test_a_mistake_of_ours_in_retention_leaves_the_save(
    repo: Repository, save: Save, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OverflowError("date value out of range")

    monkeypatch.setattr("dcpstore.catalog.maintenance.retention.expire", fail)
    with caplog.at_level(logging.WARNING):
        version = save(retention=Retention(keep_last=1))
    assert repo.show() == version
    assert "nothing expired after the save to 'main'" in caplog.text
    assert "date value out of range" in caplog.text


def test_retention_that_is_none_is_refused_before_anything_is_saved(
    repo: Repository, save: Save
) -> None:
    for retention in ({"keep_last": 1}, "7d", 5):
        with pytest.raises(InvalidInputError, match="is not a set of rules"):
            save(retention=retention)
    assert repo.log() == []
    assert repo.sql("SELECT count(*) AS n FROM version")[0].n == 0
