"""Binds many lookup keys of a query as one parameter.

A list of keys with a parameter for each would exceed the limits of the databases (32,766 and
65,535) and need a new statement for each length. Here the statement stays the same: SQLite unpacks
a JSON array, Postgres arrays. Names and ids are used with IN: then SQLite looks each up in an
index, while with a join it may scan the keys again for each row.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
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
    TableValuedAlias,
    Text,
    cast,
    column,
    func,
    literal,
    select,
)

from dcpstore.catalog.validation import can_be_kept

__all__ = [
    "look_up_each",
    "wanted_digests",
    "wanted_ids",
    "wanted_names",
    "wanted_pairs",
    "wanted_ranges",
    "wanted_sizes",
]


def wanted_names(connection: Connection, names: Collection[str]) -> Select[Any]:
    """Return a query of these names, without those that no database can contain or accept."""
    names = [name for name in names if can_be_kept(name)]
    if connection.dialect.name == "sqlite":
        return select(_json_rows(names).c.value)
    return select(_unnested({"name": (Text(), names)}))


def wanted_ids(connection: Connection, ids: Collection[int]) -> Select[Any]:
    """Return a query of these ids."""
    if connection.dialect.name == "sqlite":
        return select(_json_rows(list(ids)).c.value)
    return select(_unnested({"id": (BigInteger(), list(ids))}))


def wanted_digests(
    connection: Connection, digests: Collection[bytes], *, name: str = "wanted"
) -> CTE:
    """Return a table of one column `digest`, of raw bytes; to select from, or to join with.

    Two of one statement have different names.
    """
    if connection.dialect.name == "sqlite":
        # JSON has no bytes. `Database` adds the function `from_hex` to each connection.
        rows = _json_rows([digest.hex() for digest in digests])
        return select(func.from_hex(rows.c.value, type_=LargeBinary).label("digest")).cte(name)
    return select(_unnested({"digest": (LargeBinary(), list(digests))})).cte(name)


def wanted_ranges(connection: Connection, ranges: Sequence[tuple[int, int, int]]) -> CTE:
    """Return a table of the columns `tensor`, `first` and `last`; `ranges` is not empty."""
    return _wanted_rows(connection, ("tensor", "first", "last"), ranges)


def wanted_sizes(connection: Connection, sizes: Sequence[tuple[int, int]]) -> CTE:
    """Return a table of the columns `id` and `size`; `sizes` is not empty."""
    return _wanted_rows(connection, ("id", "size"), sizes)


def wanted_pairs(connection: Connection, pairs: Sequence[tuple[int, int]]) -> CTE:
    """Return a table of the columns `old` and `new`, of ids; `pairs` is not empty."""
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

    Until Postgres has statistics of the rows that a save has just written, it would scan whole
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
