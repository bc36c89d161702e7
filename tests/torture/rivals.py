"""Rivals: many processes on one repository at once; each gets what it asks for, or is told why.

Afterwards every version loads, bit for bit, the refs are what the operations say (a catalog rebuilt
from the journal has the same), and gc leaves what the catalog names.
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import torch

import dcpstore
from dcpstore import AlreadyExistsError, ConflictError, InvalidInputError, NotFoundError, Repository
from dcpstore.catalog.location import locate
from dcpstore.catalog.schema.lifecycle import upgrade_schema
from dcpstore.maintenance.rebuild import rebuild
from dcpstore.repository import make
from tests.soundness import assert_sound
from tests.torture.children import start
from tests.torture.kinds import DATABASES, Dialect, Ground, Outcome, Verdict
from tests.torture.newer import NEWEST, TODAY, go_back, newer_schema
from tests.torture.operations import (
    OLDER,
    check_folder,
    check_versions,
    empty,
    kept_versions,
    save,
    three_versions,
    upgrade_kept,
)
from tests.torture.sites import Mould, Site, state

__all__ = ["Rivals", "kinds"]

SAVES = 4  # by each trainer
ROUNDS = 4  # in the long form
Work = Callable[[Site, int], Any]
# What a rival may be told where another was faster; each says what to do.
TOLD = (AlreadyExistsError, ConflictError, InvalidInputError, NotFoundError)


@dataclass(frozen=True)
class Contest:
    """What rivals do at the same time, on which repository, and what must come of it."""

    name: str
    prepare: Callable[[Site], None]
    rivals: Sequence[Work]
    judge: Callable[[Site, list[Any]], None]


class Rivals:
    """One contest, again and again."""

    def __init__(self, ground: Ground, contest: Contest, dialect: Dialect) -> None:
        self._ground, self._contest, self._dialect = ground, contest, dialect
        self.name = f"rivals: {contest.name}, {dialect}"

    def points(self) -> Sequence[int]:
        """Return the rounds."""
        return range(ROUNDS if self._ground.long else 1)

    def try_point(self, point: int) -> Outcome:
        """Let the rivals work at once, and judge."""
        mould = Mould(self._ground, self._dialect, self._contest.prepare)
        site = mould.copy()
        children = [
            start(_compete, work, site, 100 * (rank + 1) + 10 * point)
            for rank, work in enumerate(self._contest.rivals)
        ]
        replies = []
        for rank, child in enumerate(children):
            ended = child.end()
            if ended.hung:
                return Outcome(Verdict.HUNG, f"rival {rank} waits")
            if ended.error or ended.code:
                return Outcome(Verdict.LOST, f"rival {rank}: {ended.code} {ended.error[-1500:]}")
            replies.append(ended.value)
        judged = start(_judge, self._contest.judge, site, replies).end()
        if judged.hung:
            return Outcome(Verdict.HUNG, "the look afterwards waits")
        if judged.error or judged.code:
            return Outcome(Verdict.LOST, f"{replies} {judged.error[-1500:]}")
        mould.discard(site)
        return Outcome(Verdict.SURVIVED)


def kinds(ground: Ground) -> Iterator[Rivals]:
    """Yield every contest on both databases; in the short form, some."""
    for contest in CONTESTS:
        for dialect in DATABASES:
            if contest.name == "sqlite busy" and dialect != "sqlite":
                continue
            if ground.long or (contest.name, dialect) in SHORT:
                yield Rivals(ground, contest, dialect)


def _compete(work: Work, site: Site, seed: int) -> Any:
    torch.set_num_threads(1)
    return work(site, seed)


def _judge(judge: Callable[[Site, list[Any]], None], site: Site, replies: list[Any]) -> None:
    torch.set_num_threads(1)
    judge(site, replies)
    with site.open() as repo:
        check_versions(repo)
        for _ in range(2):
            repo.gc(grace="0s", lease="0s")
        check_folder(repo)
        check_versions(repo)
        assert_sound(repo)
        rebuild(site.data, site.root / "again")
        with dcpstore.open(site.root / "again", create=False) as again:
            assert _named(again) == _named(repo)


def _named(repo: Repository) -> tuple[Any, ...]:
    refs = sorted((r.name, r.kind, r.version) for r in (*repo.tags(), *repo.branches()))
    return refs, [(v.number, v.uid, v.parent, v.branch) for v in repo.log()]


# OpenRequest


def open_new(site: Site, seed: int) -> str:
    with site.open(create=True) as repo:
        return repo.about.uid


def judge_one(site: Site, replies: list[Any]) -> None:
    assert len(set(replies)) == 1, replies
    save(site, 1)


def init(site: Site, seed: int) -> str:
    try:
        data = site.data if site.on_postgres else None
        with make(site.target, data=data, chunk=None) as repo:
            return repo.about.uid
    except AlreadyExistsError:
        return ""


def judge_one_winner(site: Site, replies: list[Any]) -> None:
    (winner,) = filter(None, replies)
    with site.open() as repo:
        assert repo.about.uid == winner
    save(site, 1)


def upgrade(site: Site, seed: int) -> str:
    with newer_schema():
        return upgrade_schema(locate(site.target)[0])[0]


def judge_one_upgrade(site: Site, replies: list[Any]) -> None:
    assert sorted(replies) == [TODAY, *[NEWEST] * (len(replies) - 1)]
    go_back(locate(site.target)[0])


def judge_one_upgrade_kept(site: Site, replies: list[Any]) -> None:
    assert sorted(replies) == [OLDER, *[TODAY] * (len(replies) - 1)]


# Training


def train(site: Site, seed: int, *, branch: str = "main", is_tagged: bool = True) -> list[int]:
    with site.open() as repo:
        return [
            train_step(repo, number, branch=branch, tags=[f"s{number}"] if is_tagged else [])
            for number in range(seed, seed + SAVES)
        ]


def train_step(repo: Repository, number: int, *, branch: str, tags: list[str]) -> int:
    """Save, and again where gc took what the save meant to reuse, as the error says."""
    loss = {"loss": number / 2}
    for _ in range(9):
        with suppress(ConflictError):
            return dcpstore.save(
                state(number), repo, branch=branch, step=number, tags=tags, metrics=loss
            ).number
    raise AssertionError("nine saves in a row were refused")


def train_apart(site: Site, seed: int) -> list[int]:
    return train(site, seed, branch=f"b{seed // 100}")


def train_untagged(site: Site, seed: int) -> list[int]:
    return train(site, seed, is_tagged=False)


def judge_line(site: Site, replies: list[Any]) -> None:
    numbers = sorted(number for told in filter(None, replies) for number in told)
    assert numbers == list(range(4, 4 + SAVES * sum(map(bool, replies))))
    with site.open() as repo:
        assert [v.parent for v in repo.log("main")] == [*range(numbers[-1] - 1, 0, -1), None]
        assert repo.show("main").number == numbers[-1]


def judge_lines(site: Site, replies: list[Any]) -> None:
    with site.open() as repo:
        for rank, numbers in enumerate(replies):
            branch = f"b{rank + 1}"
            assert [v.number for v in repo.log(branch)] == numbers[::-1]
        assert repo.show("main").number == 3


# Naming


def rename(site: Site, seed: int) -> int:
    """Do to a few names whatever chance says, as others do; return how often it was done."""
    chance = random.Random(seed)
    count = 0
    with site.open() as repo:
        for _ in range(20):
            with suppress(*TOLD):
                rename_once(repo, chance)
                count += 1
    return count


def rename_once(repo: Repository, chance: random.Random) -> None:
    name, version = chance.choice("xyz"), chance.randint(1, 3)
    match chance.randrange(8):
        case 0:
            repo.tag(name, version)
        case 1:
            repo.delete_tag(name)
        case 2:
            repo.branch(f"b{name}", at=version)
        case 3:
            repo.rollback(version, branch=f"b{name}", force=True)
        case 4:
            repo.delete_branch(f"b{name}")
        case 5:
            repo.tag(name, version, move=True)
        case 6:
            repo.forget(version, force=chance.random() < 0.5)
        case _:
            repo.undo()


def judge_names(site: Site, replies: list[Any]) -> None:
    assert min(replies) > 0, replies


# Keeping in order


def collect(site: Site, seed: int) -> int:
    deleted = 0
    with site.open() as repo:
        for _ in range(SAVES):
            repo.expire(keep_last=2)
            try:
                deleted += len(repo.gc(grace="3s").deleted)
            except InvalidInputError:  # a save takes longer than that
                time.sleep(0.5)
    return deleted


def look(site: Site, seed: int) -> list[Any]:
    damaged: list[Any] = []
    with site.open() as repo:
        for _ in range(SAVES):
            damaged += repo.verify(deep=True).damaged
    return damaged


def copy(site: Site, seed: int) -> int:
    with (
        site.open() as repo,
        dcpstore.open(site.root.parent / f"copy-{seed}") as other,
    ):
        for _ in range(SAVES):
            with suppress(NotFoundError):  # a version expires while it is copied
                repo.copy_to(other)
        check_versions(other)
        assert_sound(other)
        return len(other.log())


def judge_crowd(site: Site, replies: list[Any]) -> None:
    assert replies[3] == [], replies[3]  # nothing was damaged while others worked
    with site.open() as repo:
        numbers = [*replies[0], *replies[1]]
        assert repo.show("main").number == max(numbers) == 3 + len(numbers)


# Waiting


def hold(site: Site, seed: int) -> None:
    """Hold SQLite's write lock for two seconds, as a slow writer does."""
    with closing(sqlite3.connect(site.data / "catalog.db", isolation_level=None)) as held:
        held.execute("BEGIN IMMEDIATE")
        time.sleep(2)
        held.execute("ROLLBACK")


CONTESTS = [
    Contest("open a new repository", empty, [open_new] * 8, judge_one),
    Contest("init", empty, [init] * 4, judge_one_winner),
    Contest("upgrade", three_versions, [upgrade] * 4, judge_one_upgrade),
    Contest(f"upgrade of {OLDER}", kept_versions, [upgrade_kept] * 4, judge_one_upgrade_kept),
    Contest("trainers on one branch", three_versions, [train] * 3, judge_line),
    Contest("trainers on many branches", three_versions, [train_apart] * 3, judge_lines),
    Contest("names", three_versions, [rename] * 4, judge_names),
    Contest(
        "upkeep against saves",
        three_versions,
        [train_untagged, train_untagged, collect, look, copy],
        judge_crowd,
    ),
    Contest("sqlite busy", three_versions, [hold, train], judge_line),
]
SHORT = {
    ("open a new repository", "sqlite"),
    ("init", "postgres"),
    ("names", "sqlite"),
}
