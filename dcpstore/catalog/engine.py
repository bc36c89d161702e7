"""The way to the database: one URL, one engine, and transactions that read or write.

Keeps three promises: our settings touch our own engine only; a transaction that writes holds the
write lock from its first statement on SQLite, so it can never fail for want of it half-way; and no
error that leaves here carries a password.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, NullPool, QueuePool, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError

from dcpstore.errors import (
    ConflictError,
    CorruptionError,
    DcpstoreError,
    InvalidInputError,
    NotFoundError,
    SchemaError,
)

__all__ = ["Database", "sqlite_url"]

_BUSY_SECONDS = 60.0  # longer than the commit of a very large version takes
_WRITES = "dcpstore_writes"


def sqlite_url(path: str | os.PathLike[str]) -> str:
    """Return the URL of the SQLite database in file `path`, whatever characters that has."""
    return URL.create("sqlite", database=os.fspath(path)).render_as_string()


class Database:
    """One database, by URL; connects when it is first used.

    Attributes:
        is_sqlite: whether it is a file of SQLite; else it is on a Postgres server.
        file: the SQLite file, or None.
        may_create_file: whether connecting may begin a new SQLite file.
    """

    def __init__(self, url: str) -> None:
        self._url = _parse(url)
        self.is_sqlite = self._url.get_backend_name() == "sqlite"
        # Absolute from now on: the process may change its folder while connections come and go.
        self.file = Path(os.path.abspath(self._url.database or "")) if self.is_sqlite else None
        self.may_create_file = False
        if self.is_sqlite:
            self._engine = create_engine(
                "sqlite://",
                creator=self._connect_sqlite,
                poolclass=QueuePool,
                max_overflow=-1,  # threads wait for the database's lock, never for a connection
            )
            event.listen(self._engine, "begin", _begin_sqlite)
        else:
            # Hours pass between saves and a cluster has many ranks: hold no connection meanwhile.
            self._engine = _postgres_engine(self._url)

    def __repr__(self) -> str:
        return f"Database({self.shown!r})"

    @property
    def shown(self) -> str:
        """The URL for people to read: no password, and no option that may hold one."""
        query = {key: self._url.query[key] for key in ("host", "port") if key in self._url.query}
        return self._url.set(query=query).render_as_string(hide_password=True)

    def close(self) -> None:
        """Close every connection; the next use connects again."""
        self._engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Yield a connection whose queries all see the database as of one moment."""
        with self._translated(), self._engine.connect() as connection:
            if not self.is_sqlite:  # where BEGIN alone would give each query a moment of its own
                connection.execution_options(
                    isolation_level="REPEATABLE READ", postgresql_readonly=True
                )
            with connection.begin():
                yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Yield a connection in a transaction that commits at the end, or leaves nothing."""
        with self._translated(), self._engine.connect() as connection:
            connection.execution_options(**{_WRITES: True})
            with connection.begin():
                yield connection

    @contextmanager
    def outside(self) -> Iterator[sqlite3.Connection]:
        """Yield SQLite's own connection outside of a transaction, for what cannot run in one."""
        with self._translated(), self._engine.connect() as connection:
            driver = connection.connection.driver_connection
            assert isinstance(driver, sqlite3.Connection)
            yield driver

    @contextmanager
    def read_only(self) -> Iterator[Connection]:
        """Yield a connection of its own on which the database itself refuses to write."""
        if self.is_sqlite:
            engine = create_engine("sqlite://", creator=self._connect_read_only, poolclass=NullPool)
            event.listen(engine, "begin", _begin_sqlite)
        else:
            engine = _postgres_engine(self._url)
        with self._translated(), engine.connect() as connection:
            if not self.is_sqlite:
                connection.execution_options(postgresql_readonly=True)
            yield connection

    def shown_error(self, error: BaseException) -> str:
        """Return the database's own text of an error, without statement, values and password."""
        original = error.orig if isinstance(error, DBAPIError) else error
        text = " ".join(str(original).split())
        password = self._url.password
        return text.replace(str(password), "***") if password else text

    def _connect_sqlite(self) -> sqlite3.Connection:
        # 'rw' fails where the file is missing: looking for a repository must not leave one.
        connection = self._open_sqlite("rwc" if self.may_create_file else "rw")
        # In WAL mode only FULL makes a commit survive a loss of power (invariant 3).
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.create_function("from_hex", 1, bytes.fromhex, deterministic=True)
        return connection

    def _connect_read_only(self) -> sqlite3.Connection:
        connection = self._open_sqlite("ro")
        connection.execute("PRAGMA query_only = ON")
        return connection

    def _open_sqlite(self, mode: str) -> sqlite3.Connection:
        return sqlite3.connect(
            f"file:{quote(os.fsencode(str(self.file)))}?mode={mode}",
            uri=True,
            timeout=_BUSY_SECONDS,
            isolation_level=None,  # we say BEGIN ourselves, and which
            check_same_thread=False,  # the pool lends a connection to one thread at a time
        )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn the database's errors into ours."""
        try:
            yield
        except IntegrityError as error:
            raise ConflictError(
                f"the catalog {self.shown} refused a row that another process was faster with: "
                f"{self.shown_error(error)}. Try again."
            ) from error
        except DBAPIError as error:
            raise self._translate(error) from error

    def _translate(self, error: DBAPIError) -> DcpstoreError:
        text = self.shown_error(error)
        if self.is_sqlite:
            if "locked" in text or "busy" in text:
                return ConflictError(
                    f"the catalog {self.shown} was locked by another process for more than "
                    f"{_BUSY_SECONDS:.0f} seconds ({text}). Try again when it has finished."
                )
            if "not a database" in text:
                return SchemaError(
                    f"{self.shown} is not a dcpstore catalog ({text}). Give the path of a "
                    "repository, or one where nothing is yet."
                )
            if "malformed" in text:
                return CorruptionError(
                    f"the catalog {self.shown} is damaged ({text}). Restore it from a backup."
                )
            if "unable to open" in text:
                return NotFoundError(
                    f"cannot open the catalog {self.shown} ({text}). Check that its folder exists "
                    "and may be written to."
                )
        elif error.connection_invalidated or getattr(error.orig, "sqlstate", None) is None:
            return NotFoundError(
                f"cannot connect to the catalog {self.shown} ({text}). Check the URL, and that "
                "the server is running and lets you in."
            )
        return DcpstoreError(
            f"the catalog {self.shown} failed: {text}. Nothing was changed; check the database "
            "and try again."
        )


def _parse(url: str) -> URL:
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
        f"a catalog cannot be kept in {parsed.drivername!r}; use 'sqlite:///…' or 'postgresql://…'."
    )


def _postgres_engine(url: URL) -> Engine:
    try:
        return create_engine(url, poolclass=NullPool)
    except ImportError:
        raise InvalidInputError(
            "a catalog in Postgres needs psycopg; install it with 'pip install dcpstore[postgres]'."
        ) from None


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
