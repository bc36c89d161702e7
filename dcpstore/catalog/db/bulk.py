"""Very many rows or keys at once: new rows, and the keys that a query looks up.

A save of thousands of tensors writes tens of thousands of rows, and what is spent on each is most
of its transaction: rows go past SQLAlchemy's work for each, by COPY where there is a server.
Invariant: values are bound by the types of their columns, as in any statement, and an error is what
any statement would raise.

Many keys are one bound parameter. As so many parameters they would meet the databases' limits
(32,766 and 65,535) and cost a new statement for each length. Here the statement stays the same:
SQLite unpacks a JSON array, Postgres arrays. Names and ids are for IN: SQLite then looks each up in
an index, where a join would let it walk the keys again for each row.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from sqlalchemy import (
    ARRAY,
    CTE,
    BigInteger,
    ColumnElement,
    Connection,
    Integer,
    LargeBinary,
    Select,
    Table,
    TableValuedAlias,
    Text,
    cast,
    column,
    func,
    literal,
    select,
)
from sqlalchemy.exc import DBAPIError

from dcpstore.catalog.validation import can_be_kept
from dcpstore.records import ChunkRange

__all__ = [
    "insert_rows",
    "look_up_each",
    "wanted_digests",
    "wanted_ids",
    "wanted_names",
    "wanted_pairs",
    "wanted_ranges",
]

_ROWS = 20_000  # bound at once: bounds the memory, not the meaning
_AT_ONCE = 50  # rows of one statement of SQLite, which then spends a third less on each

Row = Sequence[Any]


def insert_rows(
    connection: Connection, table: Table, names: Sequence[str], rows: Iterable[Row]
) -> None:
    """Insert rows into a table; each has the values of the columns of these names, in their order.

    Nothing is returned, for to have ids returned costs more than all the rest.
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
    """Yield batches of the rows as the driver takes them, bound column by column."""
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
    """Send rows many to a statement, and those that are left one by one."""
    row = f"({', '.join('?' * len(rows[0]))})"
    left = len(rows) - len(rows) % _AT_ONCE
    for count, some in ((_AT_ONCE, rows[:left]), (1, rows[left:])):
        values = [
            tuple(chain.from_iterable(some[i : i + count])) for i in range(0, len(some), count)
        ]
        if values:
            connection.exec_driver_sql(f"{statement} {', '.join([row] * count)}", values)


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


def wanted_names(connection: Connection, names: Collection[str]) -> Select[Any]:
    """Return a query of these names, less those that no database can hold, nor even take."""
    names = [name for name in names if can_be_kept(name)]
    if connection.dialect.name == "sqlite":
        return select(_json_rows(names).c.value)
    return select(_unnested({"name": (Text(), names)}))


def wanted_ids(connection: Connection, ids: Collection[int]) -> Select[Any]:
    """Return a query of these ids."""
    if connection.dialect.name == "sqlite":
        return select(_json_rows(list(ids)).c.value)
    return select(_unnested({"id": (BigInteger(), list(ids))}))


def wanted_digests(connection: Connection, digests: Collection[bytes]) -> CTE:
    """Return a table of one column `digest`, of raw bytes."""
    if connection.dialect.name == "sqlite":
        rows = _json_rows([digest.hex() for digest in digests])
        return select(func.from_hex(rows.c.value, type_=LargeBinary).label("digest")).cte("wanted")
    return select(_unnested({"digest": (LargeBinary(), list(digests))})).cte("wanted")


def wanted_ranges(connection: Connection, ranges: Sequence[ChunkRange]) -> CTE:
    """Return a table of the columns of `ChunkRange`."""
    return _wanted_rows(connection, ChunkRange._fields, ranges)


def wanted_pairs(connection: Connection, pairs: Sequence[tuple[int, int]]) -> CTE:
    """Return a table of the columns `old` and `new`, of ids; `pairs` holds one at least."""
    return _wanted_rows(connection, ("old", "new"), pairs)


def _wanted_rows(
    connection: Connection, names: Sequence[str], rows: Sequence[tuple[int, ...]]
) -> CTE:
    """Return a table of integers with columns of these names."""
    if connection.dialect.name == "sqlite":
        given = _json_rows(list(rows))
        return select(
            *(
                cast(func.json_extract(given.c.value, f"$[{i}]"), Integer).label(name)
                for i, name in enumerate(names)
            )
        ).cte("wanted")
    columns = zip(*rows, strict=True)
    arrays = {
        name: (BigInteger(), list(values)) for name, values in zip(names, columns, strict=True)
    }
    return select(_unnested(arrays)).cte("wanted")


def look_up_each(connection: Connection) -> None:
    """Make this transaction look each wanted key up in an index.

    Postgres, before it has statistics of what a save has just written, would rather walk whole
    tables, and compare each wanted range with each chunk of its tensor.
    """
    if connection.dialect.name == "postgresql":
        off = [func.set_config(f"enable_{way}join", "off", True) for way in ("hash", "merge")]
        connection.execute(select(*off))


def _json_rows(values: list[Any]) -> Any:
    """Return SQLite's table of the elements of a JSON array, one column `value`."""
    return func.json_each(literal(json.dumps(values))).table_valued(column("value"), name="each")


def _unnested(columns: dict[str, tuple[Any, list[Any]]]) -> TableValuedAlias:
    """Return Postgres's table of arrays of equal length."""
    arrays: list[ColumnElement[Any]] = [
        literal(values, ARRAY(kind)) for kind, values in columns.values()
    ]
    names = [column(name, kind) for name, (kind, _) in columns.items()]
    return func.unnest(*arrays).table_valued(*names, name="each").render_derived()
