"""The append-only record of operations, and the counters that order mutations.

A transaction that takes a number holds the repository's row until it ends. Every mutation takes one
before it reads anything, so that what it reads stays true until it commits, on Postgres as on
SQLite, and numbers have no gaps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, insert, select, update

from dcpstore.catalog.db.transactions import reads
from dcpstore.catalog.schema import tables
from dcpstore.catalog.validation import check_limit
from dcpstore.records import Operation

__all__ = ["Change", "append_operations", "list_operations", "take_operations", "take_version"]


class Change(NamedTuple):
    """What one operation did to one ref; versions by id.

    `detail` is JSON: what a rebuild must know of an operation that changed more than a ref.
    """

    kind: str
    target: str
    old: int | None
    new: int | None
    detail: Mapping[str, Any] | None = None


def take_version(connection: Connection) -> int:
    """Return the next version number; everyone else waits until this transaction ends."""
    return _take(connection, "last_version", 1)


def take_operations(connection: Connection, count: int = 1) -> int:
    """Return the first of `count` operation numbers; everyone else waits, as above."""
    return _take(connection, "last_operation", count) - count + 1


def append_operations(
    connection: Connection, first: int, changes: Sequence[Change], *, author: str, at: datetime
) -> None:
    """Record `changes` under the numbers from `first` on, which are taken."""
    connection.execute(
        insert(tables.operation),
        [
            {"number": first + i, "author": author, "created_at": at, **change._asdict()}
            for i, change in enumerate(changes)
        ],
    )


@reads
def list_operations(connection: Connection, *, limit: int | None = None) -> list[Operation]:
    """Return the operations, newest first.

    Raises:
        InvalidInputError: `limit` is no number of rows.
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


def _take(connection: Connection, counter: str, count: int) -> int:
    column = tables.repository.c[counter]
    return int(
        connection.execute(
            update(tables.repository).values({column: column + count}).returning(column)
        ).scalar_one()
    )
