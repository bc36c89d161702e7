"""`Database`: the connections to one database, and its transactions with their retries.

Invariants: our settings never change other SQLAlchemy engines of the process. On SQLite a
transaction that writes holds the write lock from its first statement, so it cannot fail half-way
because another process has it; writers wait in a queue (see `write_queue`). A transaction is
retried only if the database is known to have changed nothing, or to have rolled the change back.
Database errors are raised as DcpstoreError, without passwords.

Each statement is one round trip to a server. So the drivers are in autocommit mode, and BEGIN is
sent here, together with the settings of the transaction; a transaction of one statement needs
neither BEGIN nor COMMIT.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from sqlalchemy import Connection, Engine, NullPool, QueuePool, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from dcpstore.catalog.db.db_errors import (
    Backoff,
    UnknownOutcomeError,
    is_lost,
    is_transient,
    translate,
)
from dcpstore.catalog.db.sqlite_file import is_at_rest, open_file
from dcpstore.catalog.db.together import TOGETHER
from dcpstore.catalog.db.url import keep_to_process, parse_url, server_engine
from dcpstore.catalog.db.write_queue import WriteQueue
from dcpstore.core.reentry import changing
from dcpstore.errors import DcpstoreError

__all__ = ["Database"]

_BEGIN = "dcpstore_begin"  # our execution option: the SQL that begins the transaction, or ""
_SENDING = "before_cursor_execute"  # SQLAlchemy's name of the event
_FRESH_SECONDS = 30  # an older idle connection is replaced: a network may have dropped it

T = TypeVar("T")


class Database:
    """One database, by URL; it connects on first use.

    Args:
        url: of an SQLite file or of a database in Postgres.
        busy_seconds: how long a transaction waits for a lock that another one holds; by default
            longer than the commit of a very large version takes.
        retry_seconds: how long a transaction is retried; by default long enough for a server to
            restart, or for a replica to replace it.

    Attributes:
        is_sqlite: whether it is an SQLite file; if not, it is on a Postgres server.
        file: the SQLite file, or None.
        may_create_file: whether connecting may create the SQLite file.
    """

    def __init__(
        self, url: str, *, busy_seconds: float = 60.0, retry_seconds: float = 60.0
    ) -> None:
        self._url = parse_url(url)
        self._busy_seconds, self._retry_seconds = busy_seconds, retry_seconds
        self.is_sqlite = self._url.get_backend_name() == "sqlite"
        # Absolute, because the process may change its working folder before it connects again.
        self.file = Path(self._url.database or "").absolute() if self.is_sqlite else None
        self.may_create_file = False
        self._was_connected = False
        self._keepers_lock = threading.RLock()  # a signal handler may run while it is held
        self._keepers = 0  # blocks inside `keep_connection`
        self._reports: list[Callable[[str], None]] = []
        self._queue = None if self.file is None else WriteQueue(self.file, seconds=busy_seconds)
        if self.file is not None:
            # 'At rest' means that this process cannot write in the catalog's folder, and that no
            # other process has the catalog open. Such a catalog is read without locks, so each
            # transaction connects again and checks again that this still holds. Otherwise
            # connections are kept, and threads wait for the lock, not for a free connection.
            kept: dict[str, Any] = {"poolclass": QueuePool, "max_overflow": -1}
            self._engine = create_engine(
                "sqlite://",
                creator=self._connect_sqlite,
                **({"poolclass": NullPool} if is_at_rest(self.file) else kept),
            )
        else:
            # A connection that the server has closed is replaced by a retry. It is not tested first
            # (`pool_pre_ping`), and no statement is prepared for later: each is a round trip.
            self._engine = server_engine(
                self._url,
                poolclass=QueuePool,
                max_overflow=-1,
                pool_recycle=_FRESH_SECONDS,
                isolation_level="AUTOCOMMIT",
                connect_args={"prepare_threshold": None},
            )
        event.listen(self._engine, "begin", _begin)
        keep_to_process(self._engine)

    def __repr__(self) -> str:
        return f"Database({self.shown!r})"

    @property
    def shown(self) -> str:
        """The URL for people to read, without password and without options that may hold one."""
        query = {key: self._url.query[key] for key in ("host", "port") if key in self._url.query}
        return self._url.set(query=query).render_as_string(hide_password=True)

    @property
    def is_missing(self) -> bool:
        """Whether it is an SQLite file that does not exist.

        Raises:
            DcpstoreError: the filesystem does not say.
        """
        try:
            if self.file is not None:
                self.file.stat()
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return True
        except OSError as error:
            raise DcpstoreError(
                f"cannot look for the catalog {self.shown}: {error.strerror}; let this user read "
                "its folder, or repair the filesystem, then try again."
            ) from error
        return False

    def close(self) -> None:
        """Close every connection; the next use connects again."""
        self._engine.dispose()

    @contextmanager
    def traced(self, report: Callable[[str], None]) -> Iterator[None]:
        """Call `report` with the SQL of each statement before it is sent, inside the block.

        It is called in the thread that sends the statement. BEGIN and COMMIT are statements too.
        """

        def on_statement(connection: Connection, cursor: object, text: str, *_: object) -> None:
            together = connection.info.get(TOGETHER)
            if together is None:
                report(text)
            elif report is self._reports[0]:  # `report` of this database reports them to all
                together.append(text)

        def on_commit(connection: Connection) -> None:
            if connection.get_execution_options().get(_BEGIN):
                report("COMMIT")

        self._reports.append(report)
        event.listen(self._engine, _SENDING, on_statement)
        event.listen(self._engine, "commit", on_commit)
        try:
            yield
        finally:
            event.remove(self._engine, "commit", on_commit)
            event.remove(self._engine, _SENDING, on_statement)
            self._reports.remove(report)

    def report(self, statement: str) -> None:
        """Report a statement to all traces; SQLAlchemy does not see it, or only parts of it."""
        for report in tuple(self._reports):  # a copy, because another thread may end its trace
            report(statement)

    @contextmanager
    def keep_connection(self) -> Iterator[None]:
        """Keep a connection to a server open for the transactions inside the block.

        Outside of such a block there is none: hours pass between saves, and a cluster has more
        ranks than a server has connections. (A connection to a file is cheap and always kept.)
        """
        with self._keepers_lock:
            self._keepers += 1
        try:
            yield
        finally:
            with self._keepers_lock:
                self._keepers -= 1
                if not self._keepers and not self.is_sqlite:
                    self._engine.dispose()

    def transact(
        self,
        call: Callable[[Connection], T],
        *,
        writes: bool,
        one: bool = False,
        lock: str = "",
        if_unknown: Callable[[], tuple[T] | None] = lambda: None,
    ) -> T:
        """Run a transaction, with retries, until it succeeds or fails for good; return its result.

        Args:
            call: does the work and returns the result; it must change nothing but the database.
            writes: whether it may change the database.
            one: whether it is one statement, which is sent without BEGIN and COMMIT.
            lock: SQL that is sent together with BEGIN to a server.
            if_unknown: called if the answer to the commit was lost; returns the result in a tuple,
                or None if the transaction may be run again.
        """
        backoff = Backoff(self._retry_seconds)
        while True:
            is_committing = False
            try:
                with self._connected(writes=writes, one=one, lock=lock) as connection:
                    is_committing = writes and one
                    result = call(connection)
                    is_committing = writes
                return result
            except DBAPIError as error:
                text = self.shown_error(error)
                if is_committing and self._is_unknown(error, text):
                    outcome = self._find_out(error, text, if_unknown)
                    if outcome is not None:
                        return outcome[0]
                elif not is_transient(
                    error, text, is_sqlite=self.is_sqlite, was_connected=self._was_connected
                ):
                    raise self._translate(error) from error
                if not backoff.wait():
                    raise self._translate(error) from error

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Yield a connection in a transaction that commits at the end of the block, or not at all.

        There is no retry, so the block may do more than change the database.
        """
        with self._translated(), self._connected(writes=True) as connection:
            yield connection

    @contextmanager
    def outside(self) -> Iterator[sqlite3.Connection]:
        """Yield SQLite's own connection outside of a transaction, for statements that need that."""
        with self._changing(), self._translated(), self._engine.connect() as connection:
            driver = connection.connection.driver_connection
            assert isinstance(driver, sqlite3.Connection)
            yield driver

    @contextmanager
    def read_only(self) -> Iterator[Connection]:
        """Yield a separate connection on which the database itself refuses to write."""
        if self.is_sqlite:
            engine = create_engine("sqlite://", creator=self._connect_read_only, poolclass=NullPool)
            event.listen(engine, "begin", _begin)
        else:
            engine = server_engine(self._url, poolclass=NullPool)
        with self._translated(), self._connect(engine) as connection:
            if self.is_sqlite:
                connection.execution_options(**{_BEGIN: "BEGIN"})
            else:
                connection.execution_options(postgresql_readonly=True)
            yield connection

    def shown_error(self, error: BaseException) -> str:
        """Return the database's text of an error, without the statement, its values, a password."""
        original = error.orig if isinstance(error, DBAPIError) else error
        text = " ".join(str(original).split())
        password = self._url.password
        return text.replace(str(password), "***") if password else text

    def _connect(self, engine: Engine) -> Connection:
        try:
            return engine.connect()
        except OSError as error:  # in this process, before the driver has reached the server
            raise DcpstoreError(
                f"cannot connect to the catalog {self.shown}: {error.strerror}. Nothing was "
                "changed; free what this process ran out of, and try again ('ulimit -n' raises the "
                "limit of open files)."
            ) from error

    def _connect_sqlite(self) -> sqlite3.Connection:
        # 'rw' fails if the file is missing: looking for a repository must not create one.
        connection = self._open_sqlite("rwc" if self.may_create_file else "rw")
        # In WAL mode only FULL makes a commit survive a loss of power (invariant 3).
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        # In KiB. Rows of a large save go to random places of an index: with the 2 MB that are the
        # default, its pages would be written and read again many times in one transaction.
        connection.execute("PRAGMA cache_size = -65536")
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
        """Raise the database's errors as ours."""
        try:
            yield
        except DBAPIError as error:
            raise self._translate(error) from error
        except (sqlite3.Error, PoolTimeoutError) as error:
            raise self._translate(DBAPIError(None, None, error)) from error

    def _translate(self, error: DBAPIError) -> DcpstoreError:
        return translate(
            error,
            self.shown_error(error),
            shown=self.shown,
            file=self.file,
            name=self._url.database or "",
            busy_seconds=self._busy_seconds,
        )

    def _changing(self) -> AbstractContextManager[None]:
        """Refuse to write inside another transaction of this thread: it would wait for itself."""
        place = self.shown if self.file is None else os.path.realpath(self.file)
        return changing(f"catalog {place}", shown=f"the catalog {self.shown}")

    def _is_unknown(self, error: DBAPIError, text: str) -> bool:
        """Tell whether a commit that failed with this error may have been carried out."""
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
    def _connected(
        self, *, writes: bool, one: bool = False, lock: str = ""
    ) -> Iterator[Connection]:
        """Yield a connection in a transaction; errors are those of the database."""
        with ExitStack() as stack:
            if writes:
                stack.enter_context(self._changing())
                if self._queue is not None:
                    stack.enter_context(self._queue.turn())
            stack.enter_context(self.keep_connection())
            connection = stack.enter_context(self._connect(self._engine))
            self._was_connected = True
            begin = self._begin_writing(lock) if writes else self._begin_reading()
            connection.execution_options(**{_BEGIN: "" if one else begin, TOGETHER: self.report})
            if writes:
                with connection.begin():
                    yield connection
            else:  # begins with its first statement; one that asks nothing sends nothing
                yield connection
                connection.commit()

    def _begin_reading(self) -> str:
        # So that all queries of the transaction see the same snapshot.
        return "BEGIN" if self.is_sqlite else "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"

    def _begin_writing(self, lock: str) -> str:
        """Return the statements that begin a transaction that writes.

        On a server it waits for a lock as long as on SQLite. If it is idle for ten minutes, it is
        ended: a process that lost its network would hold its locks.
        """
        if self.is_sqlite:
            return "BEGIN IMMEDIATE"
        begin = (
            f"BEGIN; SET LOCAL lock_timeout = {self._busy_seconds * 1000:.0f}; "
            "SET LOCAL idle_in_transaction_session_timeout = 600000"
        )
        return f"{begin}; {lock}" if lock else begin


def _begin(connection: Connection) -> None:
    """Send what begins the transaction: the drivers do not."""
    statements = connection.get_execution_options().get(_BEGIN, "")
    if statements:
        connection.exec_driver_sql(statements)
