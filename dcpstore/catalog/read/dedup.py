"""What the repository holds already, for a save to reuse.

Never names anything in a condemned pack, for its bytes may be gone tomorrow (invariant 5), nor in a
damaged one, so that saving a content again heals it.
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
    """Return where chunks of these digests lie, encoded with `codec`, or any; one place each."""
    if not digests:
        return {}
    chunk, tensor, pack = tables.chunk, tables.tensor, tables.pack
    wanted = wanted_digests(connection, digests)
    # One content may lie in as many tensors as there are versions: take the first that serves, from
    # the index, and never look at the others. Nested like this, neither database can turn it round
    # and begin with every tensor, or every pack; a subquery gives one value, hence the text.
    has_codec = select(tensor.c.codec).where(tensor.c.id == chunk.c.tensor).scalar_subquery()
    serves = [] if codec is None else [has_codec == codec]
    status = (
        select(pack.c.status)
        .where(pack.c.id == chunk.c.pack, pack.c.damage.is_(None))
        .scalar_subquery()
    )
    key = select(pack.c.key).where(pack.c.id == chunk.c.pack).scalar_subquery()
    place = (
        select(cast(chunk.c.offset, Text) + ":" + cast(chunk.c.length, Text) + ":" + key)
        .where(chunk.c.digest == wanted.c.digest, status == "live", *serves)
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
    """Return the tensors of these very digests: id, and whether all its packs are live."""
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
    """Return the tensors of these contents, cut so or otherwise, that lie whole in live packs."""
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
    ids |= dict(connection.execute(own).all())
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
