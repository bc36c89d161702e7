"""Deduplication: the chunks and tensors that the repository holds already, for a save to reuse.

Invariant: nothing in a condemned pack is returned, for its bytes may be deleted soon (invariant 5),
and nothing in a damaged one, so that saving a content again repairs it.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import reduce
from typing import Any

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    Connection,
    Select,
    Text,
    cast,
    func,
    literal,
    select,
    union_all,
)

from dcpstore.catalog.db.key_lists import wanted_digests, wanted_names
from dcpstore.catalog.db.transactions import OpenCatalog, reads_once
from dcpstore.catalog.read.entries import load_tensors
from dcpstore.catalog.read.trees import holding_tensors
from dcpstore.catalog.schema import tables
from dcpstore.catalog.schema.tables import digest_start, hex_start
from dcpstore.records import ChunkKey, ChunkPlace, TensorRecord

__all__ = ["find_chunks", "find_encoded", "find_tensors", "known_tensors", "lost_tensors"]


@reads_once
def find_chunks(
    connection: Connection, digests: Collection[bytes], codec: str | None = None
) -> dict[bytes, ChunkPlace]:
    """Return one place of each stored chunk, by digest; encoded with `codec`, or with any."""
    if not digests:
        return {}
    chunk, pack = tables.chunk, tables.pack
    wanted = wanted_digests(connection, digests)
    # One chunk may belong to as many tensors as there are versions. Take the first that fits from
    # the index, and do not read the others. Nested like this, neither database can change the order
    # and begin with all tensors, or all packs. A scalar subquery has one column, so the four
    # values are joined to a text.
    has_codec = [] if codec is None else [_codec_of_chunk() == codec]
    status = (
        select(pack.c.status)
        .where(pack.c.id == chunk.c.pack, pack.c.damage.is_(None))
        .scalar_subquery()
    )
    key = select(pack.c.key).where(pack.c.id == chunk.c.pack).scalar_subquery()
    checked = func.coalesce(tables.as_hex(chunk.c.checksum), "")
    values = (cast(chunk.c.offset, Text), cast(chunk.c.length, Text), checked, key)
    place = (
        select(reduce(lambda text, value: text + ":" + value, values))
        .where(
            digest_start(chunk.c.digest) == digest_start(wanted.c.digest),
            chunk.c.digest == wanted.c.digest,
            status == "live",
            *has_codec,
        )
        .order_by(chunk.c.tensor)
        .limit(1)
        .correlate(wanted)
        .scalar_subquery()
    )
    places = {}
    for digest, text in connection.execute(select(wanted.c.digest, place)).all():
        if text is not None:
            offset, length, checksum, key = text.split(":", 3)
            checksum = bytes.fromhex(checksum) or None
            places[digest] = ChunkPlace(key, int(offset), int(length), checksum)
    return places


def _codec_of_chunk() -> ColumnElement[str]:
    """Return the codec of a row of `chunk`; all tensors that have a run have the same."""
    chunk, tensor, layout, run = tables.chunk, tables.tensor, tables.layout, tables.run
    codec = select(layout.c.codec).join(tensor, tensor.c.layout == layout.c.id)
    of_tensor = codec.where(tensor.c.id == chunk.c.tensor)
    of_run = codec.join(run, run.c.tensor == tensor.c.id).where(run.c.run == chunk.c.tensor)
    return func.coalesce(of_tensor.scalar_subquery(), of_run.limit(1).scalar_subquery())


def find_encoded(
    on: Connection | OpenCatalog, keys: Collection[ChunkKey]
) -> dict[ChunkKey, ChunkPlace]:
    """Return where those of these chunks lie that the repository holds; one query per codec."""
    return {
        (codec, digest): place
        for codec in dict.fromkeys(codec for codec, _ in keys)
        for digest, place in find_chunks(
            on, [digest for own, digest in keys if own == codec], codec
        ).items()
    }


def known_tensors(connection: Connection, digests: Collection[str]) -> dict[str, tuple[int, bool]]:
    """Return tensors and runs by hex digest: the id, and whether all their packs are live and
    intact.

    Aliases are not looked up.
    """
    if not digests:
        return {}
    tensor = tables.tensor
    rows = connection.execute(
        select(tensor.c.digest, tensor.c.id, tensor.c.id.not_in(_lost()).label("live")).where(
            hex_start(tensor.c.digest).in_(_wanted_starts(connection, digests))
        )
    )
    found = {row.digest.hex(): (row.id, row.live) for row in rows}
    return {digest: found[digest] for digest in digests if digest in found}


def find_tensors(on: Connection | OpenCatalog, digests: Collection[str]) -> dict[str, TensorRecord]:
    """Return the tensors of these digests or aliases whose packs are all live and intact.

    Two queries, or one if there are none.
    """
    ids = _live_tensors(on, digests)
    # A tensor never changes. One that gc deletes between the two queries is not found.
    tensors = load_tensors(on, set(ids.values()))
    return {digest: tensors[held] for digest, held in ids.items() if held in tensors}


@reads_once
def _live_tensors(connection: Connection, digests: Collection[str]) -> dict[str, int]:
    """Return the ids of tensors by their digests or aliases, if their packs are live and intact."""
    if not digests:
        return {}
    alias, tensor = tables.alias, tables.tensor
    named = wanted_digests(connection, [bytes.fromhex(digest) for digest in digests])
    rows = connection.execute(
        union_all(
            select(alias.c.digest, alias.c.tensor, literal(True).label("is_alias")).where(
                alias.c.digest.in_(select(named.c.digest)), alias.c.tensor.not_in(_lost())
            ),
            select(tensor.c.digest, tensor.c.id, literal(False)).where(
                hex_start(tensor.c.digest).in_(_wanted_starts(connection, digests)),
                tensor.c.id.not_in(_lost()),
            ),
        )
    ).all()
    # A tensor goes before an alias. Others may begin with the same digits.
    by_digest = {digest.hex(): held for digest, held, is_alias in rows if is_alias}
    by_digest |= {digest.hex(): held for digest, held, is_alias in rows if not is_alias}
    return {digest: by_digest[digest] for digest in digests if digest in by_digest}


@reads_once
def lost_tensors(connection: Connection) -> set[str]:
    """Return the digests of all tensors with a chunk in a condemned or damaged pack."""
    tensor = tables.tensor
    digests = connection.scalars(select(tensor.c.digest).where(tensor.c.id.in_(_lost())))
    return {digest.hex() for digest in digests}


def _wanted_starts(connection: Connection, digests: Collection[str]) -> Select[Any]:
    """Return a query of what `hex_start` returns for these digests."""
    return wanted_names(connection, {digest[:20] for digest in digests})


def _lost() -> CompoundSelect[Any]:
    """Return a query of the tensors and runs with a chunk in a condemned or damaged pack."""
    chunk, pack = tables.chunk, tables.pack
    lost = union_all(  # not by OR, for which SQLite would read all chunks
        select(pack.c.id).where(pack.c.status == "condemned"),
        select(pack.c.id).where(pack.c.damage.is_not(None)),
    )
    return holding_tensors(select(chunk.c.tensor).where(chunk.c.pack.in_(lost)))
