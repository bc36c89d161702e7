"""What the repository holds already, for a save to reuse.

Never names anything in a condemned pack, for its bytes may be gone tomorrow (invariant 5).
"""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import ColumnElement, Connection, exists, select

from dcpstore.catalog import schema
from dcpstore.catalog.wanted import wanted_digests, wanted_names
from dcpstore.records import ChunkPlace, KnownTensor

__all__ = ["find_chunks", "find_tensors", "has_condemned_chunk", "known_tensors"]

def find_chunks(
    connection: Connection, digests: Collection[bytes], codec: str
) -> dict[bytes, ChunkPlace]:
    """Return where chunks of these digests lie, encoded with `codec`; one place each."""
    if not digests:
        return {}
    chunk, tensor, pack = schema.chunk, schema.tensor, schema.pack
    wanted = wanted_digests(connection, digests)
    # One content may lie in as many tensors as there are versions: take the first that serves,
    # from the index, and never look at the others.
    first = (
        select(chunk.c.tensor)
        .join(tensor, tensor.c.id == chunk.c.tensor)
        .join(pack, pack.c.id == chunk.c.pack)
        .where(chunk.c.digest == wanted.c.digest, tensor.c.codec == codec, pack.c.status == "live")
        .order_by(chunk.c.tensor)
        .limit(1)
        .correlate(wanted)
        .scalar_subquery()
    )
    chosen = select(wanted.c.digest, first.label("tensor")).cte("chosen")
    rows = connection.execute(
        select(chunk.c.digest, pack.c.key, chunk.c.offset, chunk.c.length)
        .select_from(chosen)
        .join(chunk, (chunk.c.digest == chosen.c.digest) & (chunk.c.tensor == chosen.c.tensor))
        .join(pack, (pack.c.id == chunk.c.pack) & (pack.c.status == "live"))
    )
    return {digest: ChunkPlace(key, offset, length) for digest, key, offset, length in rows}


def known_tensors(
    connection: Connection, digests: Collection[str]
) -> dict[str, tuple[KnownTensor, bool]]:
    """Return the tensors of these content digests, each with whether all its packs are live."""
    if not digests:
        return {}
    tensor = schema.tensor
    wanted = wanted_names(connection, digests)
    rows = connection.execute(
        select(
            tensor.c.digest, tensor.c.id, tensor.c.codec, (~has_condemned_chunk()).label("live")
        ).join(wanted, wanted.c.name == tensor.c.digest)
    )
    return {row.digest: (KnownTensor(row.id, row.codec), row.live) for row in rows}


def find_tensors(connection: Connection, digests: Collection[str]) -> dict[str, KnownTensor]:
    """Return the known tensors of these content digests that have every chunk in a live pack."""
    known = known_tensors(connection, digests)
    return {digest: tensor for digest, (tensor, live) in known.items() if live}


def has_condemned_chunk() -> ColumnElement[bool]:
    """Return the condition that a row of `tensor` has a chunk in a condemned pack."""
    chunk, pack = schema.chunk, schema.pack
    return exists().where(
        chunk.c.tensor == schema.tensor.c.id,
        pack.c.id == chunk.c.pack,
        pack.c.status == "condemned",
    )
