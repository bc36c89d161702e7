"""Checks of the catalog: broken rules in its rows, and the data that a check of packs needs.

It only reads, except for the results of checks of packs, which it stores. A save never reuses a
chunk of a damaged pack, so saving a content again repairs it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    SelectBase,
    exists,
    func,
    or_,
    select,
    update,
)

from dcpstore.catalog.db.key_lists import wanted_ids, wanted_sizes
from dcpstore.catalog.db.transactions import reads, reads_once, writes
from dcpstore.catalog.read.entries import chunk_starts, place_of
from dcpstore.catalog.read.trees import holding_tensors, holding_versions, with_runs
from dcpstore.catalog.read.versions import is_visible
from dcpstore.catalog.schema import tables
from dcpstore.core.digests import RUN
from dcpstore.records import PackRecord

__all__ = [
    "NOTHING",
    "Fault",
    "ManifestState",
    "PackState",
    "PackedChunk",
    "Reached",
    "Verified",
    "begin_verify",
    "end_verify",
    "find_faults",
    "find_reached",
    "held_by_page",
    "is_live",
    "last_verified",
    "list_manifests",
    "list_packs",
    "list_pages",
    "mark_pack",
    "note_verified",
    "packed_chunks",
    "reached_by_page",
    "reached_by_tensor",
]

_version, _pack, _chunk = tables.version, tables.pack, tables.chunk
_SHOWN = 20  # faults of one kind that are reported

# The ids of the rows that are looked at; None is all.
Among = Select[Any] | None


class Fault(NamedTuple):
    """A broken rule of the catalog; `tensor` is the id of the tensor that it concerns, if any."""

    text: str
    tensor: int | None = None


class Verified(NamedTuple):
    """How far a check came: the number of the last version and of the last operation."""

    version: int
    operation: int


NOTHING = Verified(0, 0)


class ManifestState(NamedTuple):
    """The number and the uid of a version; `is_stale` if its manifest must be written again."""

    number: int
    uid: str
    is_stale: bool


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
def find_faults(connection: Connection, after: Verified = NOTHING) -> list[Fault]:
    """Return the broken rules of the catalog; an intact catalog has none.

    With `after`, look only at what was made since: the numbers, and the versions with their refs,
    packs and trees. So it costs nothing for what was there before.
    """
    versions = nodes = tensors = None
    if after != NOTHING:
        new = _version.c.number > after.version
        found = connection.execute(select(_version.c.id, _version.c.root).where(new)).all()
        if not found:
            return [*_number_faults(connection, after)]
        versions = wanted_ids(connection, [row.id for row in found])
        roots = {row.root for row in found if row.root is not None}
        nodes, tensors = _below(connection, roots)
    return [
        *(_database_faults(connection) if after == NOTHING else ()),
        *_ref_faults(connection, versions),
        *_number_faults(connection, after),
        *_pack_faults(connection, versions),
        *_root_faults(connection, versions),
        *_node_faults(connection, nodes),
        *_tensor_faults(connection, tensors),
    ]


@reads_once
def last_verified(connection: Connection) -> tuple[Verified, Verified]:
    """Return up to where the last verify found the catalog's rules kept, and what there is now."""
    row = connection.execute(select(tables.repository)).one()
    seen = Verified(row.verified_version or 0, row.verified_operation or 0)
    return seen, Verified(row.last_version, row.last_operation)


@writes(idempotent=True, once=True)
def note_verified(connection: Connection, seen: Verified) -> None:
    """Note up to where the catalog's rules were found kept."""
    connection.execute(
        update(tables.repository).values(
            verified_version=seen.version, verified_operation=seen.operation
        )
    )


@reads_once
def list_manifests(connection: Connection) -> list[ManifestState]:
    """Return what is known of the manifests of the committed versions, the newest first."""
    rows = connection.execute(
        select(_version.c.number, _version.c.uid, _version.c.stale.is_not(None))
        .where(is_visible())
        .order_by(_version.c.number.desc())
    )
    return [ManifestState(*row) for row in rows]


@reads
def list_packs(connection: Connection) -> list[PackState]:
    """Return the live packs, by key."""
    rows = connection.execute(
        select(_pack.c.key, _pack.c.nbytes, _pack.c.verified_at, _pack.c.damage)
        .where(_pack.c.status == "live")
        .order_by(_pack.c.key)
    )
    return [PackState(*row) for row in rows]


@reads_once
def is_live(connection: Connection, key: str) -> bool:
    """Tell whether there is a live pack of this key."""
    found = select(_pack.c.id).where(_pack.c.key == key, _pack.c.status == "live")
    return connection.execute(found).first() is not None


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


def _below(connection: Connection, roots: Collection[int]) -> tuple[Select[Any], Select[Any]]:
    """Return the nodes of trees, roots among them, and the tensors of their entries; by id."""
    child, entry, found = tables.child, tables.entry, set(roots)
    level: Collection[int] = roots
    for _ in range(2):  # the groups, then the sets
        above = wanted_ids(connection, level)
        level = set(connection.scalars(select(child.c.child).where(child.c.node.in_(above))))
        found |= level
    held = select(entry.c.tensor).where(
        entry.c.node.in_(wanted_ids(connection, level)), entry.c.tensor.is_not(None)
    )
    tensors = set(connection.scalars(held))
    return wanted_ids(connection, found), wanted_ids(connection, tensors)


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


