"""Versions expire: their entries go, their rows stay for parents and operations to resolve."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, delete, select, update

from dcpstore.catalog import schema
from dcpstore.catalog.operations import Change, append_operations, take_operations
from dcpstore.catalog.refs import list_refs
from dcpstore.catalog.versions import load_versions
from dcpstore.catalog.wanted import wanted_ids
from dcpstore.records import RefRecord, Version

__all__ = ["Choose", "expire_versions"]

# Given every version and every ref, returns the numbers of the versions to expire.
Choose = Callable[[Sequence[Version], Sequence[RefRecord]], Collection[int]]


def expire_versions(
    connection: Connection, choose: Choose, *, author: str, rules: Mapping[str, Any]
) -> None:
    """Expire what `choose` chooses, while no ref can move; `rules` is kept with the operation."""
    take_operations(connection, 0)
    version, entry = schema.version, schema.entry
    versions = load_versions(connection, select(version.c.id), limit=None)
    chosen = set(choose(versions, list_refs(connection, None)))
    if not chosen:
        return
    now = datetime.now(UTC)
    rows = connection.execute(
        select(version.c.id, version.c.uid)
        .where(version.c.number.in_(wanted_ids(connection, chosen)))
        .order_by(version.c.number)
    ).all()
    wanted = wanted_ids(connection, [row.id for row in rows])
    connection.execute(delete(entry).where(entry.c.version.in_(wanted)))
    connection.execute(
        update(version)
        .where(version.c.id.in_(wanted))
        .values(status="expired", expired_at=now, plan=None, stale=None)
    )
    change = Change(
        "expire",
        _ranges(sorted(chosen)),
        None,
        None,
        {"versions": [row.uid for row in rows], "rules": dict(rules)},
    )
    append_operations(connection, take_operations(connection), [change], author=author, at=now)


def _ranges(numbers: Sequence[int]) -> str:
    """Return numbers for people: `v1-v3,v5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(f"v{number}" for number in run) for run in runs)
