"""What a collection would condemn: a dry run asks by queries alone, and takes no lock.

Invariant: it finds what `condemn` would, as of one moment. Where `condemn` deletes rows, and looks
in the next slice at what these had named, a preview looks level by level at the rows that would be
gone, and counts nothing that only they name.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Select, exists, select, union

from dcpstore.catalog.db.key_lists import wanted_ids
from dcpstore.catalog.db.transactions import reads
from dcpstore.catalog.maintenance.condemn import (
    Condemned,
    check_running,
    is_crashed,
    is_unused,
    sparse_packs,
)
from dcpstore.catalog.maintenance.expire import find_forgotten
from dcpstore.catalog.schema import tables
from dcpstore.records import PackRecord

__all__ = ["preview"]

_version, _plan, _page = tables.version, tables.plan, tables.page
_node, _child, _entry = tables.node, tables.child, tables.entry
_tensor, _run, _pack, _chunk = tables.tensor, tables.run, tables.pack, tables.chunk


@reads
def preview(
    connection: Connection,
    *,
    now: datetime,
    grace: timedelta,
    lease: timedelta,
    live_share: float,
) -> Condemned:
    """Return what `condemn` would with the same arguments, and change nothing.

    Raises:
        InvalidInputError: a save is running that is older than `grace`.
    """
    is_lost = is_crashed(now=now, lease=lease)
    check_running(connection, now=now, grace=grace, among=~is_lost)
    crashed = connection.execute(
        select(_version.c.id, _version.c.uid).where(is_lost).order_by(_version.c.uid)
    ).all()
    dropped = find_forgotten(connection)
    # Both lose their trees; only those that were forgotten lose their plans too.
    forgotten = [version for version, _ in dropped]
    cut = wanted_ids(connection, [*(row.id for row in crashed), *forgotten])
    nodes, sets = _dead_nodes(connection, cut)
    tensors = _dead_tensors(connection, sets)
    pages = _dead_pages(
        connection,
        nodes=nodes,
        tensors=tensors,
        plans=_dead_plans(connection, wanted_ids(connection, forgotten)),
    )
    gone = wanted_ids(connection, tensors)
    among = select(
        union(
            select(tables.unjudged.c.pack), select(_chunk.c.pack).where(_chunk.c.tensor.in_(gone))
        ).subquery()
    )
    is_kept = _chunk.c.tensor.not_in(gone)
    condemned = connection.execute(
        select(_pack.c.key, _pack.c.nbytes)
        .where(is_unused(now=now, lease=lease, among=among, is_kept=is_kept))
        .order_by(_pack.c.key)
    )
    return Condemned(
        condemned=[PackRecord(*row) for row in condemned],
        sparse=sparse_packs(connection, live_share, among=among, is_kept=is_kept),
        pages=pages,
        crashed=[row.uid for row in crashed],
        dropped=[uid for _, uid in dropped],
    )


def _dead_nodes(connection: Connection, cut: Select[Any]) -> tuple[list[int], list[int]]:
    """Return the nodes that nothing names any more, and those of them that are sets.

    `cut` are versions that lose their trees, by id.
    """
    dead: list[int] = []
    above: list[int] = []  # the dead ones one level up, which are all that can name a node
    for level in (2, 1, 0):
        parents = wanted_ids(connection, above)
        lost = union(
            select(tables.loose.c.node),
            select(_version.c.root).where(_version.c.id.in_(cut), _version.c.root.is_not(None)),
            select(_child.c.child).where(_child.c.node.in_(parents)),
        )
        above = list(
            connection.scalars(
                select(_node.c.id).where(
                    _node.c.level == level,
                    _node.c.id.in_(select(lost.subquery())),
                    ~exists().where(_version.c.root == _node.c.id, _version.c.id.not_in(cut)),
                    ~exists().where(_child.c.child == _node.c.id, _child.c.node.not_in(parents)),
                )
            )
        )
        dead += above
    return dead, above


def _dead_tensors(connection: Connection, sets: Collection[int]) -> list[int]:
    """Return the tensors that only these entry sets name, and the runs that only those have."""
    gone, other = wanted_ids(connection, sets), _entry.alias()
    dead = connection.scalars(
        select(_entry.c.tensor)
        .where(
            _entry.c.node.in_(gone),
            _entry.c.tensor.is_not(None),
            ~exists().where(other.c.tensor == _entry.c.tensor, other.c.node.not_in(gone)),
        )
        .distinct()
    ).all()
    tensors, rest = wanted_ids(connection, dead), _run.alias()
    runs = connection.scalars(
        select(_run.c.run)
        .where(
            _run.c.tensor.in_(tensors),
            ~exists().where(rest.c.run == _run.c.run, rest.c.tensor.not_in(tensors)),
        )
        .distinct()
    )
    return [*dead, *runs]


def _dead_plans(connection: Connection, dropped: Select[Any]) -> list[int]:
    """Return the plans that only these versions have, which are given by id, or none."""
    is_used = exists().where(_version.c.plan == _plan.c.id, _version.c.id.not_in(dropped))
    return list(connection.scalars(select(_plan.c.id).where(~is_used)))


def _dead_pages(
    connection: Connection,
    *,
    nodes: Collection[int],
    tensors: Collection[int],
    plans: Collection[int],
) -> list[PackRecord]:
    """Return the pages that hold only these nodes, runs and plans."""
    gone = [
        (table, wanted_ids(connection, ids))
        for table, ids in ((_node, nodes), (_tensor, tensors), (_plan, plans))
    ]
    lost = union(*(select(table.c.page).where(table.c.id.in_(ids)) for table, ids in gone))
    rows = connection.execute(
        select(_page.c.key, _page.c.nbytes)
        .where(
            _page.c.id.in_(select(lost.subquery())),
            *(
                ~exists().where(table.c.page == _page.c.id, table.c.id.not_in(ids))
                for table, ids in gone
            ),
        )
        .order_by(_page.c.key)
    )
    return [PackRecord(*row) for row in rows]
