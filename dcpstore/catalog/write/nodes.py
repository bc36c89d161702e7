"""The rows of a version's tree of entries: nodes, children, entries, and the dictionary of FQNs.

Invariants: a node whose digest is known is not written again, and a transaction writes the rows
below a node only if it inserts the node itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dcpstore.catalog.db.bulk_insert import RowsOfTables
from dcpstore.catalog.schema import tables
from dcpstore.catalog.schema.tables import fqn_digest
from dcpstore.catalog.write.row_ids import RowIds
from dcpstore.formats.entry_tree import EntryTree

__all__ = ["add_nodes", "levels_of"]


def levels_of(trees: Sequence[EntryTree]) -> dict[bytes, int]:
    """Return the level of each node, by digest."""
    levels: dict[bytes, int] = {}
    for tree in trees:
        levels.update((one.digest, 0) for one in tree.sets)
        levels.update((one.digest, 1) for one in tree.groups)
        levels[tree.root.digest] = 2
    return levels


def add_nodes(
    last: RowsOfTables,
    trees: Sequence[EntryTree],
    levels: Mapping[bytes, int],
    ids: RowIds,
    *,
    fqns: RowIds,
    tensors: RowIds,
    homes: Mapping[bytes, int | None],
) -> None:
    """Add the new nodes of trees, and what is new below them.

    Args:
        last: takes the rows.
        trees: of entries; they may lack nodes that are known.
        levels: of the nodes that may be new, by digest.
        ids: of these nodes and of those that they name, by digest.
        fqns: ids of the FQNs of these sets, by `fqn_digest`.
        tensors: ids of the tensors that entries of these sets name, by digest.
        homes: ids of the pages that hold the new nodes, by digest.
    """
    new = {held: ids.new[held] for held in sorted(levels.keys() & ids.new.keys())}
    sets = {one.digest: one for tree in trees for one in tree.sets if one.digest in new}
    groups = {
        one.digest: one for tree in trees for one in (*tree.groups, tree.root) if one.digest in new
    }
    entries = [(held, entry) for held, one in sets.items() for entry in one.entries]
    keys = [fqn_digest(entry.fqn, entry.path) for _, entry in entries]
    names = {key: entry for key, (_, entry) in zip(keys, entries, strict=True) if key in fqns.new}
    last.add(
        tables.fqn,
        ("id", "digest", "name", "path"),
        [(fqns.new[key], key, names[key].fqn, names[key].path) for key in sorted(names)],
    )
    last.add(
        tables.node,
        ("id", "digest", "level", "page"),
        [(held, digest, levels[digest], homes.get(digest)) for digest, held in new.items()],
    )
    last.add(
        tables.entry,
        ("node", "fqn", "kind", "tensor", "value"),
        (
            (
                new[held],
                fqns[key],
                entry.kind,
                entry.tensor_digest and tensors[bytes.fromhex(entry.tensor_digest)],
                entry.value,
            )
            for key, (held, entry) in zip(keys, entries, strict=True)
        ),
    )
    last.add(
        tables.child,
        ("node", "first", "child"),
        (
            (new[held], child.first, ids[child.digest])
            for held, group in groups.items()
            for child in group.children
        ),
    )
