"""Deduplication: the chunks and tensors that the repository holds already, for a save to reuse.

Invariant: nothing in a condemned pack is returned, for its bytes may be deleted soon (invariant 5),
and nothing in a damaged one, so that saving a content again repairs it.
"""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import ColumnElement, Connection, Text, cast, exists, or_, select

from dcpstore.catalog.db.key_lists import wanted_digests, wanted_ids, wanted_names
from dcpstore.catalog.db.transactions import reads
from dcpstore.catalog.read.entries import load_tensors
from dcpstore.catalog.schema import tables
from dcpstore.records import ChunkKey, ChunkPlace, TensorRecord

__all__ = ["find_chunks", "find_encoded", "find_tensors", "known_tensors"]


@reads
def find_chunks(
    connection: Connection, digests: Collection[bytes], codec: str | None = None
) -> dict[bytes, ChunkPlace]:
    """Return one place of each stored chunk, by digest; encoded with `codec`, or with any."""
    if not digests:
        return {}
    chunk, tensor, pack = tables.chunk, tables.tensor, tables.pack
    wanted = wanted_digests(connection, digests)
    # One chunk may belong to as many tensors as there are versions. Take the first that fits from
    # the index, and do not read the others. Nested like this, neither database can change the order
    # and begin with all tensors, or all packs. A scalar subquery has one column, so the three
    # values are joined to a text.
    chunk_codec = select(tensor.c.codec).where(tensor.c.id == chunk.c.tensor).scalar_subquery()
    has_codec = [] if codec is None else [chunk_codec == codec]
    status = (
        select(pack.c.status)
        .where(pack.c.id == chunk.c.pack, pack.c.damage.is_(None))
        .scalar_subquery()
    )
    key = select(pack.c.key).where(pack.c.id == chunk.c.pack).scalar_subquery()
    place = (
        select(cast(chunk.c.offset, Text) + ":" + cast(chunk.c.length, Text) + ":" + key)
        .where(chunk.c.digest == wanted.c.digest, status == "live", *has_codec)
        .order_by(chunk.c.tensor)
        .limit(1)
        .correlate(wanted)
        .scalar_subquery()
    )
    places = {}
    for digest, text in connection.execute(select(wanted.c.digest, place)).all():
        if text is not None:
            offset, length, key = text.split(":", 2)
            places[digest] = ChunkPlace(key, int(offset), int(length))
    return places


@reads
def find_encoded(connection: Connection, keys: Collection[ChunkKey]) -> dict[ChunkKey, ChunkPlace]:
    """Return where those of these chunks lie that the repository holds; one query per codec."""
    return {
        (codec, digest): place
        for codec in dict.fromkeys(codec for codec, _ in keys)
        for digest, place in find_chunks(
            connection, [digest for own, digest in keys if own == codec], codec
        ).items()
    }


def known_tensors(connection: Connection, digests: Collection[str]) -> dict[str, tuple[int, bool]]:
    """Return tensors by digest: the id, and whether all their packs are live and intact.

    Aliases are not looked up.
    """
    if not digests:
        return {}
    tensor = tables.tensor
    rows = connection.execute(
        select(tensor.c.digest, tensor.c.id, (~_has_condemned_chunk()).label("live")).where(
            tensor.c.digest.in_(wanted_names(connection, digests))
        )
    )
    return {row.digest: (row.id, row.live) for row in rows}


@reads
def find_tensors(connection: Connection, digests: Collection[str]) -> dict[str, TensorRecord]:
    """Return the tensors of these digests or aliases whose packs are all live and intact."""
    if not digests:
        return {}
    tensor, alias = tables.tensor, tables.alias
    wanted = wanted_names(connection, digests)
    live = ~_has_condemned_chunk()
    own = select(tensor.c.digest, tensor.c.id).where(tensor.c.digest.in_(wanted), live)
    other = (
        select(alias.c.digest, tensor.c.id)
        .join(tensor, tensor.c.id == alias.c.tensor)
        .where(alias.c.digest.in_(wanted), live)
    )
    ids: dict[str, int] = dict(connection.execute(other).all())
    ids |= dict(connection.execute(own).all())  # second: a tensor goes before an alias
    if not ids:
        return {}
    tensors = load_tensors(connection, wanted_ids(connection, set(ids.values())))
    return {digest: tensors[tensor_id] for digest, tensor_id in ids.items()}


def _has_condemned_chunk() -> ColumnElement[bool]:
    """Return the condition that a row of `tensor` has a chunk in a condemned or damaged pack."""
    chunk, pack = tables.chunk, tables.pack
    return exists().where(
        chunk.c.tensor == tables.tensor.c.id,
        pack.c.id == chunk.c.pack,
        or_(pack.c.status == "condemned", pack.c.damage.is_not(None)),
    )
