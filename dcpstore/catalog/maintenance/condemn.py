"""Garbage in the catalog: packs that nothing reaches are condemned, and later deleted.

A tensor is reached from the entries of versions, a pack from the chunks of tensors. Gc looks only
at what has changed since the last one: loose nodes, and packs that are new or lost chunks. Every
step is one transaction that locks the repository, as the commit of a save does. So a pack that a
save wants to reuse is either still live when the save commits, or makes it fail (invariant 5).
What a collection would do is computed without the lock (see `preview`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    bindparam,
    case,
    delete,
    exists,
    func,
    insert,
    select,
    true,
    update,
)

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.db.key_lists import wanted_names
from dcpstore.catalog.db.transactions import reads, writes
from dcpstore.catalog.maintenance.expire import drop_forgotten
from dcpstore.catalog.maintenance.sweep import condemn_unused_pages, sweep
from dcpstore.catalog.schema import tables
from dcpstore.catalog.write.forget import loosen
from dcpstore.catalog.write.operations import Change, lock_repository, record
from dcpstore.catalog.write.stale import (
    are_stale,
    is_tagged,
    mark_holders_stale,
    mark_written_stale,
)
from dcpstore.core.checksums import CHECKSUM, PIECE
from dcpstore.core.display import human_duration
from dcpstore.errors import InvalidInputError
from dcpstore.records import ChunkPlace, PackRecord

__all__ = [
    "Condemned",
    "Place",
    "check_running",
    "condemn",
    "find_doomed",
    "find_leftovers",
    "forget_packs",
    "is_crashed",
    "is_unused",
    "plan_pack",
    "sparse_packs",
    "switch_pack",
    "unplan_pack",
]

_version, _pack, _chunk = tables.version, tables.pack, tables.chunk
_unjudged = tables.unjudged

# What is no object of a committed version: of these, those that it needs have a row of their own;
# and references are kept for tagged versions only.
_NOT_OF_TAGGED = ("packs/", "pages/", "plans/")
_NOT_OF_UNTAGGED = (*_NOT_OF_TAGGED, "references/")

Place = tuple[int, int, int]  # tensor, part and ordinal of one chunk


class Condemned(NamedTuple):
    """What one collection found: packs condemned now, sparse packs, and versions by uid.

    `sparse` packs hold few bytes that are still used; `pages` are pages and plans condemned now.
    `crashed` are saves that did not end; `dropped` versions were forgotten, and cannot come back
    any more.
    """

    condemned: list[PackRecord]
    sparse: list[PackRecord]
    pages: list[PackRecord]
    crashed: list[str]
    dropped: list[str]


def condemn(
    catalog: Catalog,
    *,
    now: datetime,
    grace: timedelta,
    lease: timedelta,
    live_share: float,
    author: str,
) -> Condemned:
    """Abort crashed saves, drop forgotten versions and what only they had, condemn unused packs.

    It works in slices, each in a transaction of its own, so that saves wait for none of them long.

    Args:
        catalog: of the repository.
        now: the time to count from.
        grace: how long a condemned pack is kept; a save that has run longer makes this fail.
        lease: how long a save may be silent before it counts as crashed.
        live_share: a pack of which a smaller share of the bytes is used is `sparse`.
        author: of the operations that record it.

    Raises:
        InvalidInputError: a save is running that is older than `grace`.
    """
    first = _begin(catalog, now=now, grace=grace, lease=lease, live_share=live_share, author=author)
    found = first.judged
    while found is None:
        found = _go_on(catalog, now=now, lease=lease, live_share=live_share, author=author)
    return Condemned(*found, first.crashed, first.dropped)


class _Judged(NamedTuple):
    """The packs that are condemned and sparse, and the pages that are condemned."""

    condemned: list[PackRecord]
    sparse: list[PackRecord]
    pages: list[PackRecord]


class _Begun(NamedTuple):
    """What the first slice found; `judged` is None if it was not the last."""

    judged: _Judged | None
    crashed: list[str]
    dropped: list[str]


@writes()
def _begin(
    connection: Connection,
    *,
    now: datetime,
    grace: timedelta,
    lease: timedelta,
    live_share: float,
    author: str,
) -> _Begun:
    lock_repository(connection)
    crashed = _abort_crashed(connection, now=now, lease=lease)
    check_running(connection, now=now, grace=grace)
    dropped = drop_forgotten(connection)
    _forget_plans(connection, now=now)
    judged = None
    if sweep(connection, now=now):
        judged = _judge(connection, now=now, lease=lease, live_share=live_share)
    _record(connection, judged, dropped, author=author, now=now)
    return _Begun(judged, crashed, dropped)


@writes()
def _go_on(
    connection: Connection, *, now: datetime, lease: timedelta, live_share: float, author: str
) -> _Judged | None:
    """Sweep another slice; after the last one, judge the packs."""
    lock_repository(connection)
    if not sweep(connection, now=now):
        return None
    judged = _judge(connection, now=now, lease=lease, live_share=live_share)
    _record(connection, judged, [], author=author, now=now)
    return judged


def _record(
    connection: Connection,
    judged: _Judged | None,
    dropped: list[str],
    *,
    author: str,
    now: datetime,
) -> None:
    condemned = [pack.key for pack in judged.condemned] if judged else []
    done = {"condemned": condemned, "dropped": dropped}
    if detail := {what: names for what, names in done.items() if names}:
        record(connection, Change("gc", detail=detail), author=author, at=now)


@writes()
def plan_pack(connection: Connection, old: str, new: str, *, now: datetime) -> bool:
    """Announce that the used chunks of `old` will be copied to `new`; False if `old` is not live.

    The row of the new pack protects it from gc while it is written.
    """
    lock_repository(connection)
    version = connection.scalar(
        select(_pack.c.version).where(_pack.c.key == old, _pack.c.status == "live")
    )
    if version is None:
        return False
    connection.execute(
        insert(_pack).values(key=new, nbytes=0, version=version, status="planned", planned_at=now)
    )
    return True


@writes(idempotent=True)
def unplan_pack(connection: Connection, key: str) -> None:
    """Remove the row of a pack that was announced and will not be written."""
    connection.execute(delete(_pack).where(_pack.c.key == key, _pack.c.status == "planned"))


@writes()
def switch_pack(
    connection: Connection,
    old: str,
    new: PackRecord,
    moves: Mapping[int, ChunkPlace],
    *,
    now: datetime,
    author: str,
) -> bool:
    """Let every chunk of pack `old` point into `new`, and condemn `old`.

    Returns False if that cannot be done: a save reused a chunk of `old` that was not copied, or a
    pack changed its status. Then the chunks stay as they are, and `new` is condemned.

    Args:
        connection: to the catalog.
        old: the key of the pack that the chunks leave.
        new: the pack that was announced, as it was written.
        moves: the place in `new` of each copied chunk, by its offset in `old`.
        now: the time of the condemnation.
        author: of the operation that records it.
    """
    lock_repository(connection)
    packs = {
        row.key: row
        for row in connection.execute(select(_pack).where(_pack.c.key.in_([old, new.key])))
    }
    source, target = packs.get(old), packs.get(new.key)
    if target is None or target.status != "planned":
        return False
    rows = connection.execute(
        select(_chunk.c.tensor, _chunk.c.ordinal, _chunk.c.offset).where(
            _chunk.c.pack == (None if source is None else source.id)
        )
    ).all()
    if (
        source is None
        or source.status != "live"
        or not rows
        or any(row.offset not in moves for row in rows)
    ):
        connection.execute(
            update(_pack)
            .where(_pack.c.id == target.id)
            .values(status="condemned", condemned_at=now, nbytes=new.nbytes)
        )
        return False
    connection.execute(
        update(_chunk)
        .where(_chunk.c.tensor == bindparam("t"), _chunk.c.ordinal == bindparam("o"))
        .values(pack=target.id, offset=bindparam("at"), checksum=bindparam("sum")),
        [
            {
                "t": row.tensor,
                "o": row.ordinal,
                "at": moves[row.offset].offset,
                "sum": moves[row.offset].checksum,
            }
            for row in rows
        ],
    )
    connection.execute(
        update(_pack)
        .where(_pack.c.id == target.id)
        .values(status="live", planned_at=None, nbytes=new.nbytes)
    )
    connection.execute(
        update(_pack).where(_pack.c.id == source.id).values(status="condemned", condemned_at=now)
    )
    connection.execute(delete(_unjudged).where(_unjudged.c.pack == source.id))
    mark_holders_stale(connection, {row.tensor for row in rows})
    mark_written_stale(connection, [source.version])  # for the same reason as in `_condemn`
    uid = connection.scalar(select(_version.c.uid).where(_version.c.id == target.version))
    detail = {"condemned": [old], "added": [[new.key, new.nbytes, uid]]}
    record(connection, Change("gc", detail=detail), author=author, at=now)
    return True


@reads
def find_doomed(connection: Connection, *, before: datetime) -> list[PackRecord]:
    """Return the packs condemned before a time; none while a stale page may still name them."""
    if are_stale(connection):
        return []
    rows = connection.execute(
        select(_pack.c.key, _pack.c.nbytes)
        .where(
            _pack.c.status == "condemned",
            _pack.c.condemned_at <= before,
            ~exists().where(_chunk.c.pack == _pack.c.id),
        )
        .order_by(_pack.c.key)
    )
    return [PackRecord(*row) for row in rows]


@writes()
def forget_packs(
    connection: Connection, keys: Sequence[str], *, now: datetime, author: str
) -> None:
    """Remove the rows of packs whose bytes were deleted, if they are condemned and unused."""
    lock_repository(connection)
    is_gone = (
        _pack.c.key.in_(wanted_names(connection, keys))
        & (_pack.c.status == "condemned")
        & ~exists().where(_chunk.c.pack == _pack.c.id)
    )
    ids = select(_pack.c.id).where(is_gone)
    connection.execute(delete(_unjudged).where(_unjudged.c.pack.in_(ids)))
    gone = connection.scalars(delete(_pack).where(is_gone).returning(_pack.c.key)).all()
    if gone:  # else another gc has removed all of them
        change = Change("gc", detail={"deleted": sorted(gone)})
        record(connection, change, author=author, at=now)


@reads
def find_leftovers(
    connection: Connection,
    keys: Sequence[tuple[str, str]],
    *,
    crashed: Collection[str],
    dropped: Collection[str],
    expired_before: datetime,
) -> tuple[list[str], list[str]]:
    """Return the keys of objects that may be deleted, and of those whose version is unknown.

    A save whose lease has lapsed since `condemn` keeps its objects, because it may still commit.

    Args:
        connection: to the catalog.
        keys: of objects that belong to a version, each with its uid; they were listed before this
            transaction began.
        crashed: the saves that `condemn` aborted; after a dry run they are still pending.
        dropped: the forgotten versions that it dropped; undo may still restore others, so their
            objects stay.
        expired_before: manifests of versions that expired after this may be in use, and stay.
    """
    names = wanted_names(connection, [key for key, _ in keys])
    known = {
        key
        for column in (_pack.c.key, tables.page.c.key)
        for key in connection.scalars(select(column).where(column.in_(names)))
    }
    rows = {
        row.uid: row
        for row in connection.execute(
            select(
                _version.c.uid,
                _version.c.status,
                _version.c.expired_at,
                _version.c.plan,
                is_tagged().label("tagged"),
            ).where(_version.c.uid.in_(wanted_names(connection, {uid for _, uid in keys})))
        )
    }
    leftovers, unknown = [], []
    for key, uid in keys:
        row = rows.get(uid)
        if key in known:
            continue
        if row is None:
            unknown.append(key)
        elif row.status == "expired":
            if row.expired_at <= expired_before and (row.plan is None or uid in dropped):
                leftovers.append(key)
        elif row.status == "pending":
            if uid in crashed:
                leftovers.append(key)
        elif row.status == "aborted" or key.startswith(
            _NOT_OF_TAGGED if row.tagged else _NOT_OF_UNTAGGED
        ):
            leftovers.append(key)
    return leftovers, unknown


def _abort_crashed(connection: Connection, *, now: datetime, lease: timedelta) -> list[str]:
    """Abort saves that were silent for longer than `lease`.

    If one of them runs after all, its commit fails.
    """
    text = f"it was silent for more than {human_duration(lease)}, so gc treated it as crashed"
    rows = connection.scalars(
        update(_version)
        .where(is_crashed(now=now, lease=lease))
        .values(status="aborted", error=text)
        .returning(_version.c.uid)
    )
    uids = sorted(rows)
    lost = select(_version.c.id).where(_version.c.uid.in_(wanted_names(connection, uids)))
    loosen(connection, lost)
    connection.execute(delete(tables.progress).where(tables.progress.c.version.in_(lost)))
    return uids


def is_crashed(*, now: datetime, lease: timedelta) -> ColumnElement[bool]:
    """Return the condition that a version is a save that was silent for longer than `lease`."""
    return (_version.c.status == "pending") & (_version.c.touched_at <= now - lease)


def check_running(
    connection: Connection,
    *,
    now: datetime,
    grace: timedelta,
    among: ColumnElement[bool] | None = None,
) -> None:
    """Raise InvalidInputError if a save has run longer than `grace`.

    It may reuse a pack that was condemned and deleted since it looked. `among` is a condition on
    versions: only such saves are looked at.
    """
    oldest = connection.execute(
        select(_version.c.started_at, _version.c.author, _version.c.host)
        .where(_version.c.status == "pending", true() if among is None else among)
        .order_by(_version.c.started_at)
        .limit(1)
    ).one_or_none()
    if oldest is not None and now - oldest.started_at > grace:
        age = human_duration(now - oldest.started_at)
        raise InvalidInputError(
            f"a save by {oldest.author!r} on {oldest.host!r} has been running for {age}, longer "
            f"than the grace time of {human_duration(grace)}; wait for it, or give a longer grace "
            "time; if its process is gone, 'dcpstore gc --lease 1m' gives it up."
        )


def _forget_plans(connection: Connection, *, now: datetime) -> None:
    """Remove plans that no version has any more."""
    plan, shard = tables.plan, tables.shard
    unused = select(plan.c.id).where(~exists().where(_version.c.plan == plan.c.id))
    connection.execute(delete(shard).where(shard.c.plan.in_(unused)))
    pages = connection.scalars(delete(plan).where(plan.c.id.in_(unused)).returning(plan.c.page))
    condemn_unused_pages(connection, set(pages) - {None}, now=now)


def _judge(
    connection: Connection, *, now: datetime, lease: timedelta, live_share: float
) -> _Judged:
    """Condemn the packs that nothing uses; return them, those that are sparse, and the pages.

    Only packs that are new or lost chunks are looked at. What is sparse or damaged stays unjudged,
    until its chunks have moved.
    """
    condemned = _condemn(connection, now=now, lease=lease)
    sparse = sparse_packs(connection, live_share, among=select(_unjudged.c.pack))
    is_judged = exists().where(
        _pack.c.id == _unjudged.c.pack,
        _pack.c.damage.is_(None) | (_pack.c.status != "live"),
        _pack.c.key.not_in(wanted_names(connection, [pack.key for pack in sparse])),
    )
    connection.execute(delete(_unjudged).where(is_judged))
    page = tables.page
    pages = connection.execute(
        select(page.c.key, page.c.nbytes)
        .where(page.c.status == "condemned", page.c.condemned_at == now)
        .order_by(page.c.key)
    )
    return _Judged(condemned, sparse, [PackRecord(*row) for row in pages])


def _condemn(connection: Connection, *, now: datetime, lease: timedelta) -> list[PackRecord]:
    """Condemn live packs that nothing uses, and announced ones that were not written in time."""
    rows = connection.execute(
        update(_pack)
        .where(is_unused(now=now, lease=lease, among=select(_unjudged.c.pack)))
        .values(status="condemned", condemned_at=now)
        .returning(_pack.c.key, _pack.c.nbytes, _pack.c.version)
    ).all()
    # If two saves wrote the same chunk at once, the catalog has the pack of the first, while the
    # page of the second still names its own, so the second's page is stale now.
    mark_written_stale(connection, {row.version for row in rows})
    return sorted((PackRecord(*row[:2]) for row in rows), key=lambda pack: pack.key)


def is_unused(
    *,
    now: datetime,
    lease: timedelta,
    among: Select[Any],
    is_kept: ColumnElement[bool] | None = None,
) -> ColumnElement[bool]:
    """Return the condition that a pack is live without chunks, or was not written in time.

    Args:
        now: the time to count from.
        lease: how long an announced pack may be written.
        among: a query of the packs to look at, by id.
        is_kept: a condition on chunks: the others do not count.
    """
    used = exists().where(_chunk.c.pack == _pack.c.id, true() if is_kept is None else is_kept)
    unused = (_pack.c.status == "live") & _pack.c.id.in_(among) & ~used
    return unused | (_pack.c.status == "planned") & (_pack.c.planned_at <= now - lease)


def sparse_packs(
    connection: Connection,
    live_share: float,
    *,
    among: Select[Any],
    is_kept: ColumnElement[bool] | None = None,
) -> list[PackRecord]:
    """Return the packs of which some bytes, but less than `live_share` of them, are used.

    `among` and `is_kept` are as for `is_unused`.
    """
    places = (
        select(_chunk.c.pack, _chunk.c.offset, _chunk.c.length)
        .where(_chunk.c.pack.in_(among), true() if is_kept is None else is_kept)
        .distinct()
        .subquery()
    )
    pieces = (places.c.length + (PIECE - 1)) // PIECE
    # The checksums behind a chunk (`storage.packs`) are used as the chunk is.
    live = func.sum(places.c.length + case((pieces > 1, pieces * CHECKSUM), else_=0))
    rows = connection.execute(
        select(_pack.c.key, _pack.c.nbytes)
        .join(places, places.c.pack == _pack.c.id)
        .where(_pack.c.status == "live", _pack.c.damage.is_(None))
        .group_by(_pack.c.id, _pack.c.key, _pack.c.nbytes)
        .having(live < live_share * _pack.c.nbytes)
        .order_by(_pack.c.key)
    )
    return [PackRecord(*row) for row in rows]
