"""What `dcpstore doctor` asks of a database: which server it is, and what time it is there."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Connection, func, select

from dcpstore.catalog.db.transactions import reads, writes
from dcpstore.catalog.schema import tables

__all__ = ["DatabaseHealth", "check_database", "check_writable"]


@dataclass(frozen=True, slots=True)
class DatabaseHealth:
    """What a database says of itself.

    Attributes:
        product: its name and version.
        clock_ahead: seconds by which its clock is ahead of this machine's, half a round trip more
            or less; None for SQLite, which has no clock of its own.
    """

    product: str
    clock_ahead: float | None


@reads
def check_database(connection: Connection) -> DatabaseHealth:
    """Ask the database of an open catalog."""
    dialect = connection.dialect
    version = ".".join(map(str, dialect.server_version_info or ()))
    if dialect.name == "sqlite":
        return DatabaseHealth(f"SQLite {version}", None)
    before = datetime.now(UTC)
    there = connection.execute(select(func.clock_timestamp())).scalar_one()
    half = (datetime.now(UTC) - before) / 2
    return DatabaseHealth(f"Postgres {version}", (there - before - half).total_seconds())


@writes(idempotent=True)
def check_writable(connection: Connection) -> None:
    """Begin a transaction that may write, and write nothing.

    Raises:
        DcpstoreError: the database is read-only, for this user or as a whole.
    """
    # SQLite has begun to write here; a server takes this lock only from a user who may write.
    connection.execute(select(tables.repository.c.id).with_for_update())
