"""What database errors mean: which of them are retried, and which errors of ours they become.

Invariant: an error of ours shows the catalog without its password, and says whether anything was
changed.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError

from dcpstore.catalog.db.sqlite_file import CATALOG_FILE
from dcpstore.errors import (
    ConflictError,
    CorruptionError,
    DcpstoreError,
    InvalidInputError,
    NotFoundError,
    SchemaError,
)

__all__ = [
    "Backoff",
    "UnknownOutcomeError",
    "driver_errors",
    "is_lost",
    "is_transient",
    "translate",
]

_LONGEST_PAUSE = 5.0  # seconds between two attempts

# Postgres's codes of errors that pass: a serialization failure and a deadlock, whose transaction is
# rolled back; a server that shuts down, crashed, is starting, has no connection left, or is only a
# replica for now.
_TRANSIENT = ("40001", "40P01", "57P01", "57P02", "57P03", "53300", "25006")
_ENDED = ("57P01", "57P02", "57P03", "25P03")  # the server ended the session
# Messages of a server before there is a session, which come without a code.
_FULL = ("too many clients", "too many connections", "connection slots are reserved")
_STARTING = ("starting up", "shutting down", "in recovery mode", "not yet accepting connections")

_MISSING = re.compile(r'database "[^"]*" does not exist')

# The error of ours, and its message.
_Meaning = tuple[type[DcpstoreError], str]

_DUPLICATE: _Meaning = (
    ConflictError,
    "the catalog {shown} refused a row, for another process had inserted it first: {text}. Try "
    "again.",
)
_LOCKED: _Meaning = (
    ConflictError,
    "the catalog {shown} was locked by another process for more than {seconds:.0f} seconds "
    "({text}). Try again when it has finished.",
)
_CONTENDED: _Meaning = (
    ConflictError,
    "other processes kept changing the catalog {shown} at the same time ({text}). Nothing was "
    "changed; try again.",
)
_DAMAGED: _Meaning = (
    CorruptionError,
    "the catalog {shown} is damaged ({text}). Restore it from a backup, or make a new one in "
    "another place, from the data folder, with 'dcpstore rebuild'.",
)
# The next three have data of a repository beside the file; `{cure}` moves the file out of the way.
_DAMAGED_FILE: _Meaning = (
    CorruptionError,
    "the catalog {shown} is damaged ({text}). Restore it from a backup, or make a new one from the "
    "data. {cure}",
)
_OVERWRITTEN_FILE: _Meaning = (
    SchemaError,
    "{name} in {folder!r} is not a database ({text}), but the data of a repository are there. "
    "{cure}",
)
_CURE = (
    "Move {name} away ('mv {folder}/{name} {folder}/{name}.broken', also {name}-wal and "
    "{name}-shm if they exist), then 'dcpstore rebuild {folder} --into {into}'."
)
_NO_CONNECTION_LEFT: _Meaning = (
    DcpstoreError,
    "the server of the catalog {shown} has no connection left ({text}). Nothing was changed; raise "
    "its max_connections, or let fewer processes use it at a time.",
)
_UNREACHABLE: _Meaning = (
    NotFoundError,
    "cannot connect to the catalog {shown} ({text}). Check the URL, and that the server is running "
    "and accepts this user.",
)
_INVALID_URL: _Meaning = (InvalidInputError, "invalid catalog URL {shown}: {text}.")
_OTHER: _Meaning = (
    DcpstoreError,
    "the catalog {shown} failed: {text}. Nothing was changed; check the database and try again.",
)
_POSTGRES: dict[str | None, _Meaning] = {
    "40001": _CONTENDED,
    "40P01": _CONTENDED,
    "XX001": _DAMAGED,
    "XX002": _DAMAGED,
}
_NOT_A_DATABASE: _Meaning = (
    SchemaError,
    "{shown} is not a dcpstore catalog ({text}). Give the path of a repository, or a path where "
    "nothing exists yet.",
)
_WITH_DATA = {_DAMAGED: _DAMAGED_FILE, _NOT_A_DATABASE: _OVERWRITTEN_FILE}
_MISSING_DATABASE: _Meaning = (
    NotFoundError,
    "there is no database {name!r} at {shown} ({text}). Create it with 'createdb {name}', then "
    "'dcpstore init URL --data FOLDER'.",
)
# By words of the message: SQLite's messages are stable, and `sqlite3` has no code in some errors.
_SQLITE: dict[str, _Meaning] = {
    "locked": _LOCKED,
    "busy": _LOCKED,
    "not a database": _NOT_A_DATABASE,
    "malformed": _DAMAGED,
    "unable to open": (
        NotFoundError,
        "cannot open the catalog {shown} ({text}). Check that its folder exists and is writable. "
        "If it is mounted read-only, close the programs that have it open elsewhere, or read a "
        "copy of the folder.",
    ),
    "readonly": (
        DcpstoreError,
        "the catalog {shown} is not writable ({text}). Nothing was changed; check the permissions "
        "of the file and of its folder.",
    ),
    "is full": (
        DcpstoreError,
        "no space is left for the catalog {shown} ({text}). Nothing was changed; free some space "
        "('dcpstore gc' may), and try again.",
    ),
    "I/O error": (
        DcpstoreError,
        "the disk of the catalog {shown} failed ({text}). Nothing was changed; check the disk, "
        "then run 'dcpstore verify'.",
    ),
}


class UnknownOutcomeError(DcpstoreError):
    """The answer to a commit was lost: it may have been carried out."""

    kind = "unknown_outcome"


class Backoff:
    """The pauses between attempts: each is longer than the last, and all take `seconds` at most."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._pause = 0.05

    def wait(self) -> bool:
        """Pause before the next attempt; return False, at once, if the time is used up."""
        # Random, so that processes that failed together do not try again together.
        pause = self._pause * random.uniform(0.5, 1.0)
        if time.monotonic() + pause > self._end:
            return False
        time.sleep(pause)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        return True


