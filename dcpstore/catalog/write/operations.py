"""The append-only list of operations, and the counters that order mutations.

A transaction that raises a counter, even by 0, locks the repository's row until it ends. Invariant:
every mutation does so before it reads anything. So what it reads stays true until it commits, on
Postgres as on SQLite, and numbers have no gaps.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, insert, select, update

from dcpstore.catalog.db.transactions import reads
from dcpstore.catalog.schema import tables
from dcpstore.catalog.validation import check_limit
from dcpstore.records import Operation

__all__ = ["Change", "list_operations", "lock_repository", "record", "take_version"]


class Change(NamedTuple):
    """What one operation does to one ref; `old` and `new` are ids of versions.

    `detail` is JSON: what a rebuild needs to know of an operation that changes more than a ref.
    """

    kind: str
    target: str = ""
    old: int | None = None
    new: int | None = None
    detail: Mapping[str, Any] | None = None


def take_version(connection: Connection) -> int:
    """Return the next version number; other mutations wait until this transaction ends."""
    return _raise_counter(connection, "last_version", 1)


def lock_repository(connection: Connection) -> int:
    """Make other mutations wait until this transaction ends; return the last operation's number."""
    return _raise_counter(connection, "last_operation", 0)


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
    common = {"author": author, "created_at": at or datetime.now(UTC)}
    connection.execute(
        insert(tables.operation),
        [{"number": first + i, **common, **change._asdict()} for i, change in enumerate(changes)],
    )


@reads
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
