"""What the journal in the data folder says of each operation: enough to restore the catalog from.

An operation is self-describing: versions go by uid and number, and one that made a version, or
changed what is known of it, says all that its row says. `restore` reads it back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, select, update

from dcpstore.catalog.db.key_lists import wanted_ids
from dcpstore.catalog.db.transactions import reads, writes
from dcpstore.catalog.schema import tables

__all__ = [
    "ABOUT_REFS",
    "JOURNAL_BATCH",
    "ChangedRef",
    "changed_refs",
    "journal_again",
    "last_journaled",
    "mark_journaled",
    "unjournaled",
]

# Operations that name versions and tell nothing new about them.
ABOUT_REFS = frozenset({"tag", "branch", "rollback", "delete_tag", "delete_branch"})
JOURNAL_BATCH = 500

# JSON to be written: its values are of every kind, hence `Any`.
Json = dict[str, Any]


class ChangedRef(NamedTuple):
    """What an operation did to one ref; `old` and `new` are versions by uid and number, or None.

    `kind` is None where the operation does not say whether it is a tag or a branch.
    """

    name: str
    kind: str | None
    old: Mapping[str, Any] | None
    new: Mapping[str, Any] | None


def changed_refs(said: Mapping[str, Any]) -> Iterator[ChangedRef]:
    """Yield what an operation, as the journal says it, did to refs: its detail may list several."""
    detail = said["detail"] or {}
    if "refs" in detail:
        for ref in detail["refs"]:
            yield ChangedRef(ref["name"], ref["kind"], ref["old"], ref["new"])
    elif said["target"] and (said["old"] or said["new"]):
        kind = {"tag": "tag", "branch": "branch", "save": "branch"}.get(said["kind"])
        yield ChangedRef(said["target"], kind, said["old"], said["new"])


@reads
def unjournaled(connection: Connection) -> list[Json]:
    """Return the oldest operations that are not known to be in the data folder, in order."""
    operation = tables.operation
    written = connection.scalar(select(tables.repository.c.last_journaled))
    rows = connection.execute(
        select(operation)
        .where(operation.c.number > written)
        .order_by(operation.c.number)
        .limit(JOURNAL_BATCH)
    ).all()
    if not rows:
        return []
    named = {found for row in rows for found in (row.old, row.new) if found is not None}
    made = {row.new for row in rows if row.new is not None and row.kind not in ABOUT_REFS}
    versions = _names(connection, named)
    facts = _versions_as_json(connection, made)
    return [
        {
            "operation": row.number,
            "kind": row.kind,
            "target": row.target,
            "old": versions.get(row.old),
            "new": versions.get(row.new),
            "author": row.author,
            "created_at": row.created_at.isoformat(),
            "detail": row.detail,
        }
        | ({"version": facts[row.new]} if row.new in facts else {})
        | ({"repository": _about(connection)} if row.kind == "init" else {})
        for row in rows
    ]


@writes(idempotent=True)
def mark_journaled(connection: Connection, number: int) -> None:
    """Note that every operation up to `number` is durable in the data folder."""
    written = tables.repository.c.last_journaled
    connection.execute(
        update(tables.repository).where(written < number).values(last_journaled=number)
    )


@reads
def last_journaled(connection: Connection) -> int:
    """Return the last operation that is known to be in the data folder."""
    return int(connection.execute(select(tables.repository.c.last_journaled)).scalar_one())


@writes(idempotent=True)
def journal_again(connection: Connection, number: int) -> None:
    """Have the operations from `number` on written once more."""
    written = tables.repository.c.last_journaled
    connection.execute(
        update(tables.repository).where(written >= number).values(last_journaled=number - 1)
    )


def _about(connection: Connection) -> Json:
    row = connection.execute(select(tables.repository)).one()
    return {
        "uid": row.uid,
        "format_version": row.format_version,
        "chunk_nbytes": row.chunk_nbytes,
        "chunk_codec": row.chunk_codec,
        "created_at": row.created_at.isoformat(),
    }


def _names(connection: Connection, ids: Iterable[int]) -> dict[int | None, Json]:
    version = tables.version
    rows = connection.execute(
        select(version.c.id, version.c.uid, version.c.number).where(
            version.c.id.in_(wanted_ids(connection, list(ids)))
        )
    )
    return {row.id: {"uid": row.uid, "version": row.number} for row in rows}


def _versions_as_json(connection: Connection, ids: set[int]) -> dict[int, Json]:
    """Return all that rows say of versions, their packs and metrics included, by id."""
    if not ids:
        return {}
    version, parent = tables.version, tables.version.alias("parent_version")
    metric, pack = tables.metric, tables.pack
    wanted = wanted_ids(connection, ids)
    facts = {
        row.id: _version_as_json(row)
        for row in connection.execute(
            select(version, parent.c.uid.label("parent_uid"))
            .outerjoin(parent, parent.c.id == version.c.parent)
            .where(version.c.id.in_(wanted))
        )
    }
    for row in connection.execute(select(metric).where(metric.c.version.in_(wanted))):
        shown = row.value if math.isfinite(row.value) else str(row.value)  # JSON has no inf
        facts[row.version]["metrics"][row.name] = shown
    for row in connection.execute(
        select(pack.c.version, pack.c.key, pack.c.nbytes)
        .where(pack.c.version.in_(wanted), pack.c.planned_at.is_(None))
        .order_by(pack.c.id)
    ):
        facts[row.version]["packs"].append([row.key, row.nbytes])
    return facts


def _version_as_json(row: Row[Any]) -> Json:
    return {
        "uid": row.uid,
        "number": row.number,
        "parent": row.parent_uid,
        "branch": row.branch,
        "step": row.step,
        "message": row.message,
        "labels": row.labels,
        "metrics": {},
        "author": row.author,
        "host": row.host,
        "ranks": row.ranks,
        "nbytes": row.nbytes,
        "nbytes_written": row.nbytes_written,
        "nbytes_reused": row.nbytes_reused,
        "seconds": row.seconds,
        "started_at": _text(row.started_at),
        "created_at": _text(row.created_at),
        "packs": [],
    }


def _text(time: datetime) -> str:
    return time.isoformat()