@contextmanager
def driver_errors(connection: Connection, statement: str | None = None) -> Iterator[None]:
    """Raise the errors of the driver of a server as SQLAlchemy does, where it is passed by."""
    dialect = connection.dialect
    driver: Any = connection.connection.driver_connection
    assert dialect.loaded_dbapi is not None, "there is a connection"
    kind: Any = dialect.loaded_dbapi.Error
    try:
        yield
    except kind as error:
        lost = dialect.is_disconnect(error, driver, None)
        if lost:
            connection.invalidate(error)  # so that the pool does not lend it again
        raise DBAPIError.instance(
            statement, None, error, kind, connection_invalidated=lost, dialect=dialect
        ) from error


def is_lost(error: DBAPIError) -> bool:
    """Tell whether the connection to a server is lost, or was never made."""
    state = _state(error)
    no_session = isinstance(error, OperationalError | InterfaceError) and state is None
    return error.connection_invalidated or no_session or (state or "").startswith(("08", *_ENDED))


def is_transient(error: DBAPIError, text: str, *, is_sqlite: bool, was_connected: bool) -> bool:
    """Tell whether a transaction that failed, and changed nothing, may succeed in a retry.

    Args:
        error: as the database raised it.
        text: of the error.
        is_sqlite: which database it is.
        was_connected: whether there was a connection before. If not, a server that does not answer
            is more likely a mistake in the URL, which no retry helps.
    """
    if is_sqlite:
        return _sqlite_meaning(text) is _LOCKED
    if is_lost(error):
        return was_connected or any(words in text for words in (*_FULL, *_STARTING))
    return _state(error) in _TRANSIENT


def translate(
    error: DBAPIError, text: str, *, shown: str, file: Path | None, name: str, busy_seconds: float
) -> DcpstoreError:
    """Return an error of ours for a database error that left nothing changed.

    Args:
        error: as the database raised it.
        text: of the error.
        shown: the catalog, as people may see it.
        file: the file of a catalog on SQLite; None on Postgres.
        name: of the database on Postgres.
        busy_seconds: how long a transaction waits for a lock.
    """
    if isinstance(error, IntegrityError):
        kind, message = _DUPLICATE
    else:
        kind, message = (
            _postgres_meaning(error, text) if file is None else _file_meaning(file, text)
        )
    named = {"name": name, "folder": "", "cure": ""}
    if file is not None:
        folder = str(file.parent)
        into = folder if file.name == CATALOG_FILE else shown
        named = {"name": file.name, "folder": folder}
        named["cure"] = _CURE.format(**named, into=into)
    return kind(message.format(shown=shown, text=text, seconds=busy_seconds, **named))


def _file_meaning(file: Path, text: str) -> _Meaning:
    """Return what an error of SQLite means; a broken file beside a repository's data is its own."""
    meaning = _sqlite_meaning(text)
    has_data = os.path.isdir(file.parent / "operations")
    return _WITH_DATA.get(meaning, meaning) if has_data else meaning


def _sqlite_meaning(text: str) -> _Meaning:
    return next((meaning for words, meaning in _SQLITE.items() if words in text), _OTHER)


def _postgres_meaning(error: DBAPIError, text: str) -> _Meaning:
    state = _state(error)
    if state == "55P03":
        return _LOCKED
    if state == "53300" or any(words in text for words in _FULL):
        return _NO_CONNECTION_LEFT
    if is_lost(error):
        return _MISSING_DATABASE if _MISSING.search(text) else _UNREACHABLE
    # The driver refuses an option of the URL before it connects, and so without a code.
    return _INVALID_URL if "connection option" in text else _POSTGRES.get(state, _OTHER)


def _state(error: DBAPIError) -> str | None:
    """Return Postgres's code of an error; None where it did not come from the server."""
    state: str | None = getattr(error.orig, "sqlstate", None)
    return state
