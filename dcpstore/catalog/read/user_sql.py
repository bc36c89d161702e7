"""SQL queries of users, on a connection on which the database itself refuses to write.

There are three barriers, each enough for the usual accident: a query must begin with a word such as
SELECT; it is one statement; and the connection is read-only (on SQLite an authorizer also refuses
ATTACH and PRAGMA; on Postgres the transaction is read-only).

A mistake in the query is an `InvalidInputError`; a failure of the database is an error of its own.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
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

__all__ = ["Table", "query_rows", "query_table", "unused_parameters"]

T = TypeVar("T")
Table = tuple[list[str], list[Row]]
_Answer = tuple[list[str], list[tuple[Any, ...]]]
_SHOWN = 200  # characters of a query in a message
_COMMENT = r"--[^\n]*(?:\n|\Z)|/\*.*?\*/"
_QUERY = re.compile(
    rf"(?:\s|{_COMMENT}|\()*(?:select|with|values|explain|table)\b", re.IGNORECASE | re.DOTALL
)
# Strings, names and comments of Postgres, whose colons are not parameters; casts; parameters.
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
# Codes of failures of the database, where the query is not to blame. The Postgres classes are:
# connection, rollback, resources, a lock, operator intervention, system error, internal error.
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
    """Return the columns and rows of one query, in which `:name` is a parameter.

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
    run = _run_sqlite if database.is_sqlite else _run_postgres
    with database.read_only() as connection:
        database.report(sql)
        driver = connection.dialect.loaded_dbapi
        try:
            values = {name: _parameter(name, value) for name, value in params.items()}
            columns, rows = run(connection.connection.driver_connection, sql, values)
            return columns, [Row(columns, [_value(value) for value in row]) for row in rows]
        except (driver.Error, driver.Warning, OverflowError) as error:
            if _is_failure(error, driver):
                connection.invalidate()  # else the pool would try to roll it back, and warn
                raise DBAPIError.instance(
                    None, None, error, driver.Error, dialect=connection.dialect
                ) from error
            if lacking := [name for name in _parameters(sql) if name not in params]:
                raise _missing_error(lacking) from error
            raise InvalidInputError(
                f"the database refused {_short(sql)!r}: "
                f"{database.shown_error(error).rstrip('.')}. The views are {', '.join(VIEWS)}."
            ) from error


def query_rows(catalog: OpenCatalog, sql: str, params: Mapping[str, object]) -> list[Row]:
    """Return only the rows of `query_table`; each knows the names of its columns."""
    return query_table(catalog, sql, params)[1]


def unused_parameters(sql: str, names: Iterable[str]) -> list[str]:
    """Return which of these names are not parameters of a query."""
    # SQLite also takes @name and $name.
    used = {*_parameters(sql), *re.findall(r"[@$](\w+)", sql)}
    return [name for name in names if name not in used]


def _parameters(sql: str) -> list[str]:
    """Return the names of the parameters, each once, in their order."""
    found = (match["name"] for match in _PARAMETER.finditer(sql))
    return list(dict.fromkeys(name for name in found if name))


def _missing_error(names: Sequence[str]) -> InvalidInputError:
    named = ", ".join(f":{name}" for name in names)
    options = " ".join(f"-p {name}=..." for name in names)
    keywords = ", ".join(f"{name}=..." for name in names)
    return InvalidInputError(f"no value for {named}; pass {options} (repo.sql(query, {keywords})).")


# The drivers' connections are `Any`: psycopg, an extra, may be missing when mypy runs.
def _run_sqlite(connection: Any, sql: str, params: dict[str, object]) -> _Answer:
    connection.set_authorizer(_authorize)

    def execute() -> _Answer:
        cursor = connection.execute(sql, params)
        return [column[0] for column in cursor.description or ()], cursor.fetchall()

    return _interruptible(execute, connection.interrupt)


def _interruptible(call: Callable[[], T], interrupt: Callable[[], None]) -> T:
    """Return the result of `call`; a signal that raises here, such as Ctrl-C, interrupts it.

    `call` runs in another thread, for Python handles signals only in the main thread, and not while
    that is inside SQLite. (A progress handler of SQLite would let Python handle them, but it loses
    the exceptions that they raise, and waits for other threads each time.)
    """
    with ThreadPoolExecutor(1) as thread:
        called = thread.submit(call)
        try:
            return called.result()
        except BaseException:
            while not called.done():  # an interrupt before the query begins has no effect
                interrupt()
                wait([called], 0.01)
            raise


def _run_postgres(connection: Any, sql: str, params: dict[str, object]) -> _Answer:
    # A prepared statement uses the extended protocol, which accepts only one statement.
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
    """Tell whether the database failed, and not the query."""
    if isinstance(error, sqlite3.Error):
        code = getattr(
            error, "sqlite_errorcode", sqlite3.SQLITE_ERROR
        )  # `sqlite3` raises some errors without a code
        return code & 0xFF in _FAILURES_SQLITE
    state: str | None = getattr(error, "sqlstate", None)
    if state is None:  # raised by the driver: for its arguments, or for the connection
        return isinstance(error, driver.OperationalError | driver.InterfaceError)
    return state.startswith(_FAILURES_POSTGRES)


def _parameter(name: str, value: object) -> object:
    """Return a parameter for the driver: times as in the views, NumPy's numbers as Python's."""
    if isinstance(value, str):
        check_text(value, what=f"parameter {name!r}")
    elif not isinstance(value, bytes | bytearray | memoryview):
        value = _own_number(name, value)
    return _utc_text(value) if isinstance(value, datetime) else value


def _own_number(name: str, value: Any) -> object:
    """Return the number in an object with a buffer, which SQLite would store as a BLOB."""
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
    """Return a value of Postgres as SQLite returns it."""
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
