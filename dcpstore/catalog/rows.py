"""Very many new rows at once: past SQLAlchemy's work for each, by COPY where there is a server.

A save of thousands of tensors writes tens of thousands of rows, and what is spent on each is most
of its transaction. Invariant: values are bound by the types of their columns, as in any statement,
and an error is what any statement would raise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from sqlalchemy import Connection, Table
from sqlalchemy.exc import DBAPIError

__all__ = ["insert_rows"]

_ROWS = 20_000  # of one statement of SQLite: bounds the memory, not the meaning

Row = Sequence[Any]


def insert_rows(
    connection: Connection, table: Table, names: Sequence[str], rows: Iterable[Row]
) -> None:
    """Insert rows into a table; each has the values of the columns of these names, in their order.

    Nothing is returned, for to have ids returned costs more than all the rest.
    """
    quote = connection.dialect.identifier_preparer.quote
    target = f"{quote(table.name)} ({', '.join(map(quote, names))})"
    bound = _bound(connection, table, names, rows)
    if connection.dialect.name == "sqlite":
        marks = ", ".join("?" * len(names))
        while batch := list(islice(bound, _ROWS)):
            connection.exec_driver_sql(f"INSERT INTO {target} VALUES ({marks})", batch)
    else:
        _copy(connection, f"COPY {target} FROM STDIN", bound)


def _bound(
    connection: Connection, table: Table, names: Sequence[str], rows: Iterable[Row]
) -> Iterator[tuple[Any, ...]]:
    """Yield the rows as the driver takes them."""
    dialect = connection.dialect
    types = [table.c[name].type.dialect_impl(dialect) for name in names]
    processors = [(i, kind.bind_processor(dialect)) for i, kind in enumerate(types)]
    needed = [(i, process) for i, process in processors if process is not None]
    for row in rows:
        values = list(row)
        for i, process in needed:
            values[i] = process(values[i])
        yield tuple(values)


def _copy(connection: Connection, statement: str, rows: Iterable[Row]) -> None:
    """Send rows down one COPY, of which SQLAlchemy knows nothing."""
    dialect = connection.dialect
    driver: Any = connection.connection.driver_connection
    assert dialect.loaded_dbapi is not None, "there is a connection"
    kind: Any = dialect.loaded_dbapi.Error
    try:
        with driver.cursor() as cursor, cursor.copy(statement) as copy:
            for row in rows:
                copy.write_row(row)
    except kind as error:
        is_lost = dialect.is_disconnect(error, driver, None)
        if is_lost:
            connection.invalidate(error)
        raise DBAPIError.instance(
            statement, None, error, kind, connection_invalidated=is_lost, dialect=dialect
        ) from error
