"""What an error of the database means: whether a try again is safe, and what to tell people.

Invariant: a try again is called safe only where the database is known to have changed nothing, or
to have taken the change back.
"""

from __future__ import annotations

import random
import time

from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError

from dcpstore.errors import (
    ConflictError,
    CorruptionError,
    DcpstoreError,
    InvalidInputError,
    NotFoundError,
    SchemaError,
)

__all__ = ["Patience", "UnknownOutcomeError", "is_lost", "is_passing", "translate"]

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
