"""The trees of entries, in queries: down from versions to tensors, and up from tensors to versions.

Every tree has three levels (see `formats.entry_tree`), so both ways are joins of a fixed number.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    CTE,
    CompoundSelect,
    FromClause,
    ScalarSelect,
    Select,
    SelectBase,
    select,
    union_all,
)

from dcpstore.catalog.schema import tables

__all__ = [
    "holding_tensors",
    "holding_versions",
    "sets_below",
    "sets_of",
    "wanted_sets",
    "with_runs",
]

_version, _entry, _run = tables.version, tables.entry, tables.run
# As the node above a group or a set names it.
_group, _set = tables.child.alias("group_child"), tables.child.alias("set_child")


def sets_of(version: int | ScalarSelect[Any]) -> Select[tuple[int]]:
    """Return a query of the ids of the entry sets of a version, which is given by id."""
    return sets_below(_root(version))


def sets_below(root: int | ScalarSelect[Any]) -> Select[tuple[int]]:
    """Return a query of the ids of the entry sets in the tree of a root, which is given by id."""
    return (
        select(_set.c.child)
        .select_from(_group)
        .join(_set, _set.c.node == _group.c.child)
        .where(_group.c.node == root)
    )


def wanted_sets(version: int | ScalarSelect[Any], names: Select[Any]) -> CTE:
    """Return a table (name, node): for each of these FQNs, the set that has it if any has.

    Each is found in a few steps down the tree of the version, which is given by id.
    """
    wanted = names.subquery("wanted_names")
    name = wanted.c[0]

    def child(alias: FromClause, node: ScalarSelect[Any]) -> ScalarSelect[Any]:
        return (
            select(alias.c.child)
            .where(alias.c.node == node, alias.c.first <= name)
            .order_by(alias.c.first.desc())
            .limit(1)
            .correlate(wanted)
            .scalar_subquery()
        )

    node = child(_set, child(_group, _root(version)))
    return select(name.label("name"), node.label("node")).cte("wanted_sets")


def holding_versions(tensors: SelectBase) -> Select[tuple[int, int, int]]:
    """Return a query (version, fqn, tensor), by id, of the entries that have any of the tensors.

    Some rows may come twice.
    """
    return (
        select(_version.c.id.label("version"), _entry.c.fqn, _entry.c.tensor)
        .select_from(_entry)
        .join(_set, _set.c.child == _entry.c.node)
        .join(_group, _group.c.child == _set.c.node)
        .join(_version, _version.c.root == _group.c.node)
        .where(_entry.c.tensor.in_(tensors))
    )


def holding_tensors(chunked: Select[Any]) -> CompoundSelect[Any]:
    """Return a query of the tensors that have chunks which belong to a tensor or a run of these."""
    return union_all(chunked, select(_run.c.tensor).where(_run.c.run.in_(chunked)))


def with_runs(tensors: Select[Any]) -> CompoundSelect[Any]:
    """Return a query of these tensors and of all their runs."""
    return union_all(tensors, select(_run.c.run).where(_run.c.tensor.in_(tensors)))


def _root(version: int | ScalarSelect[Any]) -> ScalarSelect[Any]:
    return select(_version.c.root).where(_version.c.id == version).scalar_subquery()
