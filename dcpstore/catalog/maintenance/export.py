"""A committed version in the form in which its save handed it over: for copies and manifests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from sqlalchemy import Connection, select

from dcpstore.catalog.db.key_lists import wanted_ids
from dcpstore.catalog.db.transactions import reads
from dcpstore.catalog.read.entries import (
    load_entries,
    load_plan,
    load_planner_data,
    load_whole_tensors,
)
from dcpstore.catalog.read.versions import STATS, ancestors, id_of_number, load_version
from dcpstore.catalog.schema import tables
from dcpstore.errors import ConflictError, CorruptionError
from dcpstore.records import (
    NewEntry,
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
    """Return a committed version with all its tensors and chunks, where they are stored now.

    Raises:
        NotFoundError: there is no such version, or it was expired.
        CorruptionError: the catalog lacks some of its chunks.
    """
    version_id = id_of_number(connection, number)
    version = load_version(connection, version_id)
    entries = load_entries(connection, number)
    tensors = {e.tensor.id: e.tensor for e in entries if e.tensor is not None}.values()
    try:
        whole_tensors = load_whole_tensors(connection, tensors)
    except ConflictError as error:  # gc cannot have deleted them, within one transaction
        raise CorruptionError(
            f"the catalog lacks chunks of v{number}; run 'dcpstore verify'."
        ) from error
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
        tensors=whole_tensors,
        packs=[PackRecord(*found) for found in packs],
        plan=load_plan(connection, number),
        **{name: getattr(version, name) for name in STATS},
        aliases=_aliases(connection, tensors),
        planner_data=load_planner_data(connection, number),
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


def _aliases(connection: Connection, tensors: Iterable[TensorRecord]) -> dict[str, str]:
    """Return the aliases of tensors: digests of the same contents under other grids."""
    alias = tables.alias
    digests = {tensor.id: tensor.digest for tensor in tensors}
    rows = connection.execute(
        select(alias).where(alias.c.tensor.in_(wanted_ids(connection, digests.keys())))
    )
    return {row.digest.hex(): digests[row.tensor] for row in rows}
