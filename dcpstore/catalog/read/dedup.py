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
from dcpstore.catalog.read.entries import as_records, tensor_rows
from dcpstore.catalog.read.trees import holding_tensors
from dcpstore.catalog.schema import tables
from dcpstore.catalog.schema.tables import digest_start, hex_start
from dcpstore.records import ChunkKey, ChunkPlace, TensorRecord

__all__ = ["find_chunks", "find_encoded", "find_tensors", "find_tensors_and_lost", "lost_ids"]


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


def find_tensors(on: Connection | OpenCatalog, digests: Collection[str]) -> dict[str, TensorRecord]:
    """Return the tensors of these digests or aliases whose packs are all live and intact."""
    return _find(on, digests, with_lost=False)[0] if digests else {}


def find_tensors_and_lost(
    on: Connection | OpenCatalog, digests: Collection[str]
) -> tuple[dict[str, TensorRecord], set[str]]:
    """Return what `find_tensors` does, and the digests of all tensors that have a lost chunk.

    A chunk is lost if its pack is condemned or damaged.
    """
    return _find(on, digests, with_lost=True)


@reads_once
def _find(
    connection: Connection, digests: Collection[str], *, with_lost: bool
) -> tuple[dict[str, TensorRecord], set[str]]:
    alias, tensor = tables.alias, tables.tensor
    named = wanted_digests(connection, [bytes.fromhex(digest) for digest in digests])
    queries = [
        tensor_rows(literal("alias"), alias.c.digest)
        .join(alias, alias.c.tensor == tensor.c.id)
        .where(alias.c.digest.in_(select(named.c.digest)), alias.c.tensor.not_in(lost_ids())),
        tensor_rows(literal("own"), tensor.c.digest).where(
            hex_start(tensor.c.digest).in_(_wanted_starts(connection, digests)),
            tensor.c.id.not_in(lost_ids()),
        ),
    ]
    if with_lost:
        of_lost = tensor_rows(literal("lost"), tensor.c.digest)
        queries.append(of_lost.where(tensor.c.id.in_(lost_ids())))
    rows = connection.execute(union_all(*queries)).all()
    records = as_records(row[2:] for row in rows)
    found: dict[str, dict[str, TensorRecord]] = {"alias": {}, "own": {}, "lost": {}}
    for kind, digest, held, *_ in rows:
        found[kind][digest.hex()] = records[held]
    # A tensor goes before an alias. Others may begin with the same digits.
    by_digest = found["alias"] | found["own"]
    return {d: by_digest[d] for d in digests if d in by_digest}, set(found["lost"])


def _wanted_starts(connection: Connection, digests: Collection[str]) -> Select[Any]:
    """Return a query of what `hex_start` returns for these digests."""
    return wanted_names(connection, {digest[:20] for digest in digests})


def lost_ids() -> CompoundSelect[Any]:
    """Return a query of the tensors and runs with a chunk in a condemned or damaged pack."""
    chunk, pack = tables.chunk, tables.pack
    lost = union_all(  # not by OR, for which SQLite would read all chunks
        select(pack.c.id).where(pack.c.status == "condemned"),
        select(pack.c.id).where(pack.c.damage.is_not(None)),
    )
    return holding_tensors(select(chunk.c.tensor).where(chunk.c.pack.in_(lost)))
