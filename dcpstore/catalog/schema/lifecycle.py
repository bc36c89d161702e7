"""The life of a catalog's schema: created once, checked on each open, upgraded.

Invariant: if many processes create the catalog of one database at once, one of them creates it and
the others find it complete. The check and the creation are one transaction with the write lock.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from sqlalchemy import Connection, func, insert, inspect, select, text

from dcpstore.catalog.db.database import Database
from dcpstore.catalog.schema import revisions, tables
from dcpstore.core.progress import ProgressBar
from dcpstore.errors import (
    AlreadyExistsError,
    CorruptionError,
    DcpstoreError,
    InvalidInputError,
    NotFoundError,
    SchemaError,
)
from dcpstore.records import ChunkDefaults, RepositoryRecord, UpgradePlan

if TYPE_CHECKING:
    from dcpstore.catalog.schema.migrate import Preparation

__all__ = [
    "FORMAT_VERSION",
    "create_repository",
    "open_repository",
    "plan_upgrade",
    "restore_repository",
    "upgrade_schema",
]

T = TypeVar("T")

FORMAT_VERSION = 1
_CREATION_LOCK = 0x6463_7073  # the key of an advisory lock of Postgres; any fixed number will do
_WAL_SECONDS = 30.0
# After each batch of an upgrade. On SQLite a process that waits for the lock looks for it ten times
# a second, and would not find it free.
_PAUSE = 0.1  # seconds

_log = logging.getLogger(__name__)


class _SchemaState(NamedTuple):
    """The contents of a database: nothing, or a catalog at a revision."""

    empty: bool
    revision: str


def open_repository(database: Database, *, data_url: str | None) -> RepositoryRecord:
    """Return the repository's record.

    Raises:
        NotFoundError: there is no catalog, or the database cannot be reached.
        InvalidInputError: it has another `data_url`.
        SchemaError: the database is not a catalog, or its schema is not the one of this dcpstore.
    """
    record = (
        None
        if database.is_missing
        else database.transact(lambda connection: _find_record(connection, database), writes=False)
    )
    if record is None:
        raise NotFoundError(
            f"no repository at {database.shown}. Check the URL, or create one with "
            "'dcpstore init URL --data FOLDER'."
        )
    kept = record.data_url
    if database.file is not None and "://" not in kept:
        kept = str(database.file.parent / kept)
    if data_url is not None and not _is_same_place(data_url, kept):
        raise InvalidInputError(
            f"the repository at {database.shown} keeps its data in {kept!r}, not in {data_url!r}; "
            "leave data= out. If they were moved there, move them back, or make a new catalog "
            "from them with 'dcpstore rebuild'."
        )
    return record


def _is_same_place(one: str, other: str) -> bool:
    """Tell whether two URLs or paths mean the same place."""
    return one == other or (
        "://" not in one + other and os.path.realpath(one) == os.path.realpath(other)
    )


def create_repository(
    database: Database,
    *,
    data_url: str | None,
    chunk: ChunkDefaults | None,
    make_data: Callable[[], object],
) -> RepositoryRecord:
    """Create the catalog in an empty database, and return the repository's record.

    `make_data` creates the place of its data. It is called after the database was found empty, and
    before the catalog is created, so that no failure leaves a catalog behind.

    Raises:
        AlreadyExistsError: there is a catalog; another process may have created it just now.
        InvalidInputError: `data_url` is missing.
        SchemaError: the database has other tables.
    """
    if data_url is None:
        raise InvalidInputError(
            f"the new repository at {database.shown} has no place for its data; pass data=, "
            "a folder or the URL of an object store."
        )
    with _creating(database) as connection:
        existing = _find_record(connection, database)
        if existing is not None:
            raise AlreadyExistsError(
                f"{database.shown} is already a repository ({existing.uid}). Use it, or give "
                "another place."
            )
        make_data()
        _migrate(connection)
        now = datetime.now(UTC)
        _insert_record(
            connection,
            RepositoryRecord(
                uid=uuid.uuid4().hex,
                format_version=FORMAT_VERSION,
                data_url=data_url,
                chunk=chunk or ChunkDefaults(),
                created_at=now,
            ),
        )
        connection.execute(
            insert(tables.operation).values(
                number=1, kind="init", target="", author="", created_at=now
            )
        )
        return _read_record(connection)


def restore_repository(url: str, record: RepositoryRecord, fill: Callable[[Connection], T]) -> T:
    """Create the catalog of a repository that was lost and fill it, in one transaction.

    Raises:
        AlreadyExistsError: the database is not empty.
    """
    with closing(Database(url)) as database, _creating(database) as connection:
        if inspect(connection).get_table_names():
            raise AlreadyExistsError(
                f"the database {database.shown} is not empty, and a rebuild never changes an "
                "existing one. Give it an empty database, or move this one away first."
            )
        _migrate(connection)
        _insert_record(connection, record)
        return fill(connection)


def upgrade_schema(url: str) -> tuple[str, str]:
    """Upgrade the tables of an older catalog; return the revisions before and after.

    Most of the work is done in many short transactions, beside the tables that are in use; a last
    one puts the new tables in their place. Until then dcpstore of the older schema can use the
    catalog. An upgrade that was interrupted goes on where it was, and two at once share the work.

    Raises:
        NotFoundError: there is no catalog.
        SchemaError: the database is not a catalog, or newer than this dcpstore.
        CorruptionError: the catalog is damaged where it must be read.
    """
    with _upgradable(url) as (database, before):
        found = before
        if before != revisions.HEAD:
            with _damage_explained(database):
                _prepare(database, before)
                found = database.transact(
                    lambda connection: _upgrade(database, connection),
                    writes=True,
                    if_unknown=lambda: _if_upgraded(database, before),
                )
        _compact(database)
    return found, revisions.HEAD


def plan_upgrade(url: str) -> UpgradePlan:
    """Return what `upgrade_schema` would do, with an estimate of rows, bytes and time.

    A sample, the newest versions, is converted into temporary tables and measured. Nothing of the
    catalog is changed or locked.

    Raises:
        NotFoundError: there is no catalog.
        SchemaError: the database is not a catalog, or newer than this dcpstore.
        CorruptionError: the catalog is damaged where it must be read.
    """
    with _upgradable(url) as (database, before), _damage_explained(database):
        found = [
            # On Postgres even a temporary table is refused to a transaction that only reads.
            database.transact(preparation.estimate, writes=not database.is_sqlite)
            for preparation in _preparations(before)
        ]
    return UpgradePlan(before, revisions.HEAD, *map(sum, zip(*found, strict=True)))


@contextmanager
def _upgradable(url: str) -> Iterator[tuple[Database, str]]:
    """Yield the database of a catalog of this or an older schema, and its revision."""
    with closing(Database(url)) as database:
        found = (
            _SchemaState(True, "")
            if database.is_missing
            else database.transact(
                lambda connection: _look(database, connection, older_is_fine=True), writes=False
            )
        )
        if found.empty:
            raise NotFoundError(f"no repository at {database.shown}. Check the path or URL.")
        with database.keep_connection():
            yield database, found.revision


@contextmanager
def _damage_explained(database: Database) -> Iterator[None]:
    """Raise what a migration says of a value that it cannot read as an error of ours."""
    try:
        yield
    except DcpstoreError:
        raise
    except (ValueError, TypeError) as error:
        raise CorruptionError(
            f"the catalog {database.shown} is damaged and was not upgraded ({error!r}). The older "
            "dcpstore can still use it, and its 'dcpstore verify' says what is damaged; restore it "
            "from a backup, or make a new one from the data with 'dcpstore rebuild'."
        ) from error


def _prepare(database: Database, revision: str) -> None:
    """Do what the migrations can do while others use the catalog."""

    def step(connection: Connection, preparation: Preparation) -> int:
        _lock(database, connection)
        found = _look(database, connection, older_is_fine=True)
        # Another process may have ended the upgrade meanwhile.
        return preparation.step(connection) if found.revision == revision else 0

    with ProgressBar("upgrade", shown=True, unit="entries") as bar:
        for preparation in _preparations(revision):
            bar.begin("converting", database.transact(preparation.left, writes=False))
            while done := database.transact(partial(step, preparation=preparation), writes=True):
                bar.advance(done)
                if database.is_sqlite:
                    time.sleep(_PAUSE)


def _upgrade(database: Database, connection: Connection) -> str:
    """Run the migrations, unless another process has; return the revision before."""
    _lock(database, connection)
    found = _look(database, connection, older_is_fine=True)
    if found.revision != revisions.HEAD:
        _migrate(connection)
    return found.revision


def _if_upgraded(database: Database, before: str) -> tuple[str] | None:
    """Return what `_upgrade` did return if it was committed, though the answer was lost."""
    now = database.transact(
        lambda connection: _look(database, connection, older_is_fine=True), writes=False
    )
    return (before,) if now.revision == revisions.HEAD else None


def _compact(database: Database) -> None:
    """Give free space of an SQLite file back, if it is more than half of the file.

    An upgrade leaves so much; a server gives the space of dropped tables back itself.
    """
    if not database.is_sqlite:
        return
    try:
        with database.outside() as driver:
            free, pages = (
                driver.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("freelist_count", "page_count")
            )
            if free > pages // 2:
                driver.execute("VACUUM")
    except DcpstoreError as error:
        _log.warning(
            "the upgrade is complete, but the file keeps its size, more than half of it free: %s "
            "To give the space back, run 'dcpstore db-upgrade' again.",
            error,
        )


@contextmanager
def _creating(database: Database) -> Iterator[Connection]:
    """Yield a connection in a transaction that may create the catalog; one process at a time."""
    database.may_create_file = True
    if database.is_sqlite:
        # SQLite cannot change the journal mode inside a transaction.
        with database.outside() as driver:
            _enter_wal(driver)
    with database.write() as connection:
        _lock(database, connection)
        yield connection


def _insert_record(connection: Connection, record: RepositoryRecord) -> None:
    connection.execute(
        insert(tables.repository).values(
            id=1,
            uid=record.uid,
            format_version=record.format_version,
            data_url=record.data_url,
            chunk_nbytes=record.chunk.nbytes,
            chunk_codec=record.chunk.codec,
            created_at=record.created_at,
            last_version=0,
            last_operation=1,
            last_journaled=0,
        )
    )


def _enter_wal(driver: sqlite3.Connection) -> None:
    """Put the file in WAL mode, for good.

    SQLite does not wait for a lock in this statement, so this function retries it.
    """
    deadline = time.monotonic() + _WAL_SECONDS
    while True:
        try:
            driver.execute("PRAGMA journal_mode = WAL").fetchone()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _lock(database: Database, connection: Connection) -> None:
    """Wait until no other process creates or upgrades; on SQLite the write lock does this."""
    if not database.is_sqlite:
        connection.execute(select(func.pg_advisory_xact_lock(_CREATION_LOCK)))


def _look(
    database: Database, connection: Connection, *, older_is_fine: bool = False
) -> _SchemaState:
    """Return the state of the database; raise SchemaError if this dcpstore cannot use it."""
    names = set(inspect(connection).get_table_names())
    if not names:
        return _SchemaState(True, "")
    revision = None
    if {"alembic_version", "repository", "version", "entry"} <= names:
        revision = connection.scalar(text("SELECT version_num FROM alembic_version"))
    if revision is None:
        raise SchemaError(
            f"{database.shown} is not a dcpstore catalog: it has other tables "
            f"({', '.join(sorted(names)[:5])}). Give it a database of its own."
        )
    if revision == revisions.HEAD or (older_is_fine and revisions.is_older(revision)):
        return _SchemaState(False, revision)
    if revisions.is_older(revision):
        raise SchemaError(
            f"the catalog {database.shown} is of an older dcpstore (schema {revision}, now "
            f"{revisions.HEAD}). Upgrade it with 'dcpstore db-upgrade --repo {database.shown}'."
        )
    raise SchemaError(
        f"the catalog {database.shown} is of a newer dcpstore (schema {revision}, this one knows "
        f"{revisions.HEAD}); update dcpstore."
    )


def _find_record(connection: Connection, database: Database) -> RepositoryRecord | None:
    """Return the repository's record, or None in an empty database."""
    return None if _look(database, connection).empty else _read_record(connection)


def _read_record(connection: Connection) -> RepositoryRecord:
    row = connection.execute(select(tables.repository)).one()
    return RepositoryRecord(
        uid=row.uid,
        format_version=row.format_version,
        data_url=row.data_url,
        chunk=ChunkDefaults(nbytes=row.chunk_nbytes, codec=row.chunk_codec),
        created_at=row.created_at,
    )


def _preparations(revision: str) -> list[Preparation]:
    """Return what migrations do before they run."""
    found = import_module("dcpstore.catalog.schema.migrate").preparations(revision)
    return list(found)


def _migrate(connection: Connection) -> None:
    """Run the migrations; Alembic is imported here, for opening a catalog does not need it."""
    import_module("dcpstore.catalog.schema.migrate").migrate(connection)
