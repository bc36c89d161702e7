"""Where nodes, runs and plans lie in the data folder, and what a page is to hold.

Invariant: a node, run or plan that is said to lie in an object is named by a row, so gc keeps that
object. What was upgraded from a catalog without pages lies in none, until it is written again.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from operator import itemgetter
from typing import Any, NamedTuple

from sqlalchemy import Connection, LargeBinary, Select, cast, func, null, select

from dcpstore.catalog.db.key_lists import wanted_digests, wanted_ids, wanted_names
from dcpstore.catalog.db.transactions import reads, reads_once
from dcpstore.catalog.read.entries import load_shards, load_tensors, load_whole_tensors
from dcpstore.catalog.schema import tables
from dcpstore.catalog.schema.tables import hex_start
from dcpstore.core.digests import RUN
from dcpstore.errors import ConflictError, CorruptionError
from dcpstore.formats.entry_tree import Child, EntrySet, Group, entry_set, group
from dcpstore.formats.page import Run, runs_of
from dcpstore.records import NewEntry, NewTensor, PlanRecord, TensorRecord

__all__ = ["StoredPage", "find_objects", "find_pages", "find_runs", "load_page", "load_plan_of"]

_node, _page, _tensor, _plan = tables.node, tables.page, tables.tensor, tables.plan


@reads_once
def find_pages(connection: Connection, nodes: Collection[bytes]) -> dict[bytes, str]:
    """Return the keys of the pages that hold these nodes, by digest."""
    if not nodes:
        return {}
    return dict(connection.execute(_pages_of(connection, nodes)).all())


def _pages_of(connection: Connection, nodes: Collection[bytes]) -> Select[Any]:
    wanted = wanted_digests(connection, nodes)
    return (
        select(_node.c.digest, _page.c.key)
        .join(_page, _page.c.id == _node.c.page)
        .where(_node.c.digest.in_(select(wanted.c.digest)))
    )


@reads_once
def find_runs(connection: Connection, runs: Collection[bytes]) -> dict[bytes, str]:
    """Return the keys of the pages that hold these runs, by digest."""
    if not runs:
        return {}
    starts = wanted_names(connection, {run.hex()[:20] for run in runs})
    rows = connection.execute(
        select(_tensor.c.digest, _page.c.key)
        .join(_page, _page.c.id == _tensor.c.page)
        .where(hex_start(_tensor.c.digest).in_(starts))
    )
    return {digest: key for digest, key in rows.all() if digest in runs}


@reads_once
def find_objects(
    connection: Connection, nodes: Collection[bytes], plan: str
) -> tuple[dict[bytes, str], str | None]:
    """Return what `find_pages` does, and the key of the object that holds a plan, if any does."""
    of_plan = (
        select(cast(null(), LargeBinary), _page.c.key)
        .join(_plan, _plan.c.page == _page.c.id)
        .where(_plan.c.digest == plan)
    )
    rows = connection.execute(_pages_of(connection, nodes).union_all(of_plan))
    places: dict[bytes | None, str] = dict(rows.all())
    own = places.pop(None, None)
    return {node: key for node, key in places.items() if node is not None}, own


class StoredPage(NamedTuple):
    """What a page is to hold.

    Attributes:
        sets, groups: its nodes; groups with their levels.
        tensors: those of its sets, by digest, each with all its chunks.
        runs: that lie in it, or in no page although its tensors have them.
        elsewhere: the pages of the nodes and runs that it only names, by digest.
    """

    sets: list[EntrySet]
    groups: list[tuple[int, Group]]
    tensors: dict[str, NewTensor]
    runs: list[Run]
    elsewhere: dict[bytes, str]


@reads
def load_page(connection: Connection, key: str) -> StoredPage:
    """Return what the page of this key is to hold, with the places of chunks as they are now.

    Raises:
        CorruptionError: the catalog lacks some of it.
    """
    page = select(_page.c.id).where(_page.c.key == key).scalar_subquery()
    nodes = {
        row.id: row for row in connection.execute(select(_node).where(_node.c.page == page)).all()
    }
    entry, fqn = tables.entry, tables.fqn
    rows = connection.execute(
        select(
            entry.c.node,
            fqn.c.name,
            fqn.c.path,
            entry.c.kind,
            entry.c.tensor,
            _tensor.c.digest,
            entry.c.value,
        )
        .join(_node, _node.c.id == entry.c.node)
        .join(fqn, fqn.c.id == entry.c.fqn)
        .outerjoin(_tensor, _tensor.c.id == entry.c.tensor)
        .where(_node.c.page == page)
        .order_by(entry.c.node, fqn.c.name)
    ).all()
    entries: dict[int, list[NewEntry]] = {held: [] for held in nodes if nodes[held].level == 0}
    for node, name, path, kind, _, digest, value in rows:
        entries[node].append(NewEntry(name, path, kind, digest and digest.hex(), value))
    sets = sorted((entry_set(held) for held in entries.values()), key=lambda one: one.child.first)
    groups, elsewhere = _load_groups(connection, [n for n in nodes if nodes[n].level], key)
    made = {one.digest for one in sets} | {one.digest for _, one in groups}
    if made != {row.digest for row in nodes.values()}:
        raise CorruptionError(
            f"the catalog lacks entries of {key}; restore it from a backup, or make a new one from "
            "the data with 'dcpstore rebuild'."
        )
    tensors = _load_whole(connection, {row[4] for row in rows} - {None})
    runs, of_others = _load_runs(connection, key, tensors)
    return StoredPage(
        sets, groups, {tensor.digest: tensor for tensor in tensors}, runs, elsewhere | of_others
    )


@reads
def load_plan_of(connection: Connection, key: str) -> PlanRecord | None:
    """Return the plan that the object of this key is to hold; None if no version has it now."""
    row = connection.execute(
        select(_plan).join(_page, _page.c.id == _plan.c.page).where(_page.c.key == key)
    ).one_or_none()
    if row is None:
        return None
    return PlanRecord(row.digest, row.ranks, load_shards(connection, row.id), row.algorithm)


def _load_groups(
    connection: Connection, nodes: Collection[int], key: str
) -> tuple[list[tuple[int, Group]], dict[bytes, str]]:
    """Return groups, which are given by id, with their levels, and the pages of their children."""
    child, below = tables.child, tables.node.alias("below")
    rows = connection.execute(
        select(child.c.node, _node.c.level, child.c.first, below.c.digest, _page.c.key)
        .join(_node, _node.c.id == child.c.node)
        .join(below, below.c.id == child.c.child)
        .outerjoin(_page, _page.c.id == below.c.page)
        .where(child.c.node.in_(wanted_ids(connection, nodes)))
        .order_by(child.c.node, child.c.first)
    ).all()
    groups = []
    for _, same in itertools.groupby(rows, itemgetter(0)):
        held = list(same)
        children = [Child(first, digest) for _, _, first, digest, _ in held]
        groups.append((int(held[0][1]), group(children)))
    groups.sort(key=lambda one: (one[0], one[1].child.first))
    return groups, {digest: page for *_, digest, page in rows if page not in (None, key)}


def _load_whole(connection: Connection, ids: Collection[int]) -> list[NewTensor]:
    records: dict[int, TensorRecord] = load_tensors(connection, ids)
    try:
        return load_whole_tensors(connection, list(records.values()))
    except ConflictError as error:  # gc cannot have deleted them, within one transaction
        raise CorruptionError(
            "the catalog lacks chunks; run 'dcpstore verify' to see which versions are damaged."
        ) from error


def _load_runs(
    connection: Connection, key: str, tensors: Collection[NewTensor]
) -> tuple[list[Run], dict[bytes, str]]:
    """Return the runs of a page, and the pages of other runs that its tensors have.

    Args:
        connection: in one transaction.
        key: of the page.
        tensors: of the page.
    """
    own = {run.digest: run for t in tensors if len(t.chunks) > RUN for run in runs_of(t)}
    places = find_runs(connection, own.keys())
    elsewhere = {digest: page for digest, page in places.items() if page != key}
    page = select(_page.c.id).where(_page.c.key == key).scalar_subquery()
    # Of the other runs that lie here, one tensor each that has them now.
    rows = connection.execute(
        select(_tensor.c.digest, func.min(tables.run.c.tensor))
        .join(tables.run, tables.run.c.run == _tensor.c.id)
        .where(_tensor.c.page == page)
        .group_by(_tensor.c.digest)
    ).all()
    more = {digest: holder for digest, holder in rows if digest not in own}
    others = {
        run.digest: run
        for tensor in (_load_whole(connection, set(more.values())) if more else ())
        for run in runs_of(tensor)
        if run.digest in more
    }
    held = own | others
    return [run for digest, run in held.items() if digest not in elsewhere], elsewhere
