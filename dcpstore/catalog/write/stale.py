"""Stale manifests: chunks of their versions have moved, so they are to be written again.

A stale version holds a random mark. Each move of chunks gives it another one, so a process that
wrote the manifest learns from the mark whether chunks moved again meanwhile.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection

from sqlalchemy import ColumnElement, Connection, select, update

from dcpstore.catalog.db.key_lists import wanted_ids
from dcpstore.catalog.db.transactions import reads, writes
from dcpstore.catalog.read.trees import holding_tensors, holding_versions
from dcpstore.catalog.schema import tables

__all__ = [
    "clear_stale",
    "mark_holders_stale",
    "mark_stale",
    "mark_version_stale",
    "new_mark",
    "stale_versions",
]

_version = tables.version


def new_mark() -> str:
    """Return a mark that no version has had."""
    return secrets.token_hex(8)


def mark_stale(connection: Connection, *conditions: ColumnElement[bool]) -> None:
    """Mark the versions for which all conditions on their rows hold."""
    connection.execute(update(_version).where(*conditions).values(stale=new_mark()))


def mark_holders_stale(connection: Connection, tensors: Collection[int]) -> None:
    """Mark the versions that hold any of the tensors or runs, which are given by id."""
    holders = holding_versions(holding_tensors(wanted_ids(connection, tensors)))
    mark_stale(connection, _version.c.id.in_(select(holders.subquery().c.version)))


@writes(idempotent=True)
def mark_version_stale(connection: Connection, number: int) -> None:
    """Mark a committed version."""
    mark_stale(connection, _version.c.number == number, _version.c.status == "committed")


@reads
def stale_versions(connection: Connection) -> dict[int, str]:
    """Return the marks of the stale committed versions, by number."""
    rows = connection.execute(
        select(_version.c.number, _version.c.stale)
        .where(_version.c.stale.is_not(None), _version.c.status == "committed")
        .order_by(_version.c.number)
    )
    return dict(rows.all())


@writes()
def clear_stale(connection: Connection, number: int, mark: str) -> bool:
    """Note that a manifest was written again; False if chunks moved after `mark` was read.

    Then the version is marked again, even if another process has cleared it since: of the two
    manifests, the one that was written here may have come last.
    """
    cleared = connection.scalar(
        update(_version)
        .where(_version.c.number == number, _version.c.stale == mark)
        .values(stale=None)
        .returning(_version.c.id)
    )
    if cleared is None:
        mark_version_stale(connection, number)
    return cleared is not None
