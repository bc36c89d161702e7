"""Catalog URLs, and the engines that connect to them."""

from __future__ import annotations

import os
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DisconnectionError
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from dcpstore.errors import InvalidInputError

__all__ = [
    "keep_to_process",
    "parse_url",
    "server_engine",
    "sqlite_url",
]

# Notice within about a minute that a server is gone, unless the URL has its own options.
_CONNECT = {
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",
}


def sqlite_url(path: str | os.PathLike[str]) -> str:
    """Return the URL of the SQLite database in file `path`, with special characters escaped."""
    return URL.create("sqlite", database=os.fspath(path)).render_as_string()


def parse_url(url: str) -> URL:
    """Parse the URL of a catalog; the result names the driver that dcpstore uses.

    Raises:
        InvalidInputError: it names neither an SQLite file nor a Postgres database.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # The message does not show the URL: one that cannot be parsed may hold a password.
        raise InvalidInputError(
            "the catalog's URL cannot be read; write 'sqlite:///folder/catalog.db' or "
            "'postgresql://user@host/database'."
        ) from None
    if parsed.drivername in ("sqlite", "sqlite+pysqlite"):
        if parsed.database in (None, "", ":memory:") or parsed.host or parsed.query:
            raise InvalidInputError(
                f"{parsed.set(query={})} does not name an SQLite file; write "
                "'sqlite:///folder/catalog.db'."
            )
        return parsed
    if parsed.drivername in ("postgres", "postgresql", "postgresql+psycopg"):
        return parsed.set(drivername="postgresql+psycopg")
    raise InvalidInputError(
        f"{parsed.drivername!r} cannot hold a catalog; use a folder, 'sqlite:///…' or "
        "'postgresql://…', and dcpstore.open(that, data='s3://bucket/prefix') for the data alone."
    )


def server_engine(url: URL, **options: Any) -> Engine:
    """Return an engine for a Postgres database; `options` are those of SQLAlchemy, for its pool.

    Raises:
        InvalidInputError: psycopg is missing.
    """
    try:
        return create_engine(
            url.update_query_dict(
                {name: value for name, value in _CONNECT.items() if name not in url.query}
            ),
            **options,
        )
    except ImportError:
        raise InvalidInputError(
            "a catalog in Postgres needs psycopg; install it with pip install 'psycopg[binary]'."
        ) from None


def keep_to_process(engine: Engine) -> None:
    """Make a forked process open its own connections, and leave those of its parent alone."""
    event.listen(engine, "connect", _record_process)
    event.listen(engine, "checkout", _refuse_other_process)


def _record_process(driver: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
    entry.info["process"] = os.getpid()


def _refuse_other_process(
    driver: DBAPIConnection, entry: ConnectionPoolEntry, lent: PoolProxiedConnection
) -> None:
    """Refuse a connection that another process opened: the parent of this one still uses it."""
    if entry.info["process"] != os.getpid():
        # as SQLAlchemy's guide on pools and os.fork() has it; the stubs call it read-only
        entry.dbapi_connection = lent.dbapi_connection = None  # type: ignore[misc]
        raise DisconnectionError("another process opened this connection")
