"""The contents of committed versions: entries, tensors with their layouts, chunks and plans.

Invariant: the number of queries does not depend on the number of rows. Two versions are compared by
their tensors, and tensors by the digests of their chunks.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Select, select, true

from dcpstore.catalog.db.key_lists import (
    look_up_each,
    wanted_ids,
    wanted_names,
    wanted_pairs,
    wanted_ranges,
)
from dcpstore.catalog.db.transactions import OpenCatalog, reads, reads_once
from dcpstore.catalog.read.trees import sets_of, wanted_sets
from dcpstore.catalog.read.versions import id_of_number
from dcpstore.catalog.schema import tables
from dcpstore.core.digests import RUN
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
    "as_records",
    "chunk_starts",
    "load_both",
    "load_chunks",
    "load_entries",
    "load_plan",
    "load_planner_data",
    "load_shards",
    "load_tensors",
    "load_whole_tensors",
    "place_of",
    "shared_chunks",
    "tensor_rows",
]

_SHOWN = 10  # unknown FQNs that one message names
Pair = tuple[int, int]  # ids of tensors cut by the same grids, old and new


@reads_once
def load_tensors(connection: Connection, ids: Collection[int]) -> dict[int, TensorRecord]:
    """Return the tensors of these ids, by id; runs and unknown ids are left out.

    Raises:
        CorruptionError: the parts of one are not inside of its shape.
    """
    if not ids:
        return {}
    wanted = wanted_ids(connection, ids)
    return as_records(connection.execute(tensor_rows().where(tables.tensor.c.id.in_(wanted))))


def tensor_rows(*first: ColumnElement[Any]) -> Select[Any]:
    """Return a query of all tensors, for `as_records`; `first` are columns before those."""
    tensor, layout = tables.tensor, tables.layout
    facts = (layout.c[name] for name in _Layout._fields)
    return (
        select(*first, tensor.c.id, tensor.c.digest, *facts)
        .select_from(tensor)
        .join(layout, layout.c.id == tensor.c.layout)
    )


def as_records(rows: Iterable[Sequence[Any]]) -> dict[int, TensorRecord]:
    """Return the tensors of rows of `tensor_rows`, by id.

    Raises:
        CorruptionError: the parts of one are not inside of its shape.
    """
    layouts: dict[int, _Layout] = {}
    found = {}
    for held, digest, *facts in rows:
        of = layouts.get(facts[0])
        if of is None:
            of = layouts[facts[0]] = _checked(_Layout(*facts))
        found[held] = of.of(held, digest)
    return found


def load_entries(
    on: Connection | OpenCatalog, version: int, fqns: Collection[str] | None = None
) -> list[EntryRecord]:
    """Return the entries of a version, or those of `fqns`, sorted by FQN; two queries.

    Raises:
        NotFoundError: there is no such version, or it lacks some of `fqns`; the message has the
            first of them, with the nearest names.
    """
    rows = _load_rows(on, version, fqns)
    missing = set(fqns or ()) - {row[0] for row in rows}
    if missing or (not rows and fqns is None):
        _check_missing(on, version, missing)
    # Layouts never change, so these need not be read as of the same moment.
    layouts = _load_layouts(on, {row[5] for row in rows} - {None})
    tensors: dict[int | None, TensorRecord | None] = {None: None}
    found = []
    for name, path, kind, held, digest, layout, value in rows:
        if held not in tensors:
            tensors[held] = layouts[layout].of(held, digest)
        found.append(EntryRecord(name, path, kind, tensors[held], value))
    return sorted(found, key=attrgetter("fqn"))


@reads_once
def _load_rows(
    connection: Connection, version: int, fqns: Collection[str] | None
) -> Sequence[tuple[Any, ...]]:
    """Return (FQN, path, kind, tensor, digest, layout, value) of entries; none of no version."""
    own = tables.version
    version_id = (
        select(own.c.id)
        .where(own.c.number == version, own.c.expired_at.is_(None))
        .scalar_subquery()
    )
    entry, fqn, tensor = tables.entry, tables.fqn, tables.tensor
    query = select(
        fqn.c.name,
        fqn.c.path,
        entry.c.kind,
        entry.c.tensor,
        tensor.c.digest,
        tensor.c.layout,
        entry.c.value,
    )
    if fqns is None:
        query = (
            query.select_from(entry)
            .join(fqn, fqn.c.id == entry.c.fqn)
            .where(entry.c.node.in_(sets_of(version_id)))
        )
    else:
        place = wanted_sets(version_id, wanted_names(connection, set(fqns)))
        query = (
            query.select_from(place)
            .join(fqn, fqn.c.name == place.c.name)
            .join(entry, (entry.c.node == place.c.node) & (entry.c.fqn == fqn.c.id))
        )
    return connection.execute(query.outerjoin(tensor, tensor.c.id == entry.c.tensor)).all()


@reads
def _check_missing(connection: Connection, version: int, fqns: set[str]) -> None:
    """Raise NotFoundError if there is no such version, or if there are FQNs that it lacks."""
    version_id = id_of_number(connection, version)
    if fqns:
        raise _missing_error(connection, version_id, version, fqns)


class _Layout(NamedTuple):
    """A row of `layout`, without its digest."""

    id: int
    algorithm: str
    dtype: str
    shape: tuple[int, ...]
    codec: str
    nbytes: int
    parts: tuple[PartRecord, ...]

    def of(self, tensor: int, digest: bytes) -> TensorRecord:
        """Return a tensor that has this layout."""
        return TensorRecord(
            id=tensor,
            digest=digest.hex(),
            dtype=self.dtype,
            shape=self.shape,
            codec=self.codec,
            nbytes=self.nbytes,
            parts=self.parts,
            algorithm=self.algorithm,
        )


@reads_once
def _load_layouts(connection: Connection, ids: Collection[int]) -> dict[int, _Layout]:
    """Return layouts by id.

    Raises:
        CorruptionError: the parts of one are not inside of its shape.
    """
    if not ids:
        return {}
    layout = tables.layout
    rows = connection.execute(
        select(*(layout.c[name] for name in _Layout._fields)).where(
            layout.c.id.in_(wanted_ids(connection, ids))
        )
    )
    return {row.id: _checked(_Layout(*row)) for row in rows}


def _checked(layout: _Layout) -> _Layout:
    """Return a layout; raise CorruptionError if its parts are not inside of its shape."""
    for number, part in enumerate(layout.parts):
        if 0 in part.chunk_shape or any(
            len(sizes) != len(layout.shape)
            for sizes in (part.offsets, part.shape, part.chunk_shape)
        ):
            raise CorruptionError(
                f"the catalog is damaged: layout {layout.id} has the shape {layout.shape}, and its "
                f"part {number} the shape {part.shape} in chunks of {part.chunk_shape}; restore it "
                "from a backup, or with 'dcpstore rebuild'."
            )
    return layout


def load_chunks(
    on: Connection | OpenCatalog,
    wanted: Sequence[ChunkRange],
    *,
    tensors: Iterable[TensorRecord] = (),
) -> list[StoredChunk]:
    """Return the chunks of these ranges, each once, in the order in which packs hold them.

    One query for small tensors, and one for large ones. `tensors` are those that are known; the
    others of the ranges cost one query more.
    """
    ranges = _merged(wanted)
    if not ranges:
        return []
    grids = {tensor.id: chunk_starts(tensor.parts) for tensor in tensors}
    grids |= _load_grids(on, {tensor for tensor, *_ in ranges} - grids.keys())
    small: list[_Placed] = []
    large: list[_Placed] = []
    for tensor_id, part, first, last in ranges:
        starts = grids.get(tensor_id, _NO_CHUNKS)
        if part < len(starts) - 1 and first < starts[part + 1] - starts[part]:
            begin, end = starts[part], starts[part + 1]
            placed = tensor_id, begin + first, min(begin + last, end - 1)
            (small if starts[-1] <= RUN else large).append(placed)
    found = []
    rows = [*_chunks_of_small(on, small), *_chunks_of_large(on, large)]
    for held, ordinal, digest, pack, offset, length, checksum in rows:
        part, within = place_of(ordinal, grids[held])
        found.append(StoredChunk(held, part, within, digest, pack, offset, length, checksum))
    return sorted(found, key=itemgetter(4, 5, 0, 1, 2))


_NO_CHUNKS = (0,)


@reads_once
def _load_grids(connection: Connection, tensors: Collection[int]) -> dict[int, tuple[int, ...]]:
    """Return by tensor where the chunks of each part begin, counted through all parts.

    The last number is that of all chunks. An id that is not of a tensor is left out.
    """
    if not tensors:
        return {}
    tensor, layout = tables.tensor, tables.layout
    rows = connection.execute(
        select(tensor.c.id, layout.c.parts)
        .join(layout, layout.c.id == tensor.c.layout)
        .where(tensor.c.id.in_(wanted_ids(connection, tensors)))
    )
    return {row.id: chunk_starts(row.parts) for row in rows}


@lru_cache(4096)
def chunk_starts(parts: tuple[PartRecord, ...]) -> tuple[int, ...]:
    """Return where the chunks of each part begin, and how many there are; cached."""
    return tuple(itertools.accumulate((part.size for part in parts), initial=0))


def place_of(ordinal: int, starts: Sequence[int]) -> tuple[int, int]:
    """Return the part of a chunk, and its ordinal there, by its number in all parts."""
    part = 0 if len(starts) == 2 else bisect_right(starts, ordinal) - 1
    return part, ordinal - starts[part]


_Placed = tuple[int, int, int]  # a tensor, and the first and last of its chunks in all parts


@reads_once
def _chunks_of_small(
    connection: Connection, ranges: Sequence[_Placed]
) -> Sequence[tuple[Any, ...]]:
    """Return the chunks of tensors that have at most `RUN`."""
    if not ranges:
        return []
    chunk, pack = tables.chunk, tables.pack
    wanted = wanted_ranges(connection, ranges)
    is_wanted = (chunk.c.tensor == wanted.c.tensor) & chunk.c.ordinal.between(
        wanted.c.first, wanted.c.last
    )
    if connection.dialect.name == "sqlite":
        query = select(chunk.c.tensor, chunk.c.ordinal, *_PLACE).select_from(wanted)
        query = query.join(chunk, is_wanted).join(pack, pack.c.id == chunk.c.pack)
    else:
        # Until Postgres has statistics of the rows that a save has just written, it would compare
        # each range with each chunk. With OFFSET it looks each range up.
        held = select(chunk).where(is_wanted).correlate(wanted).offset(0).lateral("held")
        key = select(pack.c.key).where(pack.c.id == held.c.pack).scalar_subquery()
        query = select(
            held.c.tensor,
            held.c.ordinal,
            held.c.digest,
            key,
            held.c.offset,
            held.c.length,
            held.c.checksum,
        ).select_from(wanted.join(held, true()))
    return connection.execute(query).all()


@reads
def _chunks_of_large(
    connection: Connection, ranges: Sequence[_Placed]
) -> Sequence[tuple[Any, ...]]:
    """Return the chunks of tensors that are stored as runs."""
    if not ranges:
        return []
    chunk, pack, run = tables.chunk, tables.pack, tables.run
    look_up_each(connection)
    wanted = wanted_ranges(connection, ranges)
    before = run.c.ordinal * RUN
    return connection.execute(
        select(run.c.tensor, (before + chunk.c.ordinal).label("ordinal"), *_PLACE)
        .select_from(wanted)
        .join(
            run,
            (run.c.tensor == wanted.c.tensor)
            & run.c.ordinal.between(wanted.c.first // RUN, wanted.c.last // RUN),
        )
        .join(
            chunk,
            (chunk.c.tensor == run.c.run)
            & chunk.c.ordinal.between(wanted.c.first - before, wanted.c.last - before),
        )
        .join(pack, pack.c.id == chunk.c.pack)
    ).all()


_PLACE = (
    tables.chunk.c.digest,
    tables.pack.c.key,
    tables.chunk.c.offset,
    tables.chunk.c.length,
    tables.chunk.c.checksum,
)


def load_whole_tensors(
    on: Connection | OpenCatalog, tensors: Collection[TensorRecord]
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
    for chunk in load_chunks(on, ranges, tensors=tensors):
        found[chunk.tensor_id].append(NewChunk(*chunk[1:]))
    for tensor in tensors:
        if len(found[tensor.id]) != chunk_starts(tensor.parts)[-1]:
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
    plan = tables.plan
    version_id = id_of_number(connection, version)
    head = connection.execute(
        select(plan)
        .join(tables.version, tables.version.c.plan == plan.c.id)
        .where(tables.version.c.id == version_id)
    ).one()
    return PlanRecord(head.digest, head.ranks, load_shards(connection, head.id), head.algorithm)


def load_shards(connection: Connection, plan: int) -> list[ShardRecord]:
    """Return the shards of a plan, which is given by id, sorted by FQN and rank."""
    shard = tables.shard
    rows = connection.execute(
        select(shard)
        .where(shard.c.plan == plan)
        .order_by(shard.c.fqn, shard.c.rank, shard.c.ordinal)
    )
    return [ShardRecord(row.fqn, row.rank, Box(row.offsets, row.sizes)) for row in rows]


def _missing_error(
    connection: Connection, version_id: int, version: int, missing: set[str]
) -> NotFoundError:
    """Return the error for FQNs that a version lacks."""
    entry, dictionary = tables.entry, tables.fqn
    known = connection.scalars(
        select(dictionary.c.name)
        .join(entry, entry.c.fqn == dictionary.c.id)
        .where(entry.c.node.in_(sets_of(version_id)))
    ).all()
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
    grids = _load_grids(connection, {new for _, new in pairs})
    found = []
    for is_large, of_pairs in ((False, _shared_by_small), (True, _shared_by_large)):
        some = [pair for pair in pairs if (grids.get(pair[1], _NO_CHUNKS)[-1] > RUN) is is_large]
        for old, new, ordinal in of_pairs(connection, some) if some else ():
            found.append(SharedChunk(old, new, *place_of(ordinal, grids[new])))
    return found


def _shared_by_small(connection: Connection, pairs: Sequence[Pair]) -> Sequence[tuple[Any, ...]]:
    """Return (old, new, ordinal) of the chunks that tensors of at most `RUN` chunks share."""
    look_up_each(connection)
    wanted = wanted_pairs(connection, pairs)
    old, new = tables.chunk.alias("old_chunk"), tables.chunk.alias("new_chunk")
    return connection.execute(
        select(wanted.c.old, wanted.c.new, new.c.ordinal)
        .select_from(wanted)
        .join(new, new.c.tensor == wanted.c.new)
        .join(
            old,
            (old.c.tensor == wanted.c.old)
            & (old.c.ordinal == new.c.ordinal)
            & (old.c.digest == new.c.digest),
        )
    ).all()


def _shared_by_large(connection: Connection, pairs: Sequence[Pair]) -> Sequence[tuple[Any, ...]]:
    """Return (old, new, ordinal) of the chunks that tensors which are stored as runs share."""
    look_up_each(connection)
    wanted = wanted_pairs(connection, pairs)
    old, new = tables.chunk.alias("old_chunk"), tables.chunk.alias("new_chunk")
    old_run, new_run = tables.run.alias("old_run"), tables.run.alias("new_run")
    ordinal = new_run.c.ordinal * RUN + new.c.ordinal
    return connection.execute(
        select(wanted.c.old, wanted.c.new, ordinal.label("ordinal"))
        .select_from(wanted)
        .join(new_run, new_run.c.tensor == wanted.c.new)
        .join(
            old_run,
            (old_run.c.tensor == wanted.c.old) & (old_run.c.ordinal == new_run.c.ordinal),
        )
        .join(new, new.c.tensor == new_run.c.run)
        .join(
            old,
            (old.c.tensor == old_run.c.run)
            & (old.c.ordinal == new.c.ordinal)
            & (old.c.digest == new.c.digest),
        )
    ).all()
