"""Rollback, deletion and undo: what moves, what comes back, and what is refused unchanged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dcpstore
from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.db.url import sqlite_url
from dcpstore.catalog.read.ref_lookup import list_refs
from dcpstore.catalog.write.refs import delete_ref, make_ref, roll_back
from dcpstore.catalog.write.undo import undo_last
from dcpstore.core.uids import new_uid
from dcpstore.errors import AlreadyExistsError, ConflictError, InvalidInputError, NotFoundError
from dcpstore.maintenance.rebuild import rebuild
from dcpstore.records import RefRecord
from dcpstore.repository import Repository
from tests.cli.history import save_version
from tests.soundness import Place


def refs(repo: Repository) -> dict[str, int]:
    return {ref.name: ref.version for ref in (*repo.tags(), *repo.branches())}


def save(repo: Repository, value: float, **fields: Any) -> None:
    dcpstore.save({"w": torch.full((3,), value)}, repo, **fields)


def everything(repo: Repository) -> tuple[Any, ...]:
    return refs(repo), repo.operations(), repo.log()


@contextmanager
def rebuilt(place: Place) -> Iterator[Repository]:
    """Yield a repository whose catalog was made again from the data folder of another."""
    url = sqlite_url(f"{place.data}-{new_uid()}.db")
    assert rebuild(place.data, url).problems == ()
    with dcpstore.open(url, create=False) as again:
        yield again


def test_a_rollback_moves_the_branch_and_the_next_save_goes_on_from_there(
    repo: Repository,
) -> None:
    for i in range(3):
        save(repo, i)
    assert repo.rollback("v1").version == 1
    assert refs(repo) == {"main": 1}
    save(repo, 9)
    assert repo.show("main").parent == 1
    assert [v.number for v in repo.log("main")] == [4, 1]
    assert [v.number for v in repo.log()] == [4, 3, 2, 1]
    operation = repo.operations()[1]
    assert (operation.kind, operation.target, operation.old, operation.new) == (
        "rollback",
        "main",
        3,
        1,
    )
    before = repo.operations()
    assert repo.rollback("main").version == 4  # where it is already
    assert repo.operations() == before


def test_a_rollback_to_a_non_ancestor_needs_force(repo: Repository) -> None:
    save(repo, 1)
    save(repo, 2)
    save(repo, 3, branch="try", parent="v1")
    before = everything(repo)
    for branch, ref in (("main", "try"), ("try", "v2"), ("try", "main")):
        with pytest.raises(InvalidInputError, match=r"not an ancestor of .*force=True"):
            repo.rollback(ref, branch=branch)
    with pytest.raises(NotFoundError, match=r"no branch 'mian'\. Did you mean 'main'"):
        repo.rollback("v1", branch="mian")
    with pytest.raises(NotFoundError, match="no version v9"):
        repo.rollback("v9")
    with pytest.raises(ConflictError, match="is at v2, not at v1"):
        repo.rollback("v1", expect_tip="v1")
    assert everything(repo) == before
    assert repo.rollback("try", force=True, expect_tip="v2").version == 3
    assert refs(repo) == {"main": 3, "try": 3}


def test_deleted_names_come_back(repo: Repository) -> None:
    save(repo, 1, tags=["best"])
    save(repo, 2, branch="try")
    repo.tag("kept", "v1")
    assert repo.delete_tag("best").version == 1
    assert repo.delete_branch("try", expect="v2").version == 2
    assert refs(repo) == {"main": 1, "kept": 1}
    with pytest.raises(NotFoundError, match="no branch or tag 'best'"):
        repo.show("best")
    repo.undo()
    repo.undo()
    assert refs(repo) == {"main": 1, "kept": 1, "try": 2, "best": 1}
    assert {tag.name for tag in repo.tags()} == {"kept", "best"}
    before = everything(repo)
    for call, error in (
        (lambda: repo.delete_tag("bset"), NotFoundError),
        (lambda: repo.delete_tag("main"), NotFoundError),
        (lambda: repo.delete_branch("best"), NotFoundError),
        (lambda: repo.delete_tag("best", expect="v2"), ConflictError),
    ):
        with pytest.raises(error):
            call()
    assert everything(repo) == before


def test_a_tag_moves_in_one_operation_and_back(repo: Repository, place: Place) -> None:
    save(repo, 0, tags=["best"])
    save(repo, 1)
    save(repo, 2)
    with pytest.raises(AlreadyExistsError, match=r"tag of v1\. .*'dcpstore tag best REF --move'"):
        repo.tag("best", 2)
    with pytest.raises(AlreadyExistsError, match="--move"):
        save(repo, 3, tags=["best"])
    with pytest.raises(AlreadyExistsError, match=r"branch of v3\. Choose another name\.$"):
        repo.tag("main", 1, move=True)
    assert repo.tag("best", "main~1", move=True) == RefRecord("best", "tag", 2)
    (moved,) = repo.operations(limit=1)
    assert (moved.kind, moved.target, moved.old, moved.new) == ("tag", "best", 1, 2)
    assert repo.tag("best", 2, move=True).version == 2  # where it is already
    assert repo.operations(limit=1) == [moved]
    assert repo.tag("new", 1, move=True).version == 1  # where there is none
    with rebuilt(place) as again:
        assert refs(again) == refs(repo) == {"best": 2, "main": 3, "new": 1}
    repo.undo(expect=moved.number + 1)
    undone = repo.undo(expect=moved.number)
    assert (undone.target, undone.old, undone.new) == ("best", 2, 1)
    with rebuilt(place) as again:
        assert refs(again) == refs(repo) == {"best": 1, "main": 3}


def test_the_version_that_a_tag_left_may_expire_and_the_tag_does_not_go_back(
    repo: Repository,
) -> None:
    for i in range(3):
        save(repo, i, tags=["best"] if i == 0 else [])
    assert repo.expire(keep_last=2).expired == ()
    repo.tag("best", 2, move=True)
    assert repo.expire(keep_last=2).expired == (1,)
    moved = repo.operations(limit=2)[1].number  # the last but the expire
    with pytest.raises(NotFoundError, match="back to v1, which was expired"):
        repo.undo(expect=moved)
    assert refs(repo) == {"best": 2, "main": 3}


def test_the_undo_of_a_save_takes_its_tags_and_keeps_its_version(repo: Repository) -> None:
    save(repo, 1, tags=["a"])
    save(repo, 2, tags=["b", "c"])
    repo.tag("later", "v2")
    assert repo.undo().target == "later"
    done = repo.undo()
    assert (done.kind, done.target, done.old, done.new) == ("undo", "main", 2, 1)
    assert refs(repo) == {"main": 1, "a": 1}
    assert [v.number for v in repo.log()] == [2, 1]
    repo.undo()
    assert refs(repo) == {}
    with pytest.raises(InvalidInputError, match="nothing is left to undo"):
        repo.undo()
    repo.branch("main", at="v2")
    assert refs(repo) == {"main": 2}


def test_undo_skips_what_is_undone(repo: Repository) -> None:
    for i in range(4):
        save(repo, i)
    repo.rollback("v2")
    repo.undo()
    assert refs(repo) == {"main": 4}
    repo.undo()
    assert refs(repo) == {"main": 3}
    save(repo, 9)
    assert repo.show("main").parent == 3
    repo.undo()
    repo.undo()
    assert refs(repo) == {"main": 2}
    last = repo.operations()[0]
    before = everything(repo)
    with pytest.raises(ConflictError, match="not 4 as was expected"):
        repo.undo(expect=4)
    assert everything(repo) == before
    assert last.kind == "undo"


def test_undo_past_an_expired_version_changes_nothing(repo: Repository) -> None:
    for i in range(3):
        save(repo, i)
    repo.expire(keep_last=1)
    before = refs(repo), repo.operations()
    with pytest.raises(NotFoundError, match=r"would go back to v2, which was expired on"):
        repo.undo(expect=4)
    assert (refs(repo), repo.operations()) == before


def test_an_expire_is_not_passed_over_unasked(repo: Repository, place: Place) -> None:
    for i in range(3):
        save(repo, i)
    repo.tag("precious", 3)
    repo.tag("other", 3)
    repo.expire(keep_last=1)
    before = refs(repo), repo.operations()
    message = (
        r"the last operation, expire \(operation 7\), cannot be undone\. To undo the one before it "
        r"\(tag 'other', operation 6\), run 'dcpstore undo --expect 6'"
    )
    for expect in (None, 7):
        with pytest.raises(ConflictError, match=message):
            repo.undo(expect=expect)
    with pytest.raises(ConflictError, match="that is not undone is 6 "):
        repo.undo(expect=5)
    with rebuilt(place) as again, pytest.raises(ConflictError, match=message):
        undo_last(again.catalog, expect=None, author="")
    assert (refs(repo), repo.operations()) == before
    assert repo.undo(expect=6).target == "other"
    assert repo.undo().target == "precious"  # past the expire already: the next one before
    repo.expire(keep_last=1)  # expires nothing, so it is not an operation
    repo.tag("late", 3)
    assert repo.undo().target == "late"
    assert refs(repo) == {"main": 3}


def test_an_expire_with_nothing_before_it_leaves_nothing_to_undo(repo: Repository) -> None:
    save(repo, 0)
    save(repo, 1)
    repo.undo()
    repo.undo()
    assert repo.expire(keep_last=1).expired == (1,)
    with pytest.raises(InvalidInputError, match=r"nothing is left to undo: expire \(operation 6\)"):
        repo.undo()


def test_the_copy_of_a_version_is_not_passed_over_unasked(repo: Repository, tmp_path: Path) -> None:
    save(repo, 0)
    repo.tag("mine", 1)
    with dcpstore.open(tmp_path / "other") as other:
        dcpstore.save({"w": torch.zeros(3)}, other)
        other.copy_to(repo, ["v1"])
    with pytest.raises(ConflictError, match=r"copy \(operation 4\), .*\(tag 'mine', operation 3\)"):
        repo.undo()
    assert refs(repo) == {"main": 1, "mine": 1}
    assert repo.undo(expect=3).target == "mine"


def test_a_gc_is_passed_over(repo: Repository) -> None:
    save(repo, 0)
    save(repo, 1)
    repo.expire(keep_last=1)
    repo.tag("late", 2)
    repo.gc()
    assert repo.operations(limit=1)[0].kind == "gc"
    assert repo.undo().target == "late"
    with pytest.raises(ConflictError, match="expire"):
        repo.undo()


def test_a_ref_that_another_operation_moved_is_not_undone(repo: Repository) -> None:
    save(repo, 1)
    repo.tag("t", "v1")
    # As an older program would: without an operation.
    with repo.catalog.database.write() as connection:
        connection.exec_driver_sql("DELETE FROM ref WHERE name = 't'")
    before = everything(repo)
    with pytest.raises(ConflictError, match=r"'t' is deleted, not where"):
        repo.undo()
    assert everything(repo) == before


def test_metrics_and_labels_come_later(repo: Repository) -> None:
    save(repo, 1, metrics={"loss": 2.0}, labels={"lr": "1"})
    version = repo.add_metrics("main", {"accuracy": 0.5, "loss": 2.0, "odd": float("nan")})
    assert (version.metrics["accuracy"], len(version.metrics)) == (0.5, 3)
    assert repo.add_metrics(None, {"odd": float("nan")}).metrics.keys() == version.metrics.keys()
    assert repo.add_labels("v1", {"data": "größer"}).labels == {"lr": "1", "data": "größer"}
    assert [v.number for v in repo.log(labels={"data": "größer"})] == [1]
    before = repo.show("v1"), repo.operations()
    for call, error in (
        (lambda: repo.add_metrics("v1", {"new": 1.0, "loss": 2.5}), AlreadyExistsError),
        (lambda: repo.add_labels("v1", {"lr": "2"}), AlreadyExistsError),
        (lambda: repo.add_metrics("v1", {"x": "high"}), InvalidInputError),  # type: ignore[dict-item]
        (lambda: repo.add_labels("v1", {"x": "\0"}), InvalidInputError),
        (lambda: repo.add_labels("v1", {"\ud800": "x"}), InvalidInputError),
        (lambda: repo.add_labels("v2", {"x": "y"}), NotFoundError),
    ):
        with pytest.raises(error):
            call()
    assert repo.operations() == before[1]
    repo.undo()
    assert repo.show("v1").labels == {"lr": "1"}
    assert repo.log(labels={"data": "größer"}) == []
    repo.undo()
    assert repo.show("v1").metrics == {"loss": 2.0}
    assert repo.tags() == []


def test_metrics_and_labels_of_any_library_are_taken_as_a_save_takes_them(
    repo: Repository,
) -> None:
    dcpstore.save({"a": 1}, repo, step=np.int64(7), labels={"n": 5})
    assert (repo.show("v1").step, repo.show("v1").labels) == (7, {"n": "5"})
    assert repo.add_labels("v1", {"m": 6}).labels == {"n": "5", "m": "6"}
    assert [v.number for v in repo.log(labels={"n": 5})] == [1]
    given = {"t": torch.tensor(0.5), "f": np.float32(2)}
    assert repo.add_metrics("v1", given).metrics == {"t": 0.5, "f": 2.0}


def test_labels_may_be_longer_than_an_index_takes(repo: Repository) -> None:
    long = "größer" * 5_000
    save(repo, 1, labels={"note": long + "a"})
    save(repo, 2, labels={"note": long + "b"})
    for number, end in ((1, "a"), (2, "b")):
        assert [v.number for v in repo.log(labels={"note": long + end})] == [number]
    assert repo.log(labels={"note": long}) == []


def test_labels_that_no_database_holds_are_refused_at_the_save(repo: Repository) -> None:
    for labels in ({"x": "a\0b"}, {"\ud800": "x"}):
        with pytest.raises(InvalidInputError, match="label"):
            save(repo, 1, labels=labels)
    assert repo.log() == []


def test_a_rebuilt_catalog_has_undone_what_was_undone(repo: Repository, place: Place) -> None:
    save(repo, 1, tags=["a"], metrics={"loss": 1.0})
    save(repo, 2, tags=["b"])
    repo.add_metrics("v1", {"late": 1.0})
    repo.add_labels("v1", {"late": "x"})
    repo.undo()
    repo.undo()
    repo.add_metrics("v1", {"later": 2.0})
    repo.delete_tag("a")
    repo.undo()
    repo.rollback("v1")
    before = refs(repo), repo.log(), repo.operations()
    with rebuilt(place) as again:
        assert (refs(again), again.log(), again.operations()) == before
        undo_last(again.catalog, expect=None, author="")  # past the journal, which both share
        assert refs(again)["main"] == 2


def test_a_user_without_a_name_may_change_everything(
    repo: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # as 'docker run --user 54321' has it
    for i in range(3):
        save(repo, i)
    repo.tag("a", 1)
    repo.branch("b", at=2)
    repo.delete_tag("a")
    repo.undo()
    repo.add_metrics(1, {"late": 1.0})
    repo.add_labels(1, {"late": "x"})
    repo.rollback("main~1")
    repo.tag("c", 2)
    repo.delete_branch("main")
    repo.expire(keep_tagged=True)
    repo.gc(grace="0s")
    done = [operation for operation in repo.operations() if operation.kind != "init"]
    assert {operation.author for operation in done} == {"54321"}
    with dcpstore.open(tmp_path / "other") as other:
        assert len(repo.copy_to(other).copied) == len(repo.log())


def test_names_of_nothing_are_refused(repo: Repository) -> None:
    save(repo, 1)
    before = everything(repo)
    for call in (
        lambda: repo.delete_tag(None),  # type: ignore[arg-type]
        lambda: repo.delete_branch(1),  # type: ignore[arg-type]
        lambda: repo.rollback("v1", branch=None),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidInputError, match="not the name of a branch"):
            call()
    with pytest.raises(InvalidInputError, match="expect is '2'; give the number"):
        repo.undo(expect="2")  # type: ignore[arg-type]
    for limit in (-1, 2**70, True, "3"):
        with pytest.raises(InvalidInputError, match="limit is"):
            repo.operations(limit=limit)  # type: ignore[arg-type]
    assert everything(repo) == before
    assert repo.operations(limit=0) == []
    assert len(repo.operations(limit=2**63 - 1)) == len(before[1])


steps = st.lists(
    st.one_of(
        st.tuples(st.just("save"), st.sampled_from(["main", "try"]), st.booleans()),
        st.tuples(st.just("rollback"), st.integers(1, 6)),
        st.tuples(st.just("tag"), st.sampled_from("abc"), st.integers(1, 6), st.booleans()),
        st.tuples(st.just("delete"), st.sampled_from(["a", "b", "c", "main", "try"])),
        st.tuples(st.just("undo")),
    ),
    max_size=14,
)


@settings(deadline=None, max_examples=40)
@given(steps)
def test_undo_returns_to_every_state_before(
    tmp_path_factory: pytest.TempPathFactory, taken: list[tuple[Any, ...]]
) -> None:
    """Whatever was done, undoing it all passes through the same refs backwards."""
    url = sqlite_url(tmp_path_factory.mktemp("undo") / "catalog.db")
    with Catalog.make(url, data_url="file:///none") as catalog:

        def named() -> dict[str, tuple[str, int]]:
            return {ref.name: (ref.kind, ref.version) for ref in list_refs(catalog)}

        states = [named()]
        versions = 0
        for step in taken:
            before = named()
            try:
                match step:
                    case ("save", branch, tagged):
                        tags = (f"t{versions}",) if tagged else ()
                        save_version(catalog, versions + 1, branch=branch, tags=tags)
                        versions += 1
                    case ("rollback", number):
                        roll_back(catalog, "main", number, force=True, expect_tip=None, author="")
                    case ("tag", name, number, move):
                        make_ref(catalog, name, "tag", version=number, author="", move=move)
                    case ("delete", name):
                        kind = "branch" if len(name) > 1 else "tag"
                        delete_ref(catalog, name, kind, expect=None, author="")
                    case _:
                        undo_last(catalog, expect=None, author="")
                        assert named() == states[-2]
                        states.pop()
                        continue
            except (NotFoundError, AlreadyExistsError, InvalidInputError):
                assert named() == before
                continue
            if named() != before:
                states.append(named())
        while len(states) > 1:
            undo_last(catalog, expect=None, author="")
            states.pop()
            assert named() == states[-1]
        with pytest.raises(InvalidInputError, match="nothing is left"):
            undo_last(catalog, expect=None, author="")
