"""Checks of the catalog: broken rules in its rows, and the data that a check of packs needs.

It only reads, except for the results of checks of packs, which it stores. A save never reuses a
chunk of a damaged pack, so saving a content again repairs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, Select, exists, func, or_, select, update

from dcpstore.catalog.db.key_lists import wanted_ids, wanted_sizes
from dcpstore.catalog.db.transactions import reads, writes
from dcpstore.catalog.read.entries import chunk_starts, place_of
from dcpstore.catalog.read.trees import holding_tensors, holding_versions
from dcpstore.catalog.schema import tables
from dcpstore.core.digests import RUN
from dcpstore.records import PackRecord

__all__ = [
    "Fault",
    "PackState",
    "PackedChunk",
    "Reached",
    "begin_verify",
    "end_verify",
    "find_faults",
    "find_reached",
    "held_by_page",
    "list_packs",
    "list_pages",
    "mark_pack",
    "packed_chunks",
    "reached_by_page",
    "reached_by_tensor",
]

_version, _pack, _chunk = tables.version, tables.pack, tables.chunk
_SHOWN = 20  # faults of one kind that are reported


class Fault(NamedTuple):
    """A broken rule of the catalog; `tensor` is the id of the tensor that it concerns, if any."""

    text: str
    tensor: int | None = None


class PackState(NamedTuple):
    """A live pack, and the results of its last checks."""

    key: str
    nbytes: int
    verified_at: datetime | None
    damage: str | None


class PackedChunk(NamedTuple):
    """A chunk in a pack, with all that a check of its bytes needs; `dtype` is torch's name.

    `checksum` is the one of its stored bytes, None where the catalog has none.
    """

    offset: int
    length: int
    digest: bytes
    algorithm: str
    codec: str
    dtype: str
    chunk_shape: tuple[int, ...]
    tensor: int
    part: int
    ordinal: int
    checksum: bytes | None = None


class Reached(NamedTuple):
    """An entry of a committed version to which some stored bytes belong."""

    version: int
    fqn: str
    tensor: int


@reads
def find_faults(connection: Connection) -> list[Fault]:
    """Return the broken rules of the catalog; an intact catalog has none."""
    return [
        *_database_faults(connection),
        *_ref_faults(connection),
        *_number_faults(connection),
        *_pack_faults(connection),
        *_node_faults(connection),
        *_tensor_faults(connection),
    ]


@reads
def list_packs(connection: Connection) -> list[PackState]:
    """Return the live packs, by key."""
    rows = connection.execute(
        select(_pack.c.key, _pack.c.nbytes, _pack.c.verified_at, _pack.c.damage)
        .where(_pack.c.status == "live")
        .order_by(_pack.c.key)
    )
    return [PackState(*row) for row in rows]


@reads
def packed_chunks(connection: Connection, key: str) -> list[PackedChunk]:
    """Return the chunks in a pack, by offset; one that several tensors share is listed once."""
    tensor, layout, run = tables.tensor, tables.layout, tables.run
    # Of the tensors that share a run, the first one.
    other = run.alias("other_run")
    first = select(func.min(other.c.tensor)).where(other.c.run == _chunk.c.tensor)
    columns = (
        _chunk.c.offset,
        _chunk.c.length,
        _chunk.c.digest,
        layout.c.algorithm,
        layout.c.codec,
        layout.c.dtype,
        layout.c.parts,
        tensor.c.id,
        _chunk.c.checksum,
    )
    of_tensors = (
        select(*columns, _chunk.c.ordinal)
        .join(_pack, _pack.c.id == _chunk.c.pack)
        .join(tensor, tensor.c.id == _chunk.c.tensor)
    )
    of_runs = (
        select(*columns, (run.c.ordinal * RUN + _chunk.c.ordinal).label("ordinal"))
        .join(_pack, _pack.c.id == _chunk.c.pack)
        .join(run, (run.c.run == _chunk.c.tensor) & (run.c.tensor == first.scalar_subquery()))
        .join(tensor, tensor.c.id == run.c.tensor)
    )
    found = []
    for query in (of_tensors, of_runs):
        rows = connection.execute(
            query.join(layout, layout.c.id == tensor.c.layout).where(_pack.c.key == key)
        )
        for row in rows:
            starts = chunk_starts(row.parts)
            if row.ordinal < starts[-1]:  # else there are too many, which `find_faults` says
                part, within = place_of(row.ordinal, starts)
                chunk_shape = row.parts[part].chunk_shape
                place = row.id, part, within, row.checksum
                found.append(PackedChunk(*row[:6], chunk_shape, *place))
    places: dict[tuple[int, int, bytes], PackedChunk] = {}
    for chunk in sorted(found, key=lambda one: (one.offset, one.tensor, one.part, one.ordinal)):
        places.setdefault(chunk[:3], chunk)
    return list(places.values())


@reads
def find_reached(connection: Connection, key: str, offsets: Sequence[int] | None) -> list[Reached]:
    """Return the entries that have chunks in a pack, at `offsets` or, with None, anywhere."""
    held = (
        select(_chunk.c.tensor)
        .join(_pack, _pack.c.id == _chunk.c.pack)
        .where(_pack.c.key == key)
        .distinct()
    )
    if offsets is not None:
        held = held.where(_chunk.c.offset.in_(wanted_ids(connection, offsets)))
    return _holders(connection, held)


@reads
def reached_by_tensor(connection: Connection, tensor: int) -> list[Reached]:
    """Return the entries that have a tensor."""
    return _holders(connection, select(tables.tensor.c.id).where(tables.tensor.c.id == tensor))


@reads
def list_pages(connection: Connection) -> list[PackRecord]:
    """Return the live pages and plans, by key."""
    page = tables.page
    rows = connection.execute(
        select(page.c.key, page.c.nbytes).where(page.c.status == "live").order_by(page.c.key)
    )
    return [PackRecord(*row) for row in rows]


@reads
def held_by_page(connection: Connection, key: str) -> set[bytes]:
    """Return the digests of the nodes, runs and plans that lie in the object of this key."""
    page = select(tables.page.c.id).where(tables.page.c.key == key).scalar_subquery()
    node, tensor, plan = tables.node, tables.tensor, tables.plan
    held = {
        digest
        for table in (node, tensor)
        for digest in connection.scalars(select(table.c.digest).where(table.c.page == page))
    }
    plans = connection.scalars(select(plan.c.digest).where(plan.c.page == page))
    return held | {bytes.fromhex(digest) for digest in plans}


@reads
def reached_by_page(connection: Connection, key: str) -> list[int]:
    """Return the numbers of the committed versions that have a node or a plan in this object."""
    page = select(tables.page.c.id).where(tables.page.c.key == key).scalar_subquery()
    nodes = select(tables.node.c.id).where(tables.node.c.page == page)
    group, below = tables.child.alias("group_child"), tables.child.alias("set_child")
    plans = select(tables.plan.c.id).where(tables.plan.c.page == page)
    groups = select(group.c.node).where(group.c.child.in_(nodes))
    sets = (
        select(group.c.node)
        .join(below, below.c.node == group.c.child)
        .where(below.c.child.in_(nodes))
    )
    rows = connection.scalars(
        select(_version.c.number)
        .where(
            _version.c.status == "committed",
            or_(
                _version.c.root.in_(nodes),
                _version.c.root.in_(groups),
                _version.c.root.in_(sets),
                _version.c.plan.in_(plans),
            ),
        )
        .order_by(_version.c.number)
    )
    return list(rows)


@writes(idempotent=True)
def mark_pack(
    connection: Connection, key: str, *, damage: str | None, verified_at: datetime | None
) -> None:
    """Store the result of a check of a pack; None for `verified_at` keeps the time of the last."""
    seen = {} if verified_at is None else {"verified_at": verified_at}
    connection.execute(update(_pack).where(_pack.c.key == key).values(damage=damage, **seen))


@writes(idempotent=True)
def begin_verify(connection: Connection, *, resume: bool, now: datetime) -> datetime:
    """Return when the unfinished deep verify began, with `resume`; otherwise begin one now."""
    began: datetime | None = connection.scalar(select(tables.repository.c.verify_began_at))
    if resume and began is not None:
        return began
    connection.execute(update(tables.repository).values(verify_began_at=now))
    return now


@writes(idempotent=True)
def end_verify(connection: Connection) -> None:
    """Note that every pack was checked."""
    connection.execute(update(tables.repository).values(verify_began_at=None))


def _holders(connection: Connection, chunked: Select[Any]) -> list[Reached]:
    """Return the entries of committed versions that have any of the tensors or runs."""
    held, fqn = holding_versions(holding_tensors(chunked)).subquery("held"), tables.fqn
    rows = connection.execute(
        select(_version.c.number, fqn.c.name, held.c.tensor)
        .select_from(held)
        .join(_version, _version.c.id == held.c.version)
        .join(fqn, fqn.c.id == held.c.fqn)
        .where(_version.c.status == "committed")
        .order_by(_version.c.number, fqn.c.name)
        .distinct()
    )
    return [Reached(*row) for row in rows]


def _database_faults(connection: Connection) -> Iterator[Fault]:
    """Yield what SQLite finds wrong with its file; Postgres always enforces its constraints."""
    if connection.dialect.name != "sqlite":
        return
    for (text,) in connection.exec_driver_sql(f"PRAGMA quick_check({_SHOWN})"):
        if text != "ok":
            yield Fault(f"the database file is damaged: {text}")
    # This check takes no limit, unlike the one above.
    for row in list(connection.exec_driver_sql("PRAGMA foreign_key_check"))[:_SHOWN]:
        yield Fault(f"a row of {row[0]} refers to a row of {row[2]} that is missing")


def _ref_faults(connection: Connection) -> Iterator[Fault]:
    ref = tables.ref
    for row in connection.execute(
        select(ref.c.kind, ref.c.name, _version.c.status)
        .join(_version, _version.c.id == ref.c.version)
        .where(_version.c.status != "committed")
        .order_by(ref.c.name)
    ):
        yield Fault(f"the {row.kind} {row.name!r} names a version that is {row.status}")


def _number_faults(connection: Connection) -> Iterator[Fault]:
    repository = connection.execute(select(tables.repository)).one()
    for table, column, last in (
        ("operations", tables.operation.c.number, repository.last_operation),
        ("versions", _version.c.number, repository.last_version),
    ):
        count, most = connection.execute(select(func.count(column), func.max(column))).one()
        if (count, most or 0) != (last, last):
            yield Fault(f"there are {count} numbered {table}, up to {most}, and {last} were made")


def _pack_faults(connection: Connection) -> Iterator[Fault]:
    rows = connection.execute(
        select(_pack.c.key, _pack.c.status, func.count().label("chunks"))
        .join(_chunk, _chunk.c.pack == _pack.c.id)
        .where(
            or_(
                _pack.c.status != "live",
                _chunk.c.offset < 0,
                _chunk.c.offset + _chunk.c.length > _pack.c.nbytes,
            )
        )
        .group_by(_pack.c.key, _pack.c.status)
        .order_by(_pack.c.key)
        .limit(_SHOWN)
    )
    for row in rows:
        yield Fault(f"{row.chunks} chunks are outside of pack {row.key!r}, or it is not live")


def _node_faults(connection: Connection) -> Iterator[Fault]:
    """Yield the committed versions without a tree, and the nodes without the children they need."""
    for number in connection.scalars(
        select(_version.c.number)
        .where(_version.c.status == "committed", _version.c.root.is_(None))
        .order_by(_version.c.number)
        .limit(_SHOWN)
    ):
        yield Fault(f"v{number} has no tree of entries")
    node, child = tables.node, tables.child
    below = node.alias("below")
    # Below a group or a root there are nodes, all of the next level; below a set there are none.
    has_none = (node.c.level > 0) & ~exists().where(child.c.node == node.c.id)
    has_other = exists().where(
        child.c.node == node.c.id, below.c.id == child.c.child, below.c.level != node.c.level - 1
    )
    for found, level in connection.execute(
        select(node.c.id, node.c.level)
        .where(has_none | has_other)
        .order_by(node.c.id)
        .limit(_SHOWN)
    ):
        yield Fault(f"node {found} of level {level} has no children of the level below it")


def _tensor_faults(connection: Connection) -> Iterator[Fault]:
    """Yield the tensors that have more or fewer chunks than their grids have cells."""
    tensor, layout = tables.tensor, tables.layout
    wanted = []
    for row in connection.execute(select(layout.c.id, layout.c.shape, layout.c.parts)):
        if any(0 in part.chunk_shape or len(row.shape) != len(part.shape) for part in row.parts):
            held = connection.scalars(
                select(tensor.c.id).where(tensor.c.layout == row.id).order_by(tensor.c.id)
            )
            for found in held:
                yield Fault(f"tensor {found} has parts that are not inside of its shape", found)
        else:
            wanted.append((row.id, chunk_starts(row.parts)[-1]))
    if not wanted:
        return
    expected = wanted_sizes(connection, wanted)
    run = tables.run
    own = select(_chunk.c.tensor, func.count().label("chunks")).group_by(_chunk.c.tensor).subquery()
    # The chunks of all runs of a tensor together: a run is full, but for the last.
    in_runs = (
        select(run.c.tensor, func.sum(own.c.chunks).label("chunks"))
        .join(own, own.c.tensor == run.c.run)
        .group_by(run.c.tensor)
        .subquery()
    )
    count = func.coalesce(own.c.chunks, 0) + func.coalesce(in_runs.c.chunks, 0)
    rows = connection.execute(
        select(tensor.c.id, count, expected.c.size)
        .select_from(tensor)
        .join(expected, expected.c.id == tensor.c.layout)
        .outerjoin(own, own.c.tensor == tensor.c.id)
        .outerjoin(in_runs, in_runs.c.tensor == tensor.c.id)
        .where(count != expected.c.size)
        .order_by(tensor.c.id)
    )
    for held, chunks, cells in rows:
        yield Fault(f"tensor {held} has {chunks} chunks of {cells}", held)
