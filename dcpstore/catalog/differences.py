"""What two versions hold in common: entries by their tensors, tensors by the digests of chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Connection, select

from dcpstore.catalog import schema
from dcpstore.catalog.queries import load_entries
from dcpstore.catalog.wanted import look_up_each, wanted_pairs
from dcpstore.records import EntryRecord

__all__ = ["Pair", "SharedChunk", "load_both", "shared_chunks"]

Pair = tuple[int, int]  # ids of tensors cut by the same grids, old and new


class SharedChunk(NamedTuple):
    """A chunk that two tensors hold at the same place."""

    old: int
    new: int
    part: int
    ordinal: int


def load_both(
    connection: Connection, old: int, new: int
) -> tuple[list[EntryRecord], list[EntryRecord]]:
    """Return the entries of two versions, as of one moment."""
    return load_entries(connection, old, None), load_entries(connection, new, None)


def shared_chunks(connection: Connection, pairs: Sequence[Pair]) -> list[SharedChunk]:
    """Return the chunks that each pair has in common, at the same place."""
    if not pairs:
        return []
    look_up_each(connection)
    wanted = wanted_pairs(connection, pairs)
    old, new = schema.chunk.alias("old_chunk"), schema.chunk.alias("new_chunk")
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
