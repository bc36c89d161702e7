"""The lease and the progress of a running save.

A thread of the coordinator renews the lease as a heartbeat; garbage collection treats a save that
was silent for its lease as crashed, and clears what it wrote. Invariant: the progress of a save is
removed with it, whether it commits, is given up, or crashes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from sqlalchemy import Connection, delete, insert, select, update

from dcpstore.catalog.db.transactions import reads, writes
from dcpstore.catalog.schema import tables
from dcpstore.records import RankProgress, RunningSave

if TYPE_CHECKING:
    from dcpstore.catalog.catalog import Catalog
from dcpstore.errors import DcpstoreError

__all__ = ["forget_progress", "kept_lease", "list_running", "touch_save"]

_log = logging.getLogger(__name__)
_FIRST = 1.0  # seconds; what ends sooner costs the database nothing
_SECONDS = 10.0  # between renewals; gc takes an hour of silence for a crash

_version, _progress = tables.version, tables.progress


@writes(idempotent=True)
def touch_save(connection: Connection, uid: str, progress: Sequence[RankProgress] = ()) -> None:
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
    """Remove the progress of a save that has ended."""
    connection.execute(delete(_progress).where(_progress.c.version == version))


@reads
def list_running(connection: Connection) -> list[RunningSave]:
    """Return the saves that have begun and not ended, the oldest first."""
    rows = connection.execute(
        select(_version).where(_version.c.status == "pending").order_by(_version.c.started_at)
    ).all()
    by_version: dict[int, list[RankProgress]] = {row.id: [] for row in rows}
    for row in connection.execute(select(_progress).order_by(_progress.c.rank)):
        if row.version in by_version:  # else its coordinator crashed, and gc gave it up
            by_version[row.version].append(
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
            progress=tuple(by_version[row.id]),
        )
        for row in rows
    ]


@contextmanager
def kept_lease(
    catalog: Catalog,
    uid: str,
    *,
    progress: Callable[[], Sequence[RankProgress]] = tuple,
    seconds: float = _SECONDS,
) -> Iterator[None]:
    """Renew the lease of the pending version `uid` until the block ends.

    Each renewal also writes the `progress` of the ranks. A connection to the catalog is kept for
    the queries of the save.
    """
    ended = threading.Event()

    def renew() -> None:
        pause = min(_FIRST, seconds)
        while not ended.wait(pause):
            pause = seconds
            try:
                touch_save(catalog, uid, progress())
            except DcpstoreError as error:
                _log.warning("the lease of the save %s was not renewed: %s", uid, error)

    thread = threading.Thread(target=renew, name="dcpstore-lease", daemon=True)
    thread.start()
    try:
        with catalog.keep_connection():
            yield
    finally:
        ended.set()
        thread.join()
