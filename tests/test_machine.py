"""A repository driven at random against a plain dict, on both databases; sound after every step."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import dcpstore
from dcpstore import ConflictError, InvalidInputError, NotFoundError, Repository
from dcpstore.catalog.schema.views import VIEWS
from dcpstore.maintenance.rebuild import rebuild
from tests.soundness import Place, assert_sound

Refs = dict[str, tuple[str, int]]  # kind and version, by name
BRANCHES = st.sampled_from(["main", "side"])
TAGS = st.sampled_from(["a", "b", "c"])
PICK = st.integers(0, 99)  # one of however many there are


@dataclass
class Saved:
    """What the model knows of a version."""

    branch: str
    parent: int | None
    state: dict[str, int]
    expired: bool = False
    may_come_back: bool = False  # forgotten, and gc did not run since


@dataclass
class Model:
    """The repository as a plain dict; `before` is what each operation to undo changed.

    That is the refs as they were, and the versions that it forgot. An expire that cannot be undone
    is None.
    """

    versions: dict[int, Saved] = field(default_factory=dict)
    refs: Refs = field(default_factory=dict)
    before: list[tuple[Refs, list[int]] | None] = field(default_factory=list)

    @property
    def live(self) -> list[int]:
        return [number for number, saved in self.versions.items() if not saved.expired]

    def of(self, kind: str) -> list[str]:
        return sorted(name for name, (found, _) in self.refs.items() if found == kind)

    def nearest_ancestor(self, number: int | None) -> int | None:
        """Return a version, or the first above it that is there."""
        while number is not None and self.versions[number].expired:
            number = self.versions[number].parent
        return number

    def keep(self, count: int) -> set[int]:
        """Return what stays where so many newest of each branch are kept."""
        kept = {number for _, number in self.refs.values()} | {max(self.live)}
        for branch in ("main", "side"):
            kept |= set([n for n in self.live if self.versions[n].branch == branch][-count:])
        return kept


class Machine(RuleBasedStateMachine):
    """Every rule does the same to the repository and to the model."""

    def __init__(self, place: Place, forget: Callable[[], None]) -> None:
        super().__init__()
        self.place, self.forget = place, forget
        self.model = Model()
        self.repo: Repository = place.open()

    def teardown(self) -> None:
        self.repo.close()

    def remember(self, forgotten: list[int] | None = None) -> None:
        self.model.before.append((dict(self.model.refs), forgotten or []))

    def pick(self, index: int) -> int:
        return self.model.live[index % len(self.model.live)]

    @initialize()
    def first(self) -> None:
        self.save("main", [0, 0], None)

    @rule(
        branch=BRANCHES,
        values=st.lists(st.integers(0, 3), min_size=1, max_size=3),
        tag=st.none() | TAGS,
    )
    def save(self, branch: str, values: list[int], tag: str | None) -> None:
        state = {f"w{i}": value for i, value in enumerate(values)}
        tensors = {fqn: torch.full((20 * i + 5,), v) for i, (fqn, v) in enumerate(state.items())}
        tags = [tag] if tag is not None and tag not in self.model.refs else []
        version = dcpstore.save(tensors, self.repo, branch=branch, tags=tags)
        assert version.number == len(self.model.versions) + 1
        self.remember()
        tip = self.model.refs.get(branch)
        self.model.versions[version.number] = Saved(branch, tip[1] if tip else None, state)
        self.model.refs[branch] = "branch", version.number
        self.model.refs.update(dict.fromkeys(tags, ("tag", version.number)))

    @rule(name=TAGS, index=PICK)
    def tag(self, name: str, index: int) -> None:
        if name in self.model.refs:
            with pytest.raises(dcpstore.AlreadyExistsError):
                self.repo.tag(name, self.pick(index))
            return
        self.repo.tag(name, self.pick(index))
        self.remember()
        self.model.refs[name] = "tag", self.pick(index)

    @rule(name=TAGS, index=PICK)
    def move_tag(self, name: str, index: int) -> None:
        target = self.pick(index)
        self.repo.tag(name, target, move=True)
        if self.model.refs.get(name) != ("tag", target):
            self.remember()
            self.model.refs[name] = "tag", target

    @precondition(lambda self: self.model.of("tag"))
    @rule(index=PICK)
    def delete_tag(self, index: int) -> None:
        names = self.model.of("tag")
        name = names[index % len(names)]
        self.repo.delete_tag(name)
        self.remember()
        del self.model.refs[name]

    @precondition(lambda self: "side" not in self.model.refs)
    @rule(index=PICK)
    def branch(self, index: int) -> None:
        self.repo.branch("side", at=self.pick(index))
        self.remember()
        self.model.refs["side"] = "branch", self.pick(index)

    @precondition(lambda self: "side" in self.model.refs)
    @rule()
    def delete_branch(self) -> None:
        self.repo.delete_branch("side")
        self.remember()
        del self.model.refs["side"]

    @precondition(lambda self: "main" in self.model.refs)
    @rule(index=PICK)
    def rollback(self, index: int) -> None:
        target = self.pick(index)
        self.repo.rollback(target, branch="main", force=True)
        if self.model.refs["main"][1] != target:
            self.remember()
            self.model.refs["main"] = "branch", target

    @rule()
    def undo(self) -> None:
        below = [one for one in self.model.before if one is not None]
        if not below:
            with pytest.raises(InvalidInputError, match="nothing is left"):
                self.repo.undo()
            return
        expect = None
        if self.model.before[-1] is None:
            with pytest.raises(
                ConflictError, match=r"last operation, expire .*be undone"
            ) as caught:
                self.repo.undo()
            expect = int(str(caught.value).rpartition("=")[2].rstrip(")."))
        before, forgotten = below[-1]
        versions = self.model.versions
        if not all(versions[number].may_come_back for number in forgotten):
            with pytest.raises(NotFoundError, match="gc has dropped"):
                self.repo.undo(expect=expect)
            return
        changed = {
            n for name, (_, n) in before.items() if self.model.refs.get(name, ("", 0))[1] != n
        }
        if any(versions[number].expired for number in changed.difference(forgotten)):
            with pytest.raises(NotFoundError, match="expired"):
                self.repo.undo(expect=expect)
            return
        self.repo.undo(expect=expect)
        while self.model.before.pop() is None:  # an expire that was passed over stays so
            pass
        self.model.refs = before
        for number in forgotten:
            versions[number].expired = versions[number].may_come_back = False

    @precondition(lambda self: len(self.model.live) > 1)
    @rule(
        indices=st.lists(PICK, min_size=1, max_size=2), force=st.booleans(), dry_run=st.booleans()
    )
    def forget_versions(self, indices: list[int], force: bool, dry_run: bool) -> None:
        going = sorted({self.pick(index) for index in indices})[: len(self.model.live) - 1]
        tags = [n for n, (kind, at) in self.model.refs.items() if kind == "tag" and at in going]
        if tags and not force:
            with pytest.raises(InvalidInputError, match="tagged"):
                self.repo.forget(going, dry_run=dry_run)
            return
        assert self.repo.forget(going, force=force, dry_run=dry_run).forgotten == tuple(going)
        if dry_run:
            return
        self.remember(going)
        for number in going:
            self.model.versions[number].expired = self.model.versions[number].may_come_back = True
        for name, (kind, at) in list(self.model.refs.items()):
            stays = at if kind == "tag" else self.model.nearest_ancestor(at)
            if name in tags or stays is None:
                del self.model.refs[name]
            else:
                self.model.refs[name] = kind, stays

    @rule(count=st.integers(1, 3), dry_run=st.booleans())
    def expire(self, count: int, dry_run: bool) -> None:
        kept = self.model.keep(count)
        report = self.repo.expire(keep_last=count, dry_run=dry_run)
        assert set(report.kept) == kept
        assert set(report.expired) == set(self.model.live) - kept
        if not dry_run:
            if report.expired:
                self.model.before.append(None)
            for number in report.expired:
                self.model.versions[number].expired = True

    @rule(grace=st.sampled_from(["0s", "1h"]), dry_run=st.booleans())
    def gc(self, grace: str, dry_run: bool) -> None:
        self.repo.gc(grace=grace, dry_run=dry_run)
        if not dry_run:
            for saved in self.model.versions.values():
                saved.may_come_back = False

    @rule()
    def verify(self) -> None:
        assert self.repo.verify(deep=True).damaged == ()

    @rule()
    def reopen(self) -> None:
        self.repo.close()
        self.repo = self.place.open()

    @rule()
    def lose_the_catalog(self) -> None:
        before = {name: self.repo.sql(f"SELECT * FROM {name}") for name in VIEWS}
        self.repo.close()
        self.forget()
        report = rebuild(self.place.data, self.place.url)
        assert (report.lost, report.problems) == ((), ())
        self.repo = self.place.open()
        for name, rows in before.items():
            found = self.repo.sql(f"SELECT * FROM {name}")
            assert sorted(map(repr, found)) == sorted(map(repr, rows)), name

    @invariant()
    def the_repository_is_as_the_model_says(self) -> None:
        refs = {r.name: (r.kind, r.version) for r in (*self.repo.tags(), *self.repo.branches())}
        assert refs == self.model.refs
        versions = {v.number: v for v in self.repo.log()}
        assert sorted(versions) == self.model.live
        for number, version in versions.items():
            saved = self.model.versions[number]
            assert (version.branch, version.parent) == (saved.branch, saved.parent)
            read = self.repo.read(number)
            assert {fqn: int(tensor[0]) for fqn, tensor in read.items()} == saved.state

    @invariant()
    def it_is_sound(self) -> None:
        assert_sound(self.repo)


@pytest.mark.slow_on_postgres
@pytest.mark.parametrize("runs", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_a_repository_behaves_as_a_dict(database_url: str, tmp_path: Path, runs: int) -> None:
    data = tmp_path / "data"

    def forget() -> None:
        if database_url.startswith("sqlite"):
            for file in tmp_path.glob("catalog.db*"):
                file.unlink()
            return
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")

    def machine() -> Machine:
        forget()
        shutil.rmtree(data, ignore_errors=True)
        return Machine(Place(database_url, str(data)), forget)

    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=runs,
            stateful_step_count=15,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
