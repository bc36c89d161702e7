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

# So that a server which is gone is noticed, where the URL says nothing else.
_CONNECT = {
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",
}


def sqlite_url(path: str | os.PathLike[str]) -> str:
    """Return the URL of the SQLite database in file `path`, whatever characters that has."""
    return URL.create("sqlite", database=os.fspath(path)).render_as_string()


def parse_url(url: str) -> URL:
    """Return a catalog's URL, with the driver that we use.

    Raises:
        InvalidInputError: it names neither an SQLite file nor a Postgres database.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # Not the text itself: what does not parse may still hold a password.
        raise InvalidInputError(
            "the catalog's URL cannot be read; write 'sqlite:///folder/catalog.db' or "
            "'postgresql://user@host/database'."
        ) from None
    if parsed.drivername in ("sqlite", "sqlite+pysqlite"):
        if parsed.database in (None, "", ":memory:") or parsed.host or parsed.query:
            raise InvalidInputError(
                f"{parsed.set(query={})} names no SQLite file; write 'sqlite:///folder/catalog.db'."
            )
        return parsed
    if parsed.drivername in ("postgres", "postgresql", "postgresql+psycopg"):
        return parsed.set(drivername="postgresql+psycopg")
    raise InvalidInputError(
        f"a catalog cannot be kept in {parsed.drivername!r}; use a folder, 'sqlite:///…' or "
        "'postgresql://…', and dcpstore.open(that, data='s3://bucket/prefix') for the data alone."
    )


def server_engine(url: URL, **options: Any) -> Engine:
    """Return an engine for a Postgres database; SQLAlchemy's options say with what pool.

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
    """Let a process that is forked connect for itself, where its parent keeps connections."""
    event.listen(engine, "connect", _sign)
    event.listen(engine, "checkout", _leave_to_parent)


def _sign(driver: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
    entry.info["process"] = os.getpid()


def _leave_to_parent(
    driver: DBAPIConnection, entry: ConnectionPoolEntry, lent: PoolProxiedConnection
) -> None:
    """Refuse, in a process that was forked, a connection that its parent speaks on."""
    if entry.info["process"] != os.getpid():
        # as SQLAlchemy's guide on pools and os.fork() has it; the stubs call it read-only
        entry.dbapi_connection = lent.dbapi_connection = None  # type: ignore[misc]
        raise DisconnectionError("this connection is another process's")
