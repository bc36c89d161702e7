"""What nothing names any more: trees become loose, tensors and runs are deleted with their rows.

Invariants: a node that loses a version or a parent becomes `loose`, and a pack that loses chunks
`unjudged`. So gc looks at these only, and what it costs follows what changed.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, delete, exists, insert, select, update

from dcpstore.catalog.db.bulk_insert import insert_rows
from dcpstore.catalog.db.key_lists import wanted_ids
from dcpstore.catalog.schema import tables

__all__ = [
    "forget_chunks",
    "forget_runs",
    "forget_tensors",
    "judge_again",
    "loosen",
    "loosen_nodes",
]

_tensor, _chunk, _run = tables.tensor, tables.chunk, tables.run


def loosen(connection: Connection, versions: Select[Any]) -> None:
    """Cut versions off from their trees; a query gives their ids."""
    version = tables.version
    is_one = version.c.id.in_(versions)
    loosen_nodes(connection, select(version.c.root).where(is_one, version.c.root.is_not(None)))
    connection.execute(update(version).where(is_one).values(root=None))


def loosen_nodes(connection: Connection, nodes: Select[Any]) -> None:
    """Have gc look whether anything else has these nodes; a query gives their ids."""
    loose, node = tables.loose, tables.node
    new = select(node.c.id).where(node.c.id.in_(nodes), node.c.id.not_in(select(loose.c.node)))
    connection.execute(insert(loose).from_select(["node"], new))


def forget_tensors(connection: Connection, ids: Collection[int]) -> set[int]:
    """Delete those of these tensors that no entry names, and the runs that only they had.

    Returns the pages that held these runs.
    """
    dead = _unused(connection, ids, ~exists().where(tables.entry.c.tensor == _tensor.c.id))
    if not dead:
        return set()
    gone = wanted_ids(connection, dead)
    runs = connection.scalars(delete(_run).where(_run.c.tensor.in_(gone)).returning(_run.c.run))
    left = set(runs)
    connection.execute(delete(tables.alias).where(tables.alias.c.tensor.in_(gone)))
    _delete(connection, dead)
    return forget_runs(connection, left)


def forget_runs(connection: Connection, ids: Collection[int]) -> set[int]:
    """Delete those of these runs that no tensor has; return the pages that held them."""
    return _delete(
        connection, _unused(connection, ids, ~exists().where(_run.c.run == _tensor.c.id))
    )


def forget_chunks(connection: Connection, ids: Collection[int]) -> None:
    """Delete the chunks of these tensors and runs."""
    chunks = delete(_chunk).where(_chunk.c.tensor.in_(wanted_ids(connection, ids)))
    packs = set(connection.scalars(chunks.returning(_chunk.c.pack)))
    judge_again(connection, packs)


def judge_again(connection: Connection, packs: Collection[int]) -> None:
    """Have gc look how much of these packs is used, which are given by id."""
    if packs:
        table = tables.unjudged
        known = connection.scalars(
            select(table.c.pack).where(table.c.pack.in_(wanted_ids(connection, packs)))
        )
        new = set(packs) - set(known)
        insert_rows(connection, table, ("pack",), ((pack,) for pack in new))


def _unused(
    connection: Connection, ids: Collection[int], condition: ColumnElement[bool]
) -> list[int]:
    if not ids:
        return []
    query = select(_tensor.c.id).where(_tensor.c.id.in_(wanted_ids(connection, ids)), condition)
    return list(connection.scalars(query))


def _delete(connection: Connection, ids: Collection[int]) -> set[int]:
    """Delete tensors or runs and their chunks; return the pages that held runs."""
    if not ids:
        return set()
    forget_chunks(connection, ids)
    gone = delete(_tensor).where(_tensor.c.id.in_(wanted_ids(connection, ids)))
    return set(connection.scalars(gone.returning(_tensor.c.page))) - {None}
