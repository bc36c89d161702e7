"""Bulk insert: very many new rows, without SQLAlchemy's work on each; by COPY on Postgres.

A save of thousands of tensors writes tens of thousands of rows, and the time spent on each row is
most of its transaction. Invariant: values are converted by the types of their columns, as in any
statement, and errors are those that any statement raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain, islice
from typing import Any

from sqlalchemy import Connection, Table

from dcpstore.catalog.db.db_errors import driver_errors
from dcpstore.catalog.db.together import sent_together

__all__ = ["RowsOfTables", "insert_rows", "insert_unknown"]

_ROWS = 20_000  # converted at a time, which bounds the memory
_FEW = 500  # rows that Postgres gets as arrays, in one round trip; COPY takes two
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
    if connection.dialect.name == "sqlite":
        for batch in _bound(connection, table, names, rows):
            _insert(connection, f"INSERT INTO {target} VALUES", list(batch))
        return
    left = iter(rows)
    few = list(islice(left, _FEW + 1))
    if len(few) > _FEW:
        batches = _bound(connection, table, names, chain(few, left))
        _copy(connection, f"COPY {target} FROM STDIN", chain.from_iterable(batches))
    for batch in _bound(connection, table, names, few if len(few) <= _FEW else ()):
        columns = tuple(list(column) for column in zip(*batch, strict=True))
        source = _unnested(connection, table, names)
        connection.exec_driver_sql(f"INSERT INTO {target} {source}", columns)


class RowsOfTables:
    """Rows of several tables, which are inserted together at the end; few of them at once."""

    def __init__(self) -> None:
        self._parts: list[tuple[Table, Sequence[str], list[Row], Iterator[Row]]] = []

    def add(self, table: Table, names: Sequence[str], rows: Iterable[Row]) -> None:
        """Add rows, as `insert_rows` takes them; tables are filled in the order of these calls."""
        left = iter(rows)
        self._parts.append((table, names, list(islice(left, _FEW + 1)), left))

    def insert(self, connection: Connection) -> None:
        """Insert the rows that were added: few of them in one round trip."""
        parts = [part for part in self._parts if part[2]]
        self._parts.clear()
        if not parts:
            return
        are_few = all(len(few) <= _FEW for _, _, few, _ in parts)
        with sent_together(connection) if are_few else nullcontext():
            for table, names, few, left in parts:
                insert_rows(connection, table, names, chain(few, left))


def insert_unknown(
    connection: Connection, table: Table, names: Sequence[str], rows: Iterable[Row]
) -> None:
    """Insert the rows of which no unique index has one yet.

    Another transaction may insert an equal row at the same time: this one waits until that ends.
    Two that insert the same rows in another order would wait for each other, so the caller sorts
    them.
    """
    quote = connection.dialect.identifier_preparer.quote
    target = f"INSERT INTO {quote(table.name)} ({', '.join(map(quote, names))})"
    for batch in _bound(connection, table, names, rows):
        if connection.dialect.name == "sqlite":
            values = f"({', '.join('?' * len(names))})"
            connection.exec_driver_sql(
                f"{target} VALUES {values} ON CONFLICT DO NOTHING", list(batch)
            )
        else:
            columns = tuple(list(column) for column in zip(*batch, strict=True))
            source = _unnested(connection, table, names)
            connection.exec_driver_sql(f"{target} {source} ON CONFLICT DO NOTHING", columns)


def _unnested(connection: Connection, table: Table, names: Sequence[str]) -> str:
    """Return Postgres's query of rows of which each column is a parameter, an array."""
    kinds = [table.c[name].type.compile(connection.dialect) for name in names]
    arrays = ", ".join(f"%s::{kind.split(' COLLATE')[0]}[]" for kind in kinds)
    return f"SELECT * FROM unnest({arrays})"


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
