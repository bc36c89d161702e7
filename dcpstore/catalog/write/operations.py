"""The append-only list of operations, and the counters that order mutations.

A transaction that raises a counter, even by 0, locks the repository's row until it ends. Invariant:
every mutation does so before it reads what it decides by. So that stays true until it commits, on
Postgres as on SQLite, and numbers have no gaps.

A change that is made often (a save, a tag) returns what it recorded, as the journal has it, so that
the journal need not read it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Generic, NamedTuple, TypeVar

from sqlalchemy import ColumnElement, Connection, Row, insert, select, update

from dcpstore.catalog.db.transactions import reads_once
from dcpstore.catalog.schema import tables
from dcpstore.catalog.validation import check_limit
from dcpstore.formats.version import encode_facts
from dcpstore.records import Operation, VersionInfo, VersionStats

__all__ = [
    "LOCK",
    "Change",
    "Names",
    "Recorded",
    "as_entry",
    "insert_operations",
    "list_operations",
    "lock_repository",
    "made_version",
    "raise_counters",
    "record",
]

# Locks the repository on a server, where it is sent together with BEGIN; see `writes`.
LOCK = "SELECT id FROM repository FOR UPDATE"

# JSON to be written, with values of every kind, hence `Any`.
Json = dict[str, Any]
Names = Mapping[int | None, Json]  # the uid and number of versions, by id, as the journal has them
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Recorded(Generic[T]):
    """What a change returns, with the operations that it recorded.

    Attributes:
        value: the result.
        entries: the operations as the journal has them.
        are_next: whether the journal has every operation before them already.
    """

    value: T
    entries: Sequence[Json] = ()
    are_next: bool = True


class Change(NamedTuple):
    """What one operation does to one ref; `old` and `new` are ids of versions.

    `detail` is JSON: what a rebuild needs to know of an operation that changes more than a ref.
    """

    kind: str
    target: str = ""
    old: int | None = None
    new: int | None = None
    detail: Mapping[str, Any] | None = None


def lock_repository(connection: Connection) -> int:
    """Make other mutations wait until this transaction ends; return the last operation's number."""
    return _raise_counter(connection, "last_operation", 0)


def raise_counters(
    connection: Connection,
    *also: ColumnElement[Any],
    versions: int = 0,
    operations: int,
) -> Row[Any]:
    """Take the next numbers of versions and operations, which locks the repository.

    Returns the row of the new `last_version` and `last_operation`, of `last_journaled`, and of the
    columns `also`. These are queries of one value; they see what the lock protects if the
    transaction holds the lock already.
    """
    counters = tables.repository.c
    return connection.execute(
        update(tables.repository)
        .values(
            last_version=counters.last_version + versions,
            last_operation=counters.last_operation + operations,
        )
        .returning(counters.last_version, counters.last_operation, counters.last_journaled, *also)
    ).one()


def insert_operations(
    connection: Connection,
    counters: Row[Any],
    changes: Sequence[Change],
    names: Names,
    *,
    author: str,
    at: datetime | None = None,
    value: T,
) -> Recorded[T]:
    """Insert operations under the last numbers that were taken; return `value` with them.

    Args:
        connection: in a transaction that changes what the operations say.
        counters: what `raise_counters` returned.
        changes: one an operation.
        names: the uid and number of every version in `changes`, by its id.
        author: of all of them.
        at: when they were made; now by default.
        value: the result of the transaction.
    """
    at = at or datetime.now(UTC)
    first = counters.last_operation - len(changes) + 1
    entries = [
        as_entry(first + i, change, names, author=author, at=at) for i, change in enumerate(changes)
    ]
    _insert(connection, first, changes, author=author, at=at)
    return Recorded(value, entries, counters.last_journaled == first - 1)


def _insert(
    connection: Connection, first: int, changes: Sequence[Change], *, author: str, at: datetime
) -> None:
    common = {"author": author, "created_at": at}
    rows = [{"number": first + i, **common, **change._asdict()} for i, change in enumerate(changes)]
    # One statement: of several, each would be a round trip within `sent_together`.
    connection.execute(insert(tables.operation).values(rows))


def as_entry(
    number: int,
    change: Change,
    names: Names,
    *,
    author: str,
    at: datetime,
) -> Json:
    """Return an operation as the journal has it; `names` are the uid and number of versions, by id.

    What a new version or repository consists of is added by the caller.
    """
    return {
        "operation": number,
        "kind": change.kind,
        "target": change.target,
        "old": None if change.old is None else names[change.old],
        "new": None if change.new is None else names[change.new],
        "author": author,
        "created_at": at.isoformat(),
        "detail": change.detail,
    }


def made_version(
    info: VersionInfo,
    stats: VersionStats,
    *,
    number: int,
    parent: str | None,
    started_at: datetime,
    packs: Iterable[tuple[str, int]],
) -> Json:
    """Return a new version as the journal has it; `parent` is a uid, `packs` are keys and bytes."""
    return {
        **encode_facts(info, stats),
        "number": number,
        "parent": parent,
        "started_at": started_at.isoformat(),
        "packs": sorted(packs),
    }


def record(
    connection: Connection, *changes: Change, author: str, at: datetime | None = None
) -> None:
    """Record changes as operations, in their order, under the next numbers.

    Args:
        connection: in a transaction that changes what the operations say.
        changes: one an operation.
        author: of all of them.
        at: when they were made; now by default.
    """
    # One update takes all numbers, so they are consecutive.
    first = _raise_counter(connection, "last_operation", len(changes)) - len(changes) + 1
    _insert(connection, first, changes, author=author, at=at or datetime.now(UTC))


@reads_once
def list_operations(connection: Connection, *, limit: int | None = None) -> list[Operation]:
    """Return the operations, newest first.

    Raises:
        InvalidInputError: `limit` is not a number of rows.
    """
    check_limit(limit)
    operation = tables.operation
    old, new = tables.version.alias("old_version"), tables.version.alias("new_version")
    rows = connection.execute(
        select(operation, old.c.number.label("old_number"), new.c.number.label("new_number"))
        .outerjoin(old, old.c.id == operation.c.old)
        .outerjoin(new, new.c.id == operation.c.new)
        .order_by(operation.c.number.desc())
        .limit(limit)
    )
    return [
        Operation(
            number=row.number,
            kind=row.kind,
            target=row.target,
            old=row.old_number,
            new=row.new_number,
            author=row.author,
            created_at=row.created_at,
        )
        for row in rows
    ]


def _raise_counter(connection: Connection, counter: str, count: int) -> int:
    """Add to a counter of the repository's row, which locks the row; return its new value."""
    column = tables.repository.c[counter]
    return int(
        connection.execute(
            update(tables.repository).values({column: column + count}).returning(column)
        ).scalar_one()
    )
