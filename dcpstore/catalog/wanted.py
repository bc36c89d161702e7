"""Many keys as one bound parameter: a table `wanted` that a query joins.

A list of keys as so many parameters would meet the databases' limits (32,766 and 65,535) and cost a
new statement for each length. Here the statement stays the same: SQLite unpacks a JSON array,
Postgres arrays.
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
    Text,
    cast,
    column,
    func,
    literal,
    select,
)

from dcpstore.records import ChunkRange

__all__ = ["wanted_digests", "wanted_ids", "wanted_names", "wanted_ranges"]


def wanted_names(connection: Connection, names: Collection[str]) -> CTE:
    """Return a table of one column `name`."""
    if connection.dialect.name == "sqlite":
        rows = _json_rows(list(names))
        return select(rows.c.value.label("name")).cte("wanted")
    return _unnested({"name": (Text(), list(names))})


def wanted_ids(connection: Connection, ids: Collection[int]) -> CTE:
    """Return a table of one column `id`."""
    if connection.dialect.name == "sqlite":
        rows = _json_rows(list(ids))
        return select(cast(rows.c.value, Integer).label("id")).cte("wanted")
    return _unnested({"id": (BigInteger(), list(ids))})


def wanted_digests(connection: Connection, digests: Collection[bytes]) -> CTE:
    """Return a table of one column `digest`, of raw bytes."""
    if connection.dialect.name == "sqlite":
        rows = _json_rows([digest.hex() for digest in digests])
        return select(func.from_hex(rows.c.value, type_=LargeBinary).label("digest")).cte("wanted")
    return _unnested({"digest": (LargeBinary(), list(digests))})


def wanted_ranges(connection: Connection, ranges: Sequence[ChunkRange]) -> CTE:
    """Return a table of the columns of `ChunkRange`."""
    if connection.dialect.name == "sqlite":
        rows = _json_rows(list(ranges))
        return select(
            *(
                cast(func.json_extract(rows.c.value, f"$[{i}]"), Integer).label(name)
                for i, name in enumerate(ChunkRange._fields)
            )
        ).cte("wanted")
    columns = zip(*ranges, strict=True)
    return _unnested(
        {
            name: (BigInteger(), list(values))
            for name, values in zip(ChunkRange._fields, columns, strict=True)
        }
    )


def _json_rows(values: list[Any]) -> Any:
    """Return SQLite's table of the elements of a JSON array, one column `value`."""
    return func.json_each(literal(json.dumps(values))).table_valued(column("value"), name="each")


def _unnested(columns: dict[str, tuple[Any, list[Any]]]) -> CTE:
    """Return Postgres's table of arrays of equal length."""
    arrays: list[ColumnElement[Any]] = [
        literal(values, ARRAY(kind)) for kind, values in columns.values()
    ]
    names = [column(name, kind) for name, (kind, _) in columns.items()]
    rows = func.unnest(*arrays).table_valued(*names, name="each").render_derived()
    return select(rows).cte("wanted")
