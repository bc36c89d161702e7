"""Saves that run: their leases, and how far each rank is.

Invariant: what is told of a save goes with it, whether it commits, is given up, or crashes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime

from sqlalchemy import Connection, delete, insert, select, update

from dcpstore.catalog import schema
from dcpstore.records import RankProgress, RunningSave

__all__ = ["forget_progress", "list_running", "touch_save"]

_version, _progress = schema.version, schema.progress


def touch_save(connection: Connection, uid: str, progress: Sequence[RankProgress]) -> None:
    """Note that a pending save is still at work, and how far its ranks are."""
    pending = connection.scalar(
        update(_version)
        .where(_version.c.uid == uid, _version.c.status == "pending")
        .values(touched_at=datetime.now(UTC))
        .returning(_version.c.id)
    )
    if pending is not None and progress:
        forget_progress(connection, pending)
        connection.execute(
            insert(_progress), [{"version": pending, **asdict(one)} for one in progress]
        )


def forget_progress(connection: Connection, version: int) -> None:
    """Remove what was told of a save that has ended."""
    connection.execute(delete(_progress).where(_progress.c.version == version))


def list_running(connection: Connection) -> list[RunningSave]:
    """Return the saves that have begun and not ended, the oldest first."""
    rows = connection.execute(
        select(_version).where(_version.c.status == "pending").order_by(_version.c.started_at)
    ).all()
    told: dict[int, list[RankProgress]] = {row.id: [] for row in rows}
    for row in connection.execute(select(_progress).order_by(_progress.c.rank)):
        if row.version in told:  # else its coordinator crashed, and gc gave it up
            told[row.version].append(
                RankProgress(row.rank, row.phase, row.nbytes, row.total, row.since)
            )
    return [
        RunningSave(
            uid=row.uid,
            branch=row.branch,
            step=row.step,
            author=row.author,
            host=row.host,
            ranks=row.ranks,
            started_at=row.started_at,
            touched_at=row.touched_at,
            progress=tuple(told[row.id]),
        )
        for row in rows
    ]
