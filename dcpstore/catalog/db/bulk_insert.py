"""Bulk insert: very many new rows, without SQLAlchemy's work on each; by COPY on Postgres.

A save of thousands of tensors writes tens of thousands of rows, and the time spent on each row is
most of its transaction. Invariant: values are converted by the types of their columns, as in any
statement, and errors are those that any statement raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from sqlalchemy import Connection, Table

from dcpstore.catalog.db.db_errors import driver_errors

__all__ = ["insert_rows"]

_ROWS = 20_000  # converted at a time, which bounds the memory
_AT_ONCE = 50  # rows of one statement; on SQLite a row then costs a third less

Row = Sequence[Any]


def insert_rows(
    connection: Connection, table: Table, names: Sequence[str], rows: Iterable[Row]
) -> None:
    """Insert rows into a table; each has the values of the columns of these names, in their order.

    Returns no ids, for they cost more than all the rest.
    """
    quote = connection.dialect.identifier_preparer.quote
    target = f"{quote(table.name)} ({', '.join(map(quote, names))})"
    batches = _bound(connection, table, names, rows)
    if connection.dialect.name == "sqlite":
        for batch in batches:
            _insert(connection, f"INSERT INTO {target} VALUES", list(batch))
    else:
        _copy(connection, f"COPY {target} FROM STDIN", chain.from_iterable(batches))


def _bound(
    connection: Connection, table: Table, names: Sequence[str], rows: Iterable[Row]
) -> Iterator[Iterable[tuple[Any, ...]]]:
    """Yield batches of the rows as the driver takes them, converted column by column."""
    dialect = connection.dialect
    types = [table.c[name].type.dialect_impl(dialect) for name in names]
    processors = [kind.bind_processor(dialect) for kind in types]
    left = iter(rows)
    while batch := list(islice(left, _ROWS)):
        columns = zip(processors, zip(*batch, strict=True), strict=True)
        yield zip(
            *(c if process is None else map(process, c) for process, c in columns), strict=True
        )


def _insert(connection: Connection, statement: str, rows: Sequence[Row]) -> None:
    """Insert rows with many to a statement, and the last few one by one."""
    row = f"({', '.join('?' * len(rows[0]))})"
    left = len(rows) - len(rows) % _AT_ONCE
    for count, some in ((_AT_ONCE, rows[:left]), (1, rows[left:])):
        values = [
            tuple(chain.from_iterable(some[i : i + count])) for i in range(0, len(some), count)
        ]
        if values:
            connection.exec_driver_sql(f"{statement} {', '.join([row] * count)}", values)


def _copy(connection: Connection, statement: str, rows: Iterable[Row]) -> None:
    """Send rows by one COPY, which SQLAlchemy does not support: so its errors are made here."""
    driver: Any = connection.connection.driver_connection
    with (
        driver_errors(connection, statement),
        driver.cursor() as cursor,
        cursor.copy(statement) as copy,
    ):
        for row in rows:
            copy.write_row(row)
