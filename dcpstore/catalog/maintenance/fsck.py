"""Checks of the catalog: broken rules in its rows, and the data that a check of packs needs.

It only reads, except for the results of checks of packs, which it stores. A save never reuses a
chunk of a damaged pack, so saving a content again repairs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, Select, func, or_, select, update

from dcpstore.catalog.db.key_lists import wanted_ids
from dcpstore.catalog.db.transactions import reads, writes
from dcpstore.catalog.schema import tables
from dcpstore.geometry.grids import Grid

__all__ = [
    "Fault",
    "PackState",
    "PackedChunk",
    "Reached",
    "begin_verify",
    "end_verify",
    "find_faults",
    "find_reached",
    "list_packs",
    "mark_pack",
    "packed_chunks",
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
    tensor, part = tables.tensor, tables.part
    rows = connection.execute(
        select(
            _chunk.c.offset,
            _chunk.c.length,
            _chunk.c.digest,
            tensor.c.algorithm,
            tensor.c.codec,
            tensor.c.dtype,
            part.c.chunk_shape,
            _chunk.c.tensor,
            _chunk.c.part,
            _chunk.c.ordinal,
        )
        .join(_pack, _pack.c.id == _chunk.c.pack)
        .join(tensor, tensor.c.id == _chunk.c.tensor)
        .join(part, (part.c.tensor == _chunk.c.tensor) & (part.c.part == _chunk.c.part))
        .where(_pack.c.key == key)
        .order_by(_chunk.c.offset, _chunk.c.tensor, _chunk.c.part, _chunk.c.ordinal)
    )
    places: dict[tuple[int, int, bytes], PackedChunk] = {}
    for row in rows:
        chunk = PackedChunk(*row)
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


def _holders(connection: Connection, tensors: Select[tuple[int]]) -> list[Reached]:
    """Return the entries of committed versions that have any of the tensors."""
    entry = tables.entry
    rows = connection.execute(
        select(_version.c.number, entry.c.fqn, entry.c.tensor)
        .join(_version, _version.c.id == entry.c.version)
        .where(entry.c.tensor.in_(tensors), _version.c.status == "committed")
        .order_by(_version.c.number, entry.c.fqn)
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


def _tensor_faults(connection: Connection) -> Iterator[Fault]:
    """Yield the parts of tensors that have more or fewer chunks than their grid has cells."""
    part = tables.part
    counted = (
        select(_chunk.c.tensor, _chunk.c.part, func.count().label("chunks"))
        .group_by(_chunk.c.tensor, _chunk.c.part)
        .subquery()
    )
    rows = connection.execute(
        select(part, func.coalesce(counted.c.chunks, 0).label("chunks")).outerjoin(
            counted, (counted.c.tensor == part.c.tensor) & (counted.c.part == part.c.part)
        )
    )
    for row in rows:
        if len(row.shape) != len(row.chunk_shape) or 0 in row.chunk_shape:
            text = f"part {row.part} of tensor {row.tensor} has chunks of {row.chunk_shape}"
            yield Fault(text, row.tensor)
            continue
        cells = Grid(row.offsets, row.shape, row.chunk_shape).size
        if cells != row.chunks:
            yield Fault(
                f"part {row.part} of tensor {row.tensor} has {row.chunks} chunks of {cells}",
                row.tensor,
            )
