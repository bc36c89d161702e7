"""Questions in SQL by people, on a connection on which the database itself refuses to write.

Three walls, each enough for the usual accident: only words that begin a query are let through; one
statement at a time; and the connection is read-only (SQLite also asks an authorizer, so that ATTACH
and PRAGMA are out; Postgres a read-only transaction).
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from dcpstore.catalog.engine import Database
from dcpstore.catalog.views import VIEWS
from dcpstore.errors import InvalidInputError
from dcpstore.records import Row

__all__ = ["run_query"]

_Answer = tuple[list[str], list[tuple[Any, ...]]]
_SHOWN = 200  # characters of a query in a message
_COMMENT = r"--[^\n]*(?:\n|\Z)|/\*.*?\*/"
_QUERY = re.compile(
    rf"(?:\s|{_COMMENT}|\()*(?:select|with|values|explain|table)\b", re.IGNORECASE | re.DOTALL
)
# What may hide a colon in Postgres's SQL, then a parameter, then the driver's own sign.
_PARAMETER = re.compile(
    rf"""'(?:[^']|'')*'|"(?:[^"]|"")*"|{_COMMENT}|\$(?P<tag>\w*)\$.*?\$(?P=tag)\$"""
    r"|::|:(?P<name>[A-Za-z_]\w*)",
    re.DOTALL,
)
_READS = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}


def run_query(database: Database, sql: str, params: Mapping[str, object]) -> list[Row]:
    """Return the rows of one query; `:name` in it stands for a parameter.

    Both databases give the same values: numbers as int or float, times as text in UTC.

    Raises:
        InvalidInputError: it is not a query, or the database refuses it.
    """
    if not _QUERY.match(sql):
        raise InvalidInputError(
            f"{_short(sql)!r} is not a query; begin with SELECT, WITH, VALUES, EXPLAIN or TABLE. "
            "The catalog changes only through dcpstore's own commands."
        )
    ask = _ask_sqlite if database.is_sqlite else _ask_postgres
    with database.read_only() as connection:
        driver = connection.dialect.loaded_dbapi
        values = {name: _parameter(value) for name, value in params.items()}
        try:
            columns, rows = ask(connection.connection.driver_connection, sql, values)
        except (driver.Error, driver.Warning, OverflowError) as error:
            raise InvalidInputError(
                f"the database refused {_short(sql)!r}: {database.shown_error(error)}. "
                f"The views to ask are {', '.join(VIEWS)}."
            ) from error
    return [Row(columns, [_value(value) for value in row]) for row in rows]


# The drivers' connections are Any: mypy knows psycopg only where it is installed.
def _ask_sqlite(connection: Any, sql: str, params: dict[str, object]) -> _Answer:
    connection.set_authorizer(_authorize)
    cursor = connection.execute(sql, params)
    return [column[0] for column in cursor.description or ()], cursor.fetchall()


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


def _parameter(value: object) -> object:
    """Return a time as the views show it; anything else as it is."""
    return _utc_text(value) if isinstance(value, datetime) else value


def _value(value: object) -> object:
    """Return a value of Postgres as SQLite would give it."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return _utc_text(value) if isinstance(value, datetime) else value


def _utc_text(time: datetime) -> str:
    utc = time.astimezone(UTC) if time.tzinfo else time
    return utc.strftime("%Y-%m-%d %H:%M:%S.%f")


def _short(sql: str) -> str:
    text = " ".join(sql.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
