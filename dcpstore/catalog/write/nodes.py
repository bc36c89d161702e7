"""The rows of a version's tree of entries: nodes, children, entries, and the dictionary of FQNs.

Invariants: a node whose digest is known is not written again, and a transaction writes the rows
below a node only if it inserted the node itself. So two that write equal nodes at the same time
both find it whole afterwards.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Table, select

from dcpstore.catalog.db.bulk_insert import RowsOfTables, insert_new
from dcpstore.catalog.db.key_lists import wanted_digests
from dcpstore.catalog.schema import tables
from dcpstore.catalog.schema.tables import fqn_digest
from dcpstore.formats.entry_tree import EntrySet, EntryTree

__all__ = ["dictionary", "known_nodes", "write_trees"]


def known_nodes(connection: Connection, trees: Sequence[EntryTree]) -> dict[bytes, int]:
    """Return the ids of the nodes of these trees that the catalog has, by digest."""
    return _ids(connection, tables.node, _levels(trees).keys())


def write_trees(
    connection: Connection,
    trees: Sequence[EntryTree],
    known: Mapping[bytes, int],
    tensors: Mapping[str, int],
    last: RowsOfTables,
) -> dict[bytes, int]:
    """Write the nodes that the catalog does not have; return the ids of all, by digest.

    Args:
        connection: in the transaction that writes the version.
        trees: of entries; they may lack nodes that are known.
        known: the ids of the nodes that the catalog has, of those that the trees have or name.
        tensors: the ids of all tensors that entries of new sets name, by digest.
        last: takes the rows to which none refer.
    """
    levels = _levels(trees)
    new = insert_new(
        connection,
        tables.node,
        ("digest", "level"),
        sorted((digest, levels[digest]) for digest in levels.keys() - known.keys()),
    )
    ids = {**known, **new}
    if raced := levels.keys() - ids.keys():  # another transaction has written them meanwhile
        ids |= _ids(connection, tables.node, raced)
    sets = {one.digest: one for tree in trees for one in tree.sets if one.digest in new}.values()
    groups = {one.digest: one for tree in trees for one in (*tree.groups, tree.root)}.values()
    fqns = _write_fqns(connection, sets)
    last.add(
        tables.entry,
        ("node", "fqn", "kind", "tensor", "value"),
        (
            (
                ids[one.digest],
                fqns[fqn_digest(entry.fqn, entry.path)],
                entry.kind,
                entry.tensor_digest and tensors[entry.tensor_digest],
                entry.value,
            )
            for one in sets
            for entry in one.entries
        ),
    )
    last.add(
        tables.child,
        ("node", "first", "child"),
        (
            (ids[group.digest], child.first, ids[child.digest])
            for group in groups
            if group.digest in new
            for child in group.children
        ),
    )
    return ids


def dictionary(
    connection: Connection, table: Table, names: Sequence[str], rows: Mapping[bytes, Sequence[Any]]
) -> dict[bytes, int]:
    """Return the ids of rows by their digest, which is the first column; insert those missing."""
    ids = _ids(connection, table, rows.keys())
    new = sorted(rows.keys() - ids.keys())
    ids |= insert_new(connection, table, names, (rows[digest] for digest in new))
    if raced := rows.keys() - ids.keys():  # another transaction has inserted them meanwhile
        ids |= _ids(connection, table, raced)
    return ids


def _write_fqns(connection: Connection, sets: Collection[EntrySet]) -> dict[bytes, int]:
    """Return the ids of the FQNs of these sets, by `fqn_digest`."""
    rows = {
        digest: (digest, entry.fqn, entry.path)
        for one in sets
        for entry in one.entries
        for digest in [fqn_digest(entry.fqn, entry.path)]
    }
    return dictionary(connection, tables.fqn, ("digest", "name", "path"), rows)


def _levels(trees: Sequence[EntryTree]) -> dict[bytes, int]:
    """Return the level of each node, by digest."""
    levels: dict[bytes, int] = {}
    for tree in trees:
        levels.update((one.digest, 0) for one in tree.sets)
        levels.update((one.digest, 1) for one in tree.groups)
        levels[tree.root.digest] = 2
    return levels


def _ids(connection: Connection, table: Table, digests: Collection[bytes]) -> dict[bytes, int]:
    if not digests:
        return {}
    wanted = wanted_digests(connection, digests)
    rows = connection.execute(
        select(table.c.digest, table.c.id).where(table.c.digest.in_(select(wanted.c.digest)))
    )
    return dict(rows.all())
