"""The trees that no version has any more, deleted node by node in slices.

Gc looks at loose nodes only: those that lost a version or a parent. Invariant: a node is deleted
only if no version and no other node names it, and its children then become loose; so after the
last slice nothing is loose, and every node is reached from a version.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from sqlalchemy import Connection, delete, exists, select, update

from dcpstore.catalog.db.key_lists import wanted_ids
from dcpstore.catalog.schema import tables
from dcpstore.catalog.write.forget import forget_tensors, loosen_nodes

__all__ = ["condemn_unused_pages", "sweep"]

_node, _child, _entry, _loose = tables.node, tables.child, tables.entry, tables.loose
_SLICE = 500  # nodes that one transaction looks at: about 32,000 entries


def sweep(connection: Connection, *, now: datetime) -> bool:
    """Look at one slice of the loose nodes; return whether it was the last one."""
    left = _SLICE
    while left > 0:
        nodes = connection.scalars(select(_loose.c.node).order_by(_loose.c.node).limit(left)).all()
        if not nodes:
            return True
        left -= len(nodes)
        _look_at(connection, nodes, now=now)
    return connection.scalar(select(_loose.c.node).limit(1)) is None


def _look_at(connection: Connection, nodes: Collection[int], *, now: datetime) -> None:
    """Delete those of these loose nodes that nothing names; the others are not loose any more."""
    looked_at = wanted_ids(connection, nodes)
    connection.execute(delete(_loose).where(_loose.c.node.in_(looked_at)))
    dead = connection.scalars(
        select(_node.c.id).where(
            _node.c.id.in_(looked_at),
            ~exists().where(tables.version.c.root == _node.c.id),
            ~exists().where(_child.c.child == _node.c.id),
        )
    ).all()
    if not dead:
        return
    gone = wanted_ids(connection, dead)
    loosen_nodes(connection, select(_child.c.child).where(_child.c.node.in_(gone)))
    connection.execute(delete(_child).where(_child.c.node.in_(gone)))
    entries = connection.execute(
        delete(_entry).where(_entry.c.node.in_(gone)).returning(_entry.c.tensor, _entry.c.fqn)
    ).all()
    pages = connection.scalars(delete(_node).where(_node.c.id.in_(gone)).returning(_node.c.page))
    held = set(pages) - {None}
    held |= forget_tensors(connection, {row.tensor for row in entries} - {None})
    condemn_unused_pages(connection, held, now=now)  # last: runs name pages too
    _forget_fqns(connection, {row.fqn for row in entries})


def condemn_unused_pages(connection: Connection, pages: Collection[int], *, now: datetime) -> None:
    """Condemn those of these pages that no node, run or plan names."""
    if not pages:
        return
    page = tables.page
    named = (tables.node.c.page, tables.tensor.c.page, tables.plan.c.page)
    connection.execute(
        update(page)
        .where(
            page.c.id.in_(wanted_ids(connection, pages)),
            *(~exists().where(column == page.c.id) for column in named),
        )
        .values(status="condemned", condemned_at=now, stale=None)
    )


def _forget_fqns(connection: Connection, fqns: Collection[int]) -> None:
    """Delete those of these FQNs that no entry has."""
    if not fqns:
        return
    fqn = tables.fqn
    connection.execute(
        delete(fqn).where(
            fqn.c.id.in_(wanted_ids(connection, fqns)), ~exists().where(_entry.c.fqn == fqn.c.id)
        )
    )
