"""The way to the database: one URL, one engine, transactions, and what an error of it means.

Keeps four promises: our settings touch our own engine only; a transaction that writes holds the
write lock from its first statement on SQLite, so it can never fail for want of it half-way; a
transaction is retried only where the database is known to have changed nothing, or to have taken
the change back; and no error that leaves here carries a password or is the database's own.
"""

from __future__ import annotations

import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Literal, TypeVar

from sqlalchemy import Connection, Engine, NullPool, QueuePool, create_engine, event
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from dcpstore.catalog.db.sqlite_file import open_file
from dcpstore.catalog.db.url import keep_to_process, parse_url, server_engine
from dcpstore.core.reentry import changing
from dcpstore.errors import (
    ConflictError,
    CorruptionError,
    DcpstoreError,
    InvalidInputError,
    NotFoundError,
    SchemaError,
)

__all__ = [
    "Database",
    "Patience",
    "UnknownOutcomeError",
    "is_lost",
    "is_passing",
    "translate",
]

_LONGEST_PAUSE = 5.0

# Postgres's codes of what passes: serialization failure and deadlock, whose transaction is rolled
# back; a server that shuts down, crashed, starts up, has no connection left, or follows another.
_PASSING = ("40001", "40P01", "57P01", "57P02", "57P03", "53300", "25006")
_ENDED = ("57P01", "57P02", "57P03", "25P03")  # the server ended the session
# What a server says of itself before there is a session, and so without a code.
_FULL = ("too many clients", "too many connections", "connection slots are reserved")
_STARTING = ("starting up", "shutting down", "in recovery mode", "not yet accepting connections")


_CROWDED = (
    ConflictError,
    "others kept changing the catalog {shown} at the same time ({text}). Nothing was changed; try "
    "again.",
)
_DAMAGED = (
    CorruptionError,
    "the catalog {shown} is damaged ({text}). Restore it from a backup, or make it again from the "
    "data with 'dcpstore rebuild'.",
)
_POSTGRES: dict[str, tuple[type[DcpstoreError], str]] = {
    "40001": _CROWDED,
    "40P01": _CROWDED,
    "XX001": _DAMAGED,
    "XX002": _DAMAGED,
}
# SQLite gives its codes no names that every Python has, and its messages do not change.
_SQLITE: tuple[tuple[str, type[DcpstoreError], str], ...] = (
    (
        "not a database",
        SchemaError,
        "{shown} is not a dcpstore catalog ({text}). Give the path of a repository, or one where "
        "nothing is yet.",
    ),
    ("malformed", *_DAMAGED),
    (
        "unable to open",
        NotFoundError,
        "cannot open the catalog {shown} ({text}). Check that its folder exists and may be written "
        "to.",
    ),
    (
        "readonly",
        DcpstoreError,
        "the catalog {shown} may not be written ({text}). Nothing was changed; check the "
        "permissions of the file and of its folder.",
    ),
    (
        "is full",
        DcpstoreError,
        "no space is left for the catalog {shown} ({text}). Nothing was changed; free some space "
        "('dcpstore gc' may), and try again.",
    ),
    (
        "I/O error",
        DcpstoreError,
        "the disk of the catalog {shown} fails ({text}). Nothing was changed; check the disk, then "
        "look with 'dcpstore verify'.",
    ),
)


class UnknownOutcomeError(DcpstoreError):
    """The answer to a commit was lost: it may have been carried out."""


