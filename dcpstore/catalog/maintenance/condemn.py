"""What nothing reaches any more: condemned first, and forgotten when its bytes are gone.

A tensor is reached by the entries of committed versions, a pack by the chunks of tensors. Every
step is one transaction that waits its turn behind saves, so that what a save is about to reuse is
either still there when it commits, or makes it fail (invariant 5).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import Connection, bindparam, delete, exists, func, insert, select, update

from dcpstore.catalog.db.key_lists import wanted_ids, wanted_names
from dcpstore.catalog.db.transactions import reads, writes
from dcpstore.catalog.maintenance.expire import drop_forgotten
from dcpstore.catalog.schema import tables
from dcpstore.catalog.write.operations import Change, append_operations, take_operations
from dcpstore.catalog.write.stale import mark_holders_stale, mark_stale
from dcpstore.errors import InvalidInputError
from dcpstore.records import PackRecord

__all__ = [
    "Condemned",
    "Place",
    "condemn",
    "find_doomed",
    "find_leftovers",
    "forget_packs",
    "plan_pack",
    "switch_pack",
    "unplan_pack",
]

_version, _pack, _chunk = tables.version, tables.pack, tables.chunk

Place = tuple[int, int, int]  # tensor, part and ordinal of one chunk


class Condemned(NamedTuple):
    """What one look found: packs condemned now, packs mostly dead, and versions by their uids.

    `crashed` are saves that did not end; `dropped` were forgotten, and cannot come back any more.
    """

    condemned: list[PackRecord]
    sparse: list[PackRecord]
    crashed: list[str]
    dropped: list[str]


@writes()
def condemn(
    connection: Connection,
    *,
    now: datetime,
    grace: timedelta,
    lease: timedelta,
    live_share: float,
    author: str,
    dry_run: bool,
) -> Condemned:
    """Drop forgotten versions and unreachable tensors, condemn unreached packs, give up crashes.

    With `dry_run` nothing is changed; the result is what would be.

    Raises:
        InvalidInputError: a save is running that is older than `grace`.
    """
    with connection.begin_nested() as step:
        found = _condemn(
            connection, now=now, grace=grace, lease=lease, live_share=live_share, author=author
        )
        if dry_run:
            step.rollback()
        return found


def _condemn(
    connection: Connection,
    *,
    now: datetime,
    grace: timedelta,
    lease: timedelta,
    live_share: float,
    author: str,
) -> Condemned:
    take_operations(connection, 0)  # everyone else waits
    crashed = _give_up_crashed(connection, now=now, lease=lease)
    _check_running(connection, now=now, grace=grace)
    dropped = drop_forgotten(connection)
    _forget_tensors(connection)
    _forget_plans(connection)
    unreached = ~exists().where(_chunk.c.pack == _pack.c.id)
    lapsed = (_pack.c.status == "planned") & (_pack.c.planned_at <= now - lease)
    rows = connection.execute(
        update(_pack)
        .where((_pack.c.status == "live") & unreached | lapsed)
        .values(status="condemned", condemned_at=now)
        .returning(_pack.c.key, _pack.c.nbytes, _pack.c.version)
    ).all()
    condemned = sorted((PackRecord(*row[:2]) for row in rows), key=lambda pack: pack.key)
    if condemned:
        # Of two saves that wrote the same at once, the second's manifest names its own pack still.
        writers = wanted_ids(connection, {row.version for row in rows})
        mark_stale(connection, _version.c.id.in_(writers), _version.c.status == "committed")
    done = {"condemned": [pack.key for pack in condemned], "dropped": dropped}
    if any(done.values()):
        _record(connection, {what: n for what, n in done.items() if n}, author=author, at=now)
    return Condemned(condemned, _sparse(connection, live_share), crashed, dropped)


@writes()
def plan_pack(connection: Connection, old: str, new: str, *, now: datetime) -> bool:
    """Announce that the live chunks of a pack are to be copied to another; False: it went away."""
    take_operations(connection, 0)
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
    """Forget a pack that was announced and will not be written."""
    connection.execute(delete(_pack).where(_pack.c.key == key, _pack.c.status == "planned"))


@writes()
def switch_pack(
    connection: Connection,
    old: str,
    new: PackRecord,
    moves: Mapping[int, int],
    *,
    now: datetime,
    author: str,
) -> bool:
    """Let every chunk of pack `old` lie in `new`, where `moves` says, and condemn `old`.

    False, and nothing is changed, where a chunk came in since that was not copied, or either pack
    is no longer what it was; `new` is then condemned.
    """
    take_operations(connection, 0)
    packs = {
        row.key: row
        for row in connection.execute(select(_pack).where(_pack.c.key.in_([old, new.key])))
    }
    source, target = packs.get(old), packs.get(new.key)
    if target is None or target.status != "planned":
        return False
    rows = connection.execute(
        select(_chunk.c.tensor, _chunk.c.part, _chunk.c.ordinal, _chunk.c.offset).where(
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
        .where(
            _chunk.c.tensor == bindparam("t"),
            _chunk.c.part == bindparam("p"),
            _chunk.c.ordinal == bindparam("o"),
        )
        .values(pack=target.id, offset=bindparam("at")),
        [
            {"t": row.tensor, "p": row.part, "o": row.ordinal, "at": moves[row.offset]}
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
    mark_holders_stale(connection, {row.tensor for row in rows})
    uid = connection.scalar(select(_version.c.uid).where(_version.c.id == target.version))
    detail = {"condemned": [old], "added": [[new.key, new.nbytes, uid]]}
    number = take_operations(connection)
    append_operations(
        connection, number, [Change("gc", "", None, None, detail)], author=author, at=now
    )
    return True


@reads
def find_doomed(connection: Connection, *, before: datetime) -> list[PackRecord]:
    """Return the packs condemned before a time; none while a manifest may still name them."""
    if connection.scalar(select(func.count()).where(_version.c.stale.is_not(None))):
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
    """Remove the rows of condemned packs whose bytes are gone; others than these stay."""
    take_operations(connection, 0)
    gone = connection.scalars(
        delete(_pack)
        .where(
            _pack.c.key.in_(wanted_names(connection, keys)),
            _pack.c.status == "condemned",
            ~exists().where(_chunk.c.pack == _pack.c.id),
        )
        .returning(_pack.c.key)
    ).all()
    if gone:  # or another gc was faster
        _record(connection, {"deleted": sorted(gone)}, author=author, at=now)


@reads
def find_leftovers(
    connection: Connection,
    keys: Sequence[tuple[str, str]],
    *,
    crashed: Collection[str],
    dropped: Collection[str],
    expired_before: datetime,
) -> tuple[list[str], list[str]]:
    """Sort stored objects that lie in the name of a version: may go, and whose nobody knows.

    A save whose lease has lapsed since `condemn` keeps what it wrote: it may still commit.

    Args:
        keys: each with the uid in its name; they were listed before this transaction began.
        crashed: the saves that `condemn` gave up; after a dry run they are still pending.
        dropped: the forgotten versions that it dropped; others may come back, and stay whole.
        expired_before: manifests of versions that expired later may still be followed.
    """
    given = list(keys)
    known = set(
        connection.scalars(
            select(_pack.c.key).where(
                _pack.c.key.in_(wanted_names(connection, [key for key, _ in given]))
            )
        )
    )
    rows = {
        row.uid: row
        for row in connection.execute(
            select(_version.c.uid, _version.c.status, _version.c.expired_at, _version.c.plan).where(
                _version.c.uid.in_(wanted_names(connection, {uid for _, uid in given}))
            )
        )
    }
    leftovers, unknown = [], []
    for key, uid in given:
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
        elif row.status == "aborted" or key.startswith("packs/"):
            leftovers.append(key)
    return leftovers, unknown


def _give_up_crashed(connection: Connection, *, now: datetime, lease: timedelta) -> list[str]:
    """Abort saves that have been silent for longer than their lease; a late one then fails."""
    text = f"it was silent for more than {lease}, so gc took it for crashed"
    rows = connection.scalars(
        update(_version)
        .where(_version.c.status == "pending", _version.c.touched_at <= now - lease)
        .values(status="aborted", error=text)
        .returning(_version.c.uid)
    )
    uids = sorted(rows)
    lost = select(_version.c.id).where(_version.c.uid.in_(wanted_names(connection, uids)))
    connection.execute(delete(tables.progress).where(tables.progress.c.version.in_(lost)))
    return uids


def _check_running(connection: Connection, *, now: datetime, grace: timedelta) -> None:
    oldest = connection.execute(
        select(_version.c.started_at, _version.c.author, _version.c.host)
        .where(_version.c.status == "pending")
        .order_by(_version.c.started_at)
        .limit(1)
    ).one_or_none()
    if oldest is not None and now - oldest.started_at > grace:
        age = timedelta(seconds=round((now - oldest.started_at).total_seconds()))
        raise InvalidInputError(
            f"a save by {oldest.author!r} on {oldest.host!r} has been running for {age}, longer "
            f"than the grace time of {grace}; wait for it, or give a longer grace time."
        )


def _forget_tensors(connection: Connection) -> None:
    """Remove tensors that no entry names, with all that belongs to them."""
    tensor, entry = tables.tensor, tables.entry
    dead = connection.scalars(
        select(tensor.c.id).where(~exists().where(entry.c.tensor == tensor.c.id))
    ).all()
    if not dead:
        return
    for column in (tables.alias.c.tensor, _chunk.c.tensor, tables.part.c.tensor, tensor.c.id):
        connection.execute(delete(column.table).where(column.in_(wanted_ids(connection, dead))))


def _forget_plans(connection: Connection) -> None:
    """Remove plans that no version was saved by any more."""
    plan, shard = tables.plan, tables.shard
    unused = select(plan.c.id).where(~exists().where(_version.c.plan == plan.c.id))
    connection.execute(delete(shard).where(shard.c.plan.in_(unused)))
    connection.execute(delete(plan).where(plan.c.id.in_(unused)))


def _sparse(connection: Connection, live_share: float) -> list[PackRecord]:
    """Return the packs of which less than `live_share` of the bytes is reached."""
    places = select(_chunk.c.pack, _chunk.c.offset, _chunk.c.length).distinct().subquery()
    live = func.sum(places.c.length)
    rows = connection.execute(
        select(_pack.c.key, _pack.c.nbytes)
        .join(places, places.c.pack == _pack.c.id)
        .where(_pack.c.status == "live", _pack.c.damage.is_(None))
        .group_by(_pack.c.id, _pack.c.key, _pack.c.nbytes)
        .having(live < live_share * _pack.c.nbytes)
        .order_by(_pack.c.key)
    )
    return [PackRecord(*row) for row in rows]


def _record(
    connection: Connection, detail: Mapping[str, list[str]], *, author: str, at: datetime
) -> None:
    number = take_operations(connection)
    change = Change("gc", "", None, None, detail)
    append_operations(connection, number, [change], author=author, at=at)
