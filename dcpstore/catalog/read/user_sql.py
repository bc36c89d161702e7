"""Questions in SQL by people, on a connection on which the database itself refuses to write.

Three walls, each enough for the usual accident: only words that begin a query are let through; one
statement at a time; and the connection is read-only (SQLite also asks an authorizer, so that ATTACH
and PRAGMA are out; Postgres a read-only transaction).

What the question is to blame for is the asker's error; a database that fails is the database's.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, TypeVar

from sqlalchemy.exc import DBAPIError

from dcpstore.catalog.db.transactions import OpenCatalog
from dcpstore.catalog.schema.views import VIEWS
from dcpstore.catalog.validation import check_text
from dcpstore.errors import InvalidInputError
from dcpstore.records import Row

__all__ = ["Table", "query_rows", "query_table"]

T = TypeVar("T")
Table = tuple[list[str], list[Row]]
_Answer = tuple[list[str], list[tuple[Any, ...]]]
_SHOWN = 200  # characters of a query in a message
_COMMENT = r"--[^\n]*(?:\n|\Z)|/\*.*?\*/"
_QUERY = re.compile(
    rf"(?:\s|{_COMMENT}|\()*(?:select|with|values|explain|table)\b", re.IGNORECASE | re.DOTALL
)
# What may hide a colon in Postgres's SQL, then a parameter, then the driver's own sign.
_PARAMETER = re.compile(
    rf"""(?<![\w$])[eE]'(?:[^'\\]|\\.|'')*'|'(?:[^']|'')*'|"(?:[^"]|"")*"|{_COMMENT}"""
    r"|\$(?P<tag>\w*)\$.*?\$(?P=tag)\$|::|:(?P<name>[A-Za-z_]\w*)",
    re.DOTALL,
)
_READS = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}
# How a database tells that it failed, and not the question: SQLite by a code; Postgres by one of
# connections, conflicts, resources, a lock, operators, the system or its own mistakes.
_FAILURES_SQLITE = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_PROTOCOL,
}
_FAILURES_POSTGRES = ("08", "40", "53", "55P03", "57", "58", "XX")


def query_table(catalog: OpenCatalog, sql: str, params: Mapping[str, object]) -> Table:
    """Return the columns and rows of one query; `:name` in it stands for a parameter.

    Both databases give the same values: numbers as int or float, times as text in UTC.

    Raises:
        InvalidInputError: it is not a query, or the database refuses it.
        CorruptionError: the catalog is damaged.
    """
    check_text(sql, what="query")
    if not _QUERY.match(sql):
        raise InvalidInputError(
            f"{_short(sql)!r} is not a query; begin with SELECT, WITH, VALUES or EXPLAIN. "
            "The catalog changes only through dcpstore's own commands."
        )
    database = catalog.database
    ask = _ask_sqlite if database.is_sqlite else _ask_postgres
    with database.read_only() as connection:
        database.report(sql)
        driver = connection.dialect.loaded_dbapi
        try:
            values = {name: _parameter(name, value) for name, value in params.items()}
            columns, rows = ask(connection.connection.driver_connection, sql, values)
            return columns, [Row(columns, [_value(value) for value in row]) for row in rows]
        except (driver.Error, driver.Warning, OverflowError) as error:
            if _is_failure(error, driver):
                connection.invalidate()  # or its pool would put it in order, and complain
                raise DBAPIError.instance(
                    None, None, error, driver.Error, dialect=connection.dialect
                ) from error
            raise InvalidInputError(
                f"the database refused {_short(sql)!r}: {database.shown_error(error)}. "
                f"The views to ask are {', '.join(VIEWS)}."
            ) from error


def query_rows(catalog: OpenCatalog, sql: str, params: Mapping[str, object]) -> list[Row]:
    """Return the rows alone, each of which knows its columns; else as `query_table`."""
    return query_table(catalog, sql, params)[1]


# The drivers' connections are Any: mypy knows psycopg only where it is installed.
def _ask_sqlite(connection: Any, sql: str, params: dict[str, object]) -> _Answer:
    connection.set_authorizer(_authorize)

    def answer() -> _Answer:
        cursor = connection.execute(sql, params)
        return [column[0] for column in cursor.description or ()], cursor.fetchall()

    return _interruptible(answer, connection.interrupt)


def _interruptible(call: Callable[[], T], interrupt: Callable[[], None]) -> T:
    """Return what `call` returns; a signal that raises here, such as Ctrl-C, interrupts it.

    It runs in a thread, for Python handles signals in the main one alone, and not while SQLite has
    that. (SQLite's progress handler would let them through as well, but loses what they raise, and
    waits for other threads of Python each time.)
    """
    with ThreadPoolExecutor(1) as thread:
        called = thread.submit(call)
        try:
            return called.result()
        except BaseException:
            while not called.done():  # what has not begun yet takes no notice
                interrupt()
                wait([called], 0.01)
            raise


def _ask_postgres(connection: Any, sql: str, params: dict[str, object]) -> _Answer:
    # Preparing it takes the extended protocol, which has room for one statement only.
    cursor = connection.execute(_in_psycopg_style(sql), params, prepare=True)
    return [column.name for column in cursor.description or ()], cursor.fetchall()


def _authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    if action == sqlite3.SQLITE_FUNCTION and second == "load_extension":
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK if action in _READS else sqlite3.SQLITE_DENY


def _in_psycopg_style(sql: str) -> str:
    """Return `sql` with `%(name)s` for `:name` outside of strings, names and comments."""

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        return f"%({name})s" if name else match[0].replace("%", "%%")

    pieces = []
    at = 0
    for match in _PARAMETER.finditer(sql):
        pieces += [sql[at : match.start()].replace("%", "%%"), replace(match)]
        at = match.end()
    return "".join([*pieces, sql[at:].replace("%", "%%")])


def _is_failure(error: BaseException, driver: Any) -> bool:
    """Tell whether the database failed, where it is not the question that is wrong."""
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)  # none: Python's own words
        return code & 0xFF in _FAILURES_SQLITE
    state: str | None = getattr(error, "sqlstate", None)
    if state is None:  # the driver's own words: of what it was given, or of the connection
        return isinstance(error, driver.OperationalError | driver.InterfaceError)
    return state.startswith(_FAILURES_POSTGRES)


def _parameter(name: str, value: object) -> object:
    """Return a time as the views show it, and a number of numpy's as Python's; else as it is."""
    if isinstance(value, str):
        check_text(value, what=f"parameter {name!r}")
    elif not isinstance(value, bytes | bytearray | memoryview):
        value = _own_number(name, value)
    return _utc_text(value) if isinstance(value, datetime) else value


def _own_number(name: str, value: Any) -> object:
    """Return the number in an object that lends its bytes, which SQLite would take for a BLOB."""
    try:
        memoryview(value)
    except TypeError:
        return value
    try:
        number: object = value.item()
    except (AttributeError, ValueError):
        raise InvalidInputError(
            f"parameter {name!r} is a {type(value).__name__}; give text, a number, bytes, a time "
            "or None."
        ) from None
    return number


def _value(value: object) -> object:
    """Return a value of Postgres as SQLite would give it."""
    if isinstance(value, Decimal):
        is_whole = value.is_finite() and value == value.to_integral_value()
        return int(value) if is_whole else float(value)
    return _utc_text(value) if isinstance(value, datetime) else value


def _utc_text(time: datetime) -> str:
    utc = time.astimezone(UTC) if time.tzinfo else time
    return utc.strftime("%Y-%m-%d %H:%M:%S.%f")


def _short(sql: str) -> str:
    text = " ".join(sql.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
