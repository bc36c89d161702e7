"""A committed version in the form in which its save handed it over: for copies and manifests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from sqlalchemy import Connection, select

from dcpstore.catalog.db.key_lists import wanted_ids
from dcpstore.catalog.db.transactions import reads
from dcpstore.catalog.read.entries import load_entries, load_plan
from dcpstore.catalog.read.versions import STATS, ancestors, id_of_number, load_versions
from dcpstore.catalog.schema import tables
from dcpstore.errors import CorruptionError
from dcpstore.records import (
    NewChunk,
    NewEntry,
    NewTensor,
    PackRecord,
    TensorRecord,
    VersionContent,
    VersionDraft,
    VersionInfo,
)

__all__ = ["lineage", "load_content"]

_version = tables.version


@reads
def load_content(connection: Connection, number: int) -> tuple[VersionDraft, VersionContent]:
    """Return a committed version whole: every tensor with all its chunks, as they lie now.

    Raises:
        NotFoundError: there is no such version, or it was expired.
        CorruptionError: the catalog lacks some of its chunks.
    """
    version_id = id_of_number(connection, number)
    row = connection.execute(select(_version).where(_version.c.id == version_id)).one()
    (version,) = load_versions(
        connection, select(_version.c.id).where(_version.c.id == version_id), limit=1
    )
    entries = load_entries(connection, number, None)
    tensors = {e.tensor.id: e.tensor for e in entries if e.tensor is not None}
    chunks = _chunks(connection, version_id)
    pack = tables.pack
    packs = connection.execute(
        select(pack.c.key, pack.c.nbytes)
        .where(pack.c.version == version_id, pack.c.status == "live")
        .order_by(pack.c.id)
    )
    draft = VersionDraft(
        **{fact.name: getattr(version, fact.name) for fact in fields(VersionInfo)},
        parent=version.parent,
    )
    content = VersionContent(
        entries=[
            NewEntry(
                entry.fqn,
                entry.path,
                entry.kind,
                None if entry.tensor is None else entry.tensor.digest,
                entry.value,
            )
            for entry in entries
        ],
        tensors=[_new(tensor, chunks.get(tensor.id, [])) for tensor in tensors.values()],
        packs=[PackRecord(*found) for found in packs],
        plan=load_plan(connection, number),
        **{name: getattr(version, name) for name in STATS},
        aliases=_aliases(connection, tensors.values()),
        planner_data=row.planner_data,
    )
    return draft, content


@reads
def lineage(connection: Connection, number: int) -> list[str]:
    """Return the uids of the ancestors of a version, the parent first, expired ones included."""
    up = ancestors(id_of_number(connection, number))
    rows = connection.scalars(
        select(_version.c.uid)
        .join(up, up.c.id == _version.c.id)
        .where(up.c.depth > 0)
        .order_by(up.c.depth)
    )
    return list(rows)


def _new(tensor: TensorRecord, chunks: list[NewChunk]) -> NewTensor:
    if len(chunks) != sum(part.size for part in tensor.parts):
        raise CorruptionError(
            f"the catalog lacks chunks of the tensor {tensor.digest}; run 'dcpstore verify'."
        )
    return NewTensor.of(tensor, chunks)


def _aliases(connection: Connection, tensors: Iterable[TensorRecord]) -> dict[str, str]:
    alias = tables.alias
    digests = {tensor.id: tensor.digest for tensor in tensors}
    rows = connection.execute(
        select(alias).where(alias.c.tensor.in_(wanted_ids(connection, digests.keys())))
    )
    return {row.digest: digests[row.tensor] for row in rows}


def _chunks(connection: Connection, version_id: int) -> dict[int, list[NewChunk]]:
    """Return the chunks of every tensor of a version, in order of (part, ordinal)."""
    chunk, pack, entry = tables.chunk, tables.pack, tables.entry
    held = select(entry.c.tensor).where(entry.c.version == version_id, entry.c.tensor.is_not(None))
    found: dict[int, list[NewChunk]] = {}
    for row in connection.execute(
        select(chunk, pack.c.key)
        .join(pack, pack.c.id == chunk.c.pack)
        .where(chunk.c.tensor.in_(held))
        .order_by(chunk.c.tensor, chunk.c.part, chunk.c.ordinal)
    ):
        found.setdefault(row.tensor, []).append(
            NewChunk(row.part, row.ordinal, row.digest, row.key, row.offset, row.length)
        )
    return found