class Patience:
    """The pauses between tries of one thing: longer and longer, `seconds` in all at most."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._pause = 0.05

    def wait(self) -> bool:
        """Pause before the next try; False, at once, where there must be none."""
        pause = self._pause * random.uniform(0.5, 1.0)  # those who failed together come apart
        if time.monotonic() + pause > self._end:
            return False
        time.sleep(pause)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        return True


def is_lost(error: DBAPIError) -> bool:
    """Tell whether there is no connection, or no longer one, to a server."""
    state = _state(error)
    no_session = isinstance(error, OperationalError | InterfaceError) and state is None
    return error.connection_invalidated or no_session or (state or "").startswith(("08", *_ENDED))


def is_passing(error: DBAPIError, text: str, *, is_sqlite: bool, was_connected: bool) -> bool:
    """Tell whether what failed, and changed nothing, may well succeed soon.

    Args:
        error: as the database raised it.
        text: of the error.
        is_sqlite: which database it is.
        was_connected: whether there was a connection before: else a server that does not answer is
            rather a mistake in the URL.
    """
    if is_sqlite:
        return "locked" in text or "busy" in text
    if is_lost(error):
        return was_connected or any(words in text for words in (*_FULL, *_STARTING))
    return _state(error) in _PASSING


def translate(
    error: DBAPIError, text: str, *, shown: str, is_sqlite: bool, busy_seconds: float
) -> DcpstoreError:
    """Return an error of ours for one that left nothing changed.

    Args:
        error: as the database raised it.
        text: of the error.
        shown: the catalog, as people may see it.
        is_sqlite: which database it is.
        busy_seconds: how long a transaction waits for a lock.
    """
    if isinstance(error, IntegrityError):
        return ConflictError(
            f"the catalog {shown} refused a row that another process was faster with: {text}. "
            "Try again."
        )
    if "locked" in text or "busy" in text if is_sqlite else _state(error) == "55P03":
        return ConflictError(
            f"the catalog {shown} was locked by another process for more than {busy_seconds:.0f} "
            f"seconds ({text}). Try again when it has finished."
        )
    known = _of_sqlite(text, shown) if is_sqlite else _of_postgres(error, text, shown)
    return known or DcpstoreError(
        f"the catalog {shown} failed: {text}. Nothing was changed; check the database and try "
        "again."
    )


def _of_sqlite(text: str, shown: str) -> DcpstoreError | None:
    for words, kind, message in _SQLITE:
        if words in text:
            return kind(message.format(shown=shown, text=text))
    return None


def _of_postgres(error: DBAPIError, text: str, shown: str) -> DcpstoreError | None:
    state = _state(error)
    if state == "53300" or any(words in text for words in _FULL):
        return DcpstoreError(
            f"the server of the catalog {shown} has no connection left ({text}). Nothing was "
            "changed; raise its max_connections, or let fewer processes use it at a time."
        )
    if is_lost(error):
        return NotFoundError(
            f"cannot connect to the catalog {shown} ({text}). Check the URL, and that the server "
            "is running and lets you in."
        )
    if "connection option" in text:
        return InvalidInputError(f"invalid catalog URL {shown}: {text}.")
    if state in _POSTGRES:
        kind, message = _POSTGRES[state]
        return kind(message.format(shown=shown, text=text))
    return None


def _state(error: DBAPIError) -> str | None:
    state: str | None = getattr(error.orig, "sqlstate", None)
    return state


_WRITES = "dcpstore_writes"
_SENDING = "before_cursor_execute"  # SQLAlchemy's event
_FRESH_SECONDS = 30  # what a kept connection may be old, before a network forgets it

T = TypeVar("T")


class Database:
    """One database, by URL; connects when it is first used.

    Args:
        url: of an SQLite file or of a database in Postgres.
        busy_seconds: how long a transaction waits for a lock that another one holds; by default
            longer than the commit of a very large version takes.
        patience_seconds: how long a transaction is tried again; by default as long as a server
            takes to restart, or another one to take over.

    Attributes:
        is_sqlite: whether it is a file of SQLite; else it is on a Postgres server.
        file: the SQLite file, or None.
        may_create_file: whether connecting may begin a new SQLite file.
    """

    def __init__(
        self, url: str, *, busy_seconds: float = 60.0, patience_seconds: float = 60.0
    ) -> None:
        self._url = parse_url(url)
        self._busy_seconds, self._patience_seconds = busy_seconds, patience_seconds
        self.is_sqlite = self._url.get_backend_name() == "sqlite"
        # Absolute from now on: the process may change its folder while connections come and go.
        self.file = Path(self._url.database or "").absolute() if self.is_sqlite else None
        self.may_create_file = False
        self._was_connected = False
        self._keeping = threading.RLock()  # a signal handler may ask in the middle
        self._keepers = 0
        self._reports: list[Callable[[str], None]] = []
        if self.is_sqlite:
            self._engine = create_engine(
                "sqlite://",
                creator=self._connect_sqlite,
                poolclass=QueuePool,
                max_overflow=-1,  # threads wait for the database's lock, never for a connection
            )
            event.listen(self._engine, "begin", _begin_sqlite)
        else:
            self._engine = server_engine(
                self._url,
                poolclass=QueuePool,
                max_overflow=-1,
                pool_recycle=_FRESH_SECONDS,
                pool_pre_ping=True,  # the server may end what is kept
            )
        keep_to_process(self._engine)

    def __repr__(self) -> str:
        return f"Database({self.shown!r})"

    @property
    def shown(self) -> str:
        """The URL for people to read: no password, and no option that may hold one."""
        query = {key: self._url.query[key] for key in ("host", "port") if key in self._url.query}
        return self._url.set(query=query).render_as_string(hide_password=True)

    @property
    def is_missing(self) -> bool:
        """Whether it is a file of SQLite that does not exist.

        Raises:
            DcpstoreError: that cannot be found out.
        """
        try:
            if self.file is not None:
                self.file.stat()
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return True
        except OSError as error:
            raise DcpstoreError(
                f"cannot look for the catalog {self.shown}: {error.strerror}; give this user leave "
                "to read its folder, or mend the filesystem, then try again."
            ) from error
        return False

    def close(self) -> None:
        """Close every connection; the next use connects again."""
        self._engine.dispose()

    @contextmanager
    def traced(self, report: Callable[[str], None]) -> Iterator[None]:
        """Call `report` with the SQL of each statement before it is sent, inside the block.

        It is called in the thread that sends the statement, BEGIN included; a commit is not a
        statement.
        """

        def see(connection: Connection, cursor: object, statement: str, *_: object) -> None:
            report(statement)

        self._reports.append(report)
        event.listen(self._engine, _SENDING, see)
        try:
            yield
        finally:
            event.remove(self._engine, _SENDING, see)
            self._reports.remove(report)

    def report(self, statement: str) -> None:
        """Report a statement that goes to the driver past SQLAlchemy."""
        for report in tuple(self._reports):
            report(statement)

    @contextmanager
    def keep_connection(self) -> Iterator[None]:
        """Keep a connection to a server for the transactions inside the block.

        Outside there is none: hours pass between saves, and a cluster has many ranks. (Connections
        to a file cost nobody anything, and are always kept.)
        """
        with self._keeping:
            self._keepers += 1
        try:
            yield
        finally:
            with self._keeping:
                self._keepers -= 1
                if not self._keepers and not self.is_sqlite:
                    self._engine.dispose()

    def transact(
        self,
        call: Callable[[Connection], T],
        *,
        writes: bool,
        if_unknown: Callable[[], tuple[T] | None] = lambda: None,
    ) -> T:
        """Run a transaction until it succeeds, fails for good, or the retries are used up.

        Args:
            call: what it does, and nothing else; returns the result.
            writes: whether it may change the database.
            if_unknown: called where the answer to its commit was lost: returns the result, or None
                where it may be run again.
        """
        patience = Patience(self._patience_seconds)
        while True:
            is_committing = False
            try:
                with self._connected(writes=writes) as connection:
                    result = call(connection)
                    is_committing = writes
                return result
            except DBAPIError as error:
                text = self.shown_error(error)
                if is_committing and self._is_unknown(error, text):
                    outcome = self._find_out(error, text, if_unknown)
                    if outcome is not None:
                        return outcome[0]
                elif not is_passing(
                    error, text, is_sqlite=self.is_sqlite, was_connected=self._was_connected
                ):
                    raise self._translate(error) from error
                if not patience.wait():
                    raise self._translate(error) from error

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Yield a connection whose queries all see the database as of one moment; no retry."""
        with self._translated(), self._connected(writes=False) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Yield a connection in a transaction that commits at the end, or leaves nothing.

        It is not retried: for what does more than change the database.
        """
        with self._translated(), self._connected(writes=True) as connection:
            yield connection

    @contextmanager
    def outside(self) -> Iterator[sqlite3.Connection]:
        """Yield SQLite's own connection outside of a transaction, for what cannot run in one."""
        with self._changing(), self._translated(), self._engine.connect() as connection:
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
            engine = server_engine(self._url, poolclass=NullPool)
        with self._translated(), self._connect(engine) as connection:
            if not self.is_sqlite:
                connection.execution_options(postgresql_readonly=True)
            yield connection

    def shown_error(self, error: BaseException) -> str:
        """Return the database's own text of an error, without statement, values and password."""
        original = error.orig if isinstance(error, DBAPIError) else error
        text = " ".join(str(original).split())
        password = self._url.password
        return text.replace(str(password), "***") if password else text

    def _connect(self, engine: Engine) -> Connection:
        try:
            return engine.connect()
        except OSError as error:  # of this process, before the driver has asked the server
            raise DcpstoreError(
                f"cannot connect to the catalog {self.shown}: {error.strerror}. Nothing was "
                "changed; try again when this process has what it needs (for open files: raise "
                "the limit of 'ulimit -n')."
            ) from error

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

    def _open_sqlite(self, mode: Literal["ro", "rw", "rwc"]) -> sqlite3.Connection:
        assert self.file is not None, "on a server the engine connects"
        return open_file(self.file, mode=mode, timeout=self._busy_seconds)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn the database's errors into ours."""
        try:
            yield
        except DBAPIError as error:
            raise self._translate(error) from error
        except (sqlite3.Error, PoolTimeoutError) as error:
            raise self._translate(DBAPIError(None, None, error)) from error

    def _translate(self, error: DBAPIError) -> DcpstoreError:
        text = self.shown_error(error)
        return translate(
            error,
            text,
            shown=self.shown,
            is_sqlite=self.is_sqlite,
            busy_seconds=self._busy_seconds,
        )

    def _changing(self) -> AbstractContextManager[None]:
        """Refuse a transaction that writes inside another one of this thread: both would wait."""
        place = self.shown if self.file is None else os.path.realpath(self.file)
        return changing(f"catalog {place}", shown=f"the catalog {self.shown}")

    def _is_unknown(self, error: DBAPIError, text: str) -> bool:
        """Tell whether a commit that ended with this error may have been carried out."""
        return "I/O error" in text if self.is_sqlite else is_lost(error)

    def _find_out(
        self, error: DBAPIError, text: str, if_unknown: Callable[[], tuple[T] | None]
    ) -> tuple[T] | None:
        try:
            return if_unknown()
        except DcpstoreError as second:
            reason = "" if isinstance(second, UnknownOutcomeError) else f", and then: {second}"
            raise UnknownOutcomeError(
                f"the catalog {self.shown} gave no answer to a commit ({text}){reason}. Whether it "
                "was carried out is not known: look with 'dcpstore ops', then try again if not."
            ) from error

    @contextmanager
    def _connected(self, *, writes: bool) -> Iterator[Connection]:
        """Yield a connection in a transaction; errors are the database's own."""
        alone = self._changing() if writes else nullcontext()
        with alone, self.keep_connection(), self._connect(self._engine) as connection:
            self._was_connected = True
            if writes:
                connection.execution_options(**{_WRITES: True})
            elif not self.is_sqlite:  # where BEGIN alone would give each query its own moment
                connection.execution_options(
                    isolation_level="REPEATABLE READ", postgresql_readonly=True
                )
            with connection.begin():
                if writes and not self.is_sqlite:
                    # Wait for a lock as long as on SQLite, and let go of the locks of a process
                    # that the network has cut off.
                    connection.exec_driver_sql(
                        f"SELECT set_config('lock_timeout', '{self._busy_seconds * 1000:.0f}', "
                        "true), set_config('idle_in_transaction_session_timeout', '600000', true)"
                    )
                yield connection


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