def _number_faults(connection: Connection, after: Verified) -> Iterator[Fault]:
    repository = connection.execute(select(tables.repository)).one()
    for table, column, last, seen in (
        ("operations", tables.operation.c.number, repository.last_operation, after.operation),
        ("versions", _version.c.number, repository.last_version, after.version),
    ):
        count, most = connection.execute(
            select(func.count(column) + seen, func.max(column)).where(column > seen)
        ).one()
        if (count, most or seen) != (last, last):
            yield Fault(
                f"there are {count} numbered {table}, up to {most or seen}, and {last} were made"
            )


def _ref_faults(connection: Connection, versions: Among) -> Iterator[Fault]:
    ref = tables.ref
    for row in connection.execute(
        select(ref.c.kind, ref.c.name, _version.c.status)
        .join(_version, _version.c.id == ref.c.version)
        .where(_version.c.status != "committed", *_among(ref.c.version, versions))
        .order_by(ref.c.name)
    ):
        yield Fault(f"the {row.kind} {row.name!r} names a version that is {row.status}")


def _pack_faults(connection: Connection, versions: Among) -> Iterator[Fault]:
    rows = connection.execute(
        select(_pack.c.key, _pack.c.status, func.count().label("chunks"))
        .join(_chunk, _chunk.c.pack == _pack.c.id)
        .where(
            or_(
                _pack.c.status != "live",
                _chunk.c.offset < 0,
                _chunk.c.offset + _chunk.c.length > _pack.c.nbytes,
            ),
            *_among(_pack.c.version, versions),
        )
        .group_by(_pack.c.key, _pack.c.status)
        .order_by(_pack.c.key)
        .limit(_SHOWN)
    )
    for row in rows:
        yield Fault(f"{row.chunks} chunks are outside of pack {row.key!r}, or it is not live")


def _root_faults(connection: Connection, versions: Among) -> Iterator[Fault]:
    """Yield the committed versions without a tree."""
    for number in connection.scalars(
        select(_version.c.number)
        .where(
            _version.c.status == "committed",
            _version.c.root.is_(None),
            *_among(_version.c.id, versions),
        )
        .order_by(_version.c.number)
        .limit(_SHOWN)
    ):
        yield Fault(f"v{number} has no tree of entries")


def _node_faults(connection: Connection, nodes: Among) -> Iterator[Fault]:
    """Yield the nodes without the children they need."""
    node, child = tables.node, tables.child
    below = node.alias("below")
    # Below a group or a root there are nodes, all of the next level; below a set there are none.
    has_none = (node.c.level > 0) & ~exists().where(child.c.node == node.c.id)
    has_other = exists().where(
        child.c.node == node.c.id, below.c.id == child.c.child, below.c.level != node.c.level - 1
    )
    for found, level in connection.execute(
        select(node.c.id, node.c.level)
        .where(has_none | has_other, *_among(node.c.id, nodes))
        .order_by(node.c.id)
        .limit(_SHOWN)
    ):
        yield Fault(f"node {found} of level {level} has no children of the level below it")


def _tensor_faults(connection: Connection, tensors: Among) -> Iterator[Fault]:
    """Yield the tensors that have more or fewer chunks than their grids have cells."""
    tensor, layout = tables.tensor, tables.layout
    wanted = []
    layouts = None if tensors is None else select(tensor.c.layout).where(tensor.c.id.in_(tensors))
    for row in connection.execute(
        select(layout.c.id, layout.c.shape, layout.c.parts).where(*_among(layout.c.id, layouts))
    ):
        if any(0 in part.chunk_shape or len(row.shape) != len(part.shape) for part in row.parts):
            held = connection.scalars(
                select(tensor.c.id)
                .where(tensor.c.layout == row.id, *_among(tensor.c.id, tensors))
                .order_by(tensor.c.id)
            )
            for found in held:
                yield Fault(f"tensor {found} has parts that are not inside of its shape", found)
        else:
            wanted.append((row.id, chunk_starts(row.parts)[-1]))
    if not wanted:
        return
    expected = wanted_sizes(connection, wanted)
    run = tables.run
    own = (
        select(_chunk.c.tensor, func.count().label("chunks"))
        .where(*_among(_chunk.c.tensor, None if tensors is None else with_runs(tensors)))
        .group_by(_chunk.c.tensor)
        .subquery()
    )
    # The chunks of all runs of a tensor together: a run is full, but for the last.
    in_runs = (
        select(run.c.tensor, func.sum(own.c.chunks).label("chunks"))
        .join(own, own.c.tensor == run.c.run)
        .where(*_among(run.c.tensor, tensors))
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
        .where(count != expected.c.size, *_among(tensor.c.id, tensors))
        .order_by(tensor.c.id)
    )
    for held, chunks, cells in rows:
        yield Fault(f"tensor {held} has {chunks} chunks of {cells}", held)


def _among(column: ColumnElement[Any], ids: SelectBase | None) -> list[ColumnElement[bool]]:
    return [] if ids is None else [column.in_(ids)]
