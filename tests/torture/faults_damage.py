"""Damage at rest: packs, manifests and rows of the catalog that are not what they were.

A damaged repository gives out what was saved, bit for bit, or an error of ours that says what is
damaged; never other bytes. Verify finds each damage of a file.
"""

from __future__ import annotations

import contextlib
import random
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from dcpstore.catalog.maintenance.journal import write_journal
from dcpstore.errors import DcpstoreError
from dcpstore.formats.journal_entry import decode_operation
from dcpstore.repository import Repository
from tests.torture.kinds import Ground, Outcome, Verdict
from tests.torture.operations import three_versions
from tests.torture.sites import Mould, Site, state

__all__ = ["Files", "Rows", "kinds"]

How = Literal["flipped", "cut", "gone", "empty", "longer"]
PLACES = 12  # of a flipped bit in each file, in the long form
BAD = ("", "\x1b[31m", "{", "[", "[1,2,3]", "-1", str(1 << 62), "None", "9" * 30, "../../etc")
NUMBERS = (-1, 0, 7, 1 << 62)


@dataclass(frozen=True, slots=True)
class Damage:
    """What becomes of a file; `at` is the byte of which a bit is flipped, or the length kept."""

    key: str
    how: How
    at: int = 0


class Files:
    """Damage to each file of one folder of the data."""

    def __init__(self, ground: Ground, folder: str) -> None:
        self._ground, self._folder = ground, folder
        self.name = f"damage: {folder}"

    @cached_property
    def _site(self) -> Site:
        return Mould(self._ground, "sqlite", three_versions).copy()

    def points(self) -> Sequence[Damage]:
        """Return every file with every damage, a flipped bit at places of each."""
        points = []
        for file in sorted((self._site.data / self._folder).rglob("*.*")):
            key, size = str(file.relative_to(self._site.data)), file.stat().st_size
            points += [Damage(key, "gone"), Damage(key, "empty"), Damage(key, "longer")]
            places = {0, size - 1, *(random.Random(key).sample(range(size), PLACES))}
            for at in sorted(places):
                points += [Damage(key, "flipped", at), Damage(key, "cut", at)]
        return self._ground.pick(points, 5)

    def try_point(self, point: Damage) -> Outcome:
        """Damage the file, look, and mend it."""
        path = self._site.data / point.key
        whole = path.read_bytes()
        _damage(path, whole, point)
        try:
            with self._site.open() as repo:
                outcome = _look(repo)
                if self._folder == "packs" and point.how == "longer":
                    return outcome  # every chunk is where it was: a deep look finds all well
                if outcome.verdict is Verdict.SURVIVED and not repo.verify(deep=True).damaged:
                    return Outcome(Verdict.LOST, "verify found nothing")
                if self._folder == "operations":
                    write_journal(repo.catalog, repo.storage)
                    if not _same_operation(path.read_bytes(), whole):
                        return Outcome(Verdict.LOST, "the next change did not write it anew")
                return outcome
        finally:
            path.write_bytes(whole)


class Rows:
    """A wrong value in each column of each table, of those that the database itself takes."""

    name = "damage: rows of the catalog"

    def __init__(self, ground: Ground) -> None:
        self._ground = ground

    @cached_property
    def _site(self) -> Site:
        return Mould(self._ground, "sqlite", three_versions).copy()

    def points(self) -> Sequence[tuple[str, str, str | int]]:
        """Return tables and columns, each with values that do not belong there."""
        with contextlib.closing(sqlite3.connect(self._site.data / "catalog.db")) as raw:
            tables = [
                name
                for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
                if not name.startswith(("sqlite_", "alembic"))
            ]
            points = [
                (table, column[1], value)
                for table in tables
                for column in raw.execute(f"PRAGMA table_info('{table}')")
                for value in (BAD if column[2] == "TEXT" else NUMBERS)
                # What a value is, who saved it and what people call it is theirs to say.
                if (table, column[1]) not in FREE
            ]
        return self._ground.pick(points, 6)

    def try_point(self, point: tuple[str, str, str | int]) -> Outcome:
        """Write the value into one row, look, and put the file back."""
        path = self._site.data / "catalog.db"
        table, column, value = point
        with contextlib.closing(sqlite3.connect(path)) as raw:
            raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            whole = path.read_bytes()
            raw.execute("PRAGMA foreign_keys = ON")
            with contextlib.suppress(sqlite3.IntegrityError):  # the database itself refuses it
                raw.execute(
                    f'UPDATE "{table}" SET "{column}" = ? WHERE "{column}" = '
                    f'(SELECT min("{column}") FROM "{table}")',
                    [value],
                )
            raw.commit()
        try:
            with self._site.open() as repo:
                return _look(repo)
        except DcpstoreError:
            return Outcome(Verdict.SURVIVED)
        finally:
            for file in path.parent.glob("catalog.db-*"):
                file.unlink()
            path.write_bytes(whole)


FREE = {
    ("entry", "value"),
    ("entry", "fqn"),
    *(("version", column) for column in ("message", "author", "host", "branch", "step", "labels")),
    ("metric", "value"),
    ("metric", "name"),
    ("ref", "name"),
}


def kinds(ground: Ground) -> Iterator[Files | Rows]:
    """Yield the kinds of damage at rest."""
    yield Files(ground, "packs")
    yield Files(ground, "manifests")
    yield Files(ground, "operations")
    yield Rows(ground)


def _damage(path: Path, whole: bytes, point: Damage) -> None:
    flipped = bytearray(whole)
    flipped[point.at] ^= 1 << point.at % 8
    made: dict[How, bytes] = {
        "flipped": bytes(flipped),
        "cut": whole[: point.at],
        "empty": b"",
        "longer": whole + b"\0" * 17,
        "gone": b"",
    }
    path.unlink()  # no reader has it mapped any more
    if point.how != "gone":
        path.write_bytes(made[point.how])


def _same_operation(one: bytes, other: bytes) -> bool:
    # What is known of the version is said by any operation that is written with the first.
    said = [{**decode_operation(text), "version": None, "digest": ""} for text in (one, other)]
    return said[0] == said[1]


def _look(repo: Repository) -> Outcome:
    """Read all that was saved, and ask for all that was said: it is right, or an error of ours."""
    for number in (1, 2, 3):
        try:
            read = repo.read(f"v{number}")
        except DcpstoreError:
            continue
        for fqn, value in state(number).items():
            if fqn not in read:
                return Outcome(Verdict.LOST, f"v{number} came without {fqn}")
            same = torch.equal(read[fqn], value) if torch.is_tensor(value) else read[fqn] == value
            if not same:
                return Outcome(Verdict.LOST, f"{fqn} of v{number} is not what was saved")
    asked: list[Callable[[], object]] = [
        repo.log,
        repo.operations,
        repo.tags,
        lambda: repo.diff("v1", "v3"),
        repo.verify,
        lambda: repo.gc(dry_run=True),
        repo.status,
    ]
    for ask in asked:
        with contextlib.suppress(DcpstoreError):
            ask()
    return Outcome(Verdict.SURVIVED)
