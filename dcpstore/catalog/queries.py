"""What committed versions hold: each question takes the same few queries, whatever their size."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from operator import itemgetter
from typing import Any

from sqlalchemy import Connection, Select, select

from dcpstore.catalog import schema
from dcpstore.catalog.checks import check_limit
from dcpstore.catalog.filters import LogFilter, filtered
from dcpstore.catalog.tensors import load_tensors
from dcpstore.catalog.versions import ancestors, id_of_number, load_versions
from dcpstore.catalog.wanted import look_up_each, wanted_names, wanted_ranges
from dcpstore.errors import NotFoundError
from dcpstore.geometry.boxes import Box
from dcpstore.records import (
    ChunkRange,
    EntryRecord,
    PlanRecord,
    ShardRecord,
    StoredChunk,
    Version,
)

__all__ = ["list_log", "load_chunks", "load_entries", "load_plan", "load_planner_data"]

_SHOWN = 10  # unknown FQNs that one message names


def list_log(
    connection: Connection,
    start: int | None,
    *,
    limit: int | None,
    wanted: LogFilter | None = None,
) -> list[Version]:
    """Return versions, newest first: all, or `start` and its ancestors; those `wanted` only.

    Raises:
        InvalidInputError: `limit` is no number of rows, or `wanted` cannot be meant.
    """
    check_limit(limit)
    if limit == 0:
        return []
    ids: Select[Any] | None = None
    if start is not None:
        first = id_of_number(connection, start)
        if limit is not None and wanted is None:
            near = select(ancestors(first, most=limit - 1).c.id)
            found = load_versions(connection, near, limit=limit)
            if len(found) == limit:
                return found
            # Some of so few were expired, or there are no more.
        ids = select(ancestors(first).c.id)
    if wanted is not None:
        ids = filtered(connection, ids, wanted)
    return load_versions(connection, ids, limit=limit)


def load_entries(
    connection: Connection, version: int, fqns: Collection[str] | None
) -> list[EntryRecord]:
    """Return the entries of a version, or those of `fqns`, sorted by FQN.

    Raises:
        NotFoundError: there is no such version, or it lacks some of `fqns`; names all of them.
    """
    version_id = id_of_number(connection, version)
    entry = schema.entry
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
        raise _missing(connection, version_id, version, missing)
    return found


def load_chunks(connection: Connection, wanted: Sequence[ChunkRange]) -> list[StoredChunk]:
    """Return the chunks of these ranges, each once, in the order in which they lie in the packs."""
    ranges = _merged(wanted)
    if not ranges:
        return []
    chunk, pack = schema.chunk, schema.pack
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
    return sorted(map(StoredChunk._make, rows.all()), key=itemgetter(4, 5, 0, 1, 2))


def load_planner_data(connection: Connection, version: int) -> str | None:
    """Return what a custom planner kept with a version, as typed JSON."""
    text = connection.scalar(
        select(schema.version.c.planner_data).where(
            schema.version.c.id == id_of_number(connection, version)
        )
    )
    return None if text is None else str(text)


def load_plan(connection: Connection, version: int) -> PlanRecord:
    """Return the global plan of a version; its shards sorted by FQN and rank."""
    plan, shard = schema.plan, schema.shard
    version_id = id_of_number(connection, version)
    head = connection.execute(
        select(plan)
        .join(schema.version, schema.version.c.plan == plan.c.id)
        .where(schema.version.c.id == version_id)
    ).one()
    rows = connection.execute(
        select(shard)
        .where(shard.c.plan == head.id)
        .order_by(shard.c.fqn, shard.c.rank, shard.c.ordinal)
    )
    shards = [ShardRecord(row.fqn, row.rank, Box(row.offsets, row.sizes)) for row in rows]
    return PlanRecord(digest=head.digest, ranks=head.ranks, shards=shards)


def _narrowed(query: Select[Any], wanted: Select[Any] | None) -> Select[Any]:
    """Return a query of entries for the wanted FQNs only."""
    return query if wanted is None else query.where(schema.entry.c.fqn.in_(wanted))


def _missing(
    connection: Connection, version_id: int, version: int, missing: set[str]
) -> NotFoundError:
    entry = schema.entry
    known = connection.scalars(select(entry.c.fqn).where(entry.c.version == version_id)).all()
    lines = []
    for fqn in sorted(missing)[:_SHOWN]:
        close = difflib.get_close_matches(fqn, known, n=3, cutoff=0.5)
        hint = f" (did you mean {', '.join(repr(name) for name in close)}?)" if close else ""
        lines.append(f"  {fqn!r}{hint}")
    more = f"\n  and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    return NotFoundError(
        f"v{version} has no entry for {len(missing)} FQNs:\n"
        + "\n".join(lines)
        + more
        + f"\nSee 'dcpstore ls v{version}' for all of them."
    )


def _merged(ranges: Sequence[ChunkRange]) -> list[ChunkRange]:
    """Return ranges that hold the same chunks, none of them twice."""
    merged: list[ChunkRange] = []
    for tensor_id, part, first, last in sorted(ranges):
        if merged:
            before = merged[-1]
            if (before.tensor_id, before.part) == (tensor_id, part) and first <= before.last + 1:
                merged[-1] = before._replace(last=max(before.last, last))
                continue
        merged.append(ChunkRange(tensor_id, part, first, last))
    return merged
