"""The contents of committed versions: entries, tensors with their parts, chunks and plans.

Invariant: the number of queries does not depend on the number of rows. Two versions are compared by
their tensors, and tensors by the digests of their chunks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import starmap
from operator import itemgetter
from typing import Any, NamedTuple

from sqlalchemy import Connection, Select, select

from dcpstore.catalog.db.key_lists import look_up_each, wanted_names, wanted_pairs, wanted_ranges
from dcpstore.catalog.db.transactions import reads
from dcpstore.catalog.read.versions import id_of_number
from dcpstore.catalog.schema import tables
from dcpstore.core.display import counted
from dcpstore.errors import ConflictError, CorruptionError, NotFoundError
from dcpstore.geometry.boxes import Box
from dcpstore.records import (
    ChunkRange,
    EntryRecord,
    NewChunk,
    NewTensor,
    PartRecord,
    PlanRecord,
    ShardRecord,
    StoredChunk,
    TensorRecord,
)

__all__ = [
    "Pair",
    "SharedChunk",
    "load_both",
    "load_chunks",
    "load_entries",
    "load_plan",
    "load_planner_data",
    "load_tensors",
    "load_whole_tensors",
    "shared_chunks",
]

_SHOWN = 10  # unknown FQNs that one message names
Pair = tuple[int, int]  # ids of tensors cut by the same grids, old and new


def load_tensors(connection: Connection, ids: Select[Any]) -> dict[int, TensorRecord]:
    """Return the tensors whose ids a query selects, by id; two queries, however many they are."""
    tensor, part = tables.tensor, tables.part
    parts: dict[int, list[PartRecord]] = {}
    cut = connection.execute(
        select(part.c.tensor, part.c.part, part.c.offsets, part.c.shape, part.c.chunk_shape)
        .where(part.c.tensor.in_(ids))
        .order_by(part.c.tensor, part.c.part)
    )
    for held, number, offsets, shape, chunk_shape in cut.all():  # faster than attributes of rows
        if 0 in chunk_shape or not len(offsets) == len(shape) == len(chunk_shape):
            raise CorruptionError(
                f"the catalog is damaged: part {number} of tensor {held} has chunks of "
                f"{chunk_shape}; restore it from a backup, or with 'dcpstore rebuild'."
            )
        parts.setdefault(held, []).append(PartRecord(offsets, shape, chunk_shape))
    rows = connection.execute(
        select(
            tensor.c.id,
            tensor.c.digest,
            tensor.c.dtype,
            tensor.c.shape,
            tensor.c.codec,
            tensor.c.nbytes,
            tensor.c.algorithm,
        ).where(tensor.c.id.in_(ids))
    )
    found = {
        held: TensorRecord(
            id=held,
            digest=digest,
            dtype=dtype,
            shape=shape,
            codec=codec,
            nbytes=nbytes,
            parts=tuple(parts.get(held, ())),
            algorithm=algorithm,
        )
        for held, digest, dtype, shape, codec, nbytes, algorithm in rows.all()
    }
    for record in found.values():
        if any(len(part.shape) != len(record.shape) for part in record.parts):
            raise CorruptionError(
                f"the catalog is damaged: tensor {record.id} has the shape {record.shape}, and a "
                "part of it has another number of dimensions; restore it from a backup, or with "
                "'dcpstore rebuild'."
            )
    return found


@reads
def load_entries(
    connection: Connection, version: int, fqns: Collection[str] | None = None
) -> list[EntryRecord]:
    """Return the entries of a version, or those of `fqns`, sorted by FQN.

    Raises:
        NotFoundError: there is no such version, or it lacks some of `fqns`; the message has the
            first of them, with the nearest names.
    """
    version_id = id_of_number(connection, version)
    entry = tables.entry
    wanted = None if fqns is None else wanted_names(connection, set(fqns))
    held = select(entry.c.tensor).where(entry.c.version == version_id, entry.c.tensor.is_not(None))
    tensors = load_tensors(connection, _narrowed(held, wanted))
    query = select(entry.c.fqn, entry.c.path, entry.c.kind, entry.c.tensor, entry.c.value)
    query = query.where(entry.c.version == version_id).order_by(entry.c.fqn)
    rows = connection.execute(_narrowed(query, wanted))
    found = [
        EntryRecord(fqn, path, kind, None if held is None else tensors[held], value)
        for fqn, path, kind, held, value in rows.all()
    ]
    if fqns is not None and (missing := set(fqns) - {record.fqn for record in found}):
        raise _missing_error(connection, version_id, version, missing)
    return found


@reads
def load_chunks(connection: Connection, wanted: Sequence[ChunkRange]) -> list[StoredChunk]:
    """Return the chunks of these ranges, each once, in the order in which packs hold them."""
    ranges = _merged(wanted)
    if not ranges:
        return []
    chunk, pack = tables.chunk, tables.pack
    look_up_each(connection)
    table = wanted_ranges(connection, ranges)
    rows = connection.execute(
        select(
            chunk.c.tensor,
            chunk.c.part,
            chunk.c.ordinal,
            chunk.c.digest,
            pack.c.key,
            chunk.c.offset,
            chunk.c.length,
        )
        .select_from(table)
        .join(
            chunk,
            (chunk.c.tensor == table.c.tensor_id)
            & (chunk.c.part == table.c.part)
            & chunk.c.ordinal.between(table.c.first, table.c.last),
        )
        .join(pack, pack.c.id == chunk.c.pack)
    )
    return sorted(starmap(StoredChunk, rows.all()), key=itemgetter(4, 5, 0, 1, 2))


@reads
def load_whole_tensors(
    connection: Connection, tensors: Collection[TensorRecord]
) -> list[NewTensor]:
    """Return stored tensors with all their chunks, as a version that reuses them records them.

    Raises:
        ConflictError: gc deleted a tensor after it was found.
    """
    found: dict[int, list[NewChunk]] = {tensor.id: [] for tensor in tensors}
    ranges = [
        ChunkRange(tensor.id, part, 0, grid.size - 1)
        for tensor in tensors
        for part, grid in enumerate(tensor.parts)
        if grid.size
    ]
    for chunk in load_chunks(connection, ranges):
        found[chunk.tensor_id].append(NewChunk(*chunk[1:]))
    for tensor in tensors:
        if len(found[tensor.id]) != sum(grid.size for grid in tensor.parts):
            raise ConflictError(
                f"gc deleted the tensor {tensor.digest} while it was being reused. Save again, or "
                "copy again."
            )
    return [NewTensor.of(tensor, sorted(found[tensor.id])) for tensor in tensors]


@reads
def load_planner_data(connection: Connection, version: int) -> str | None:
    """Return the data that a custom planner stored with a version, as typed JSON."""
    text = connection.scalar(
        select(tables.version.c.planner_data).where(
            tables.version.c.id == id_of_number(connection, version)
        )
    )
    return None if text is None else str(text)


@reads
def load_plan(connection: Connection, version: int) -> PlanRecord:
    """Return the global plan of a version; its shards sorted by FQN and rank."""
    plan, shard = tables.plan, tables.shard
    version_id = id_of_number(connection, version)
    head = connection.execute(
        select(plan)
        .join(tables.version, tables.version.c.plan == plan.c.id)
        .where(tables.version.c.id == version_id)
    ).one()
    rows = connection.execute(
        select(shard)
        .where(shard.c.plan == head.id)
        .order_by(shard.c.fqn, shard.c.rank, shard.c.ordinal)
    )
    shards = [ShardRecord(row.fqn, row.rank, Box(row.offsets, row.sizes)) for row in rows]
    return PlanRecord(head.digest, head.ranks, shards, head.algorithm)


def _narrowed(query: Select[Any], wanted: Select[Any] | None) -> Select[Any]:
    """Return a query of entries, restricted to the wanted FQNs."""
    return query if wanted is None else query.where(tables.entry.c.fqn.in_(wanted))


def _missing_error(
    connection: Connection, version_id: int, version: int, missing: set[str]
) -> NotFoundError:
    """Return the error for FQNs that a version lacks."""
    entry = tables.entry
    known = connection.scalars(select(entry.c.fqn).where(entry.c.version == version_id)).all()
    lines = []
    for fqn in sorted(missing)[:_SHOWN]:
        close = NotFoundError.nearest(fqn, known)
        hint = f" (did you mean {', '.join(repr(name) for name in close)}?)" if close else ""
        lines.append(f"  {fqn!r}{hint}")
    more = f"\n  and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    if len(missing) == 1:
        return NotFoundError(
            f"v{version} has no entry {lines[0].lstrip()}. See 'dcpstore ls v{version}' for all of "
            "them."
        )
    return NotFoundError(
        f"v{version} has no entry for {counted(len(missing), 'FQN')}:\n"
        + "\n".join(lines)
        + more
        + f"\nSee 'dcpstore ls v{version}' for all of them."
    )


def _merged(ranges: Sequence[ChunkRange]) -> list[ChunkRange]:
    """Return ranges of the same chunks that do not overlap, sorted."""
    merged: list[ChunkRange] = []
    for tensor_id, part, first, last in sorted(ranges):
        before = merged[-1] if merged else None
        if before and before[:2] == (tensor_id, part) and first <= before.last + 1:
            merged[-1] = before._replace(last=max(before.last, last))
        else:
            merged.append(ChunkRange(tensor_id, part, first, last))
    return merged


class SharedChunk(NamedTuple):
    """A chunk that two tensors, given by id, hold at the same place."""

    old: int
    new: int
    part: int
    ordinal: int


@reads
def load_both(
    connection: Connection, old: int, new: int
) -> tuple[list[EntryRecord], list[EntryRecord]]:
    """Return the entries of two versions, as of one moment."""
    return load_entries(connection, old), load_entries(connection, new)


@reads
def shared_chunks(connection: Connection, pairs: Sequence[Pair]) -> list[SharedChunk]:
    """Return the chunks that the tensors of each pair have in common at the same place."""
    if not pairs:
        return []
    look_up_each(connection)
    wanted = wanted_pairs(connection, pairs)
    old, new = tables.chunk.alias("old_chunk"), tables.chunk.alias("new_chunk")
    rows = connection.execute(
        select(wanted.c.old, wanted.c.new, new.c.part, new.c.ordinal)
        .select_from(wanted)
        .join(new, new.c.tensor == wanted.c.new)
        .join(
            old,
            (old.c.tensor == wanted.c.old)
            & (old.c.part == new.c.part)
            & (old.c.ordinal == new.c.ordinal)
            & (old.c.digest == new.c.digest),
        )
    )
    return [SharedChunk(*row) for row in rows]
