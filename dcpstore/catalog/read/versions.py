"""Version rows as `Version` records, with their tags and metrics, in three queries for any number.

Versions have an internal id from the moment that their save begins, and a number from the moment
that it commits; only numbers leave the catalog.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    Connection,
    Select,
    and_,
    cast,
    select,
)

from dcpstore.catalog.db.key_lists import wanted_ids
from dcpstore.catalog.schema import tables
from dcpstore.errors import NotFoundError
from dcpstore.records import Version

__all__ = ["ancestors", "gone", "id_of_number", "is_visible", "load_versions"]

_version = tables.version
_parent = tables.version.alias("parent_version")
_COLUMNS = (  # what a record is made of, in its order from `labels` on; other columns can be long
    _version.c.id,
    _version.c.number,
    _version.c.uid,
    _parent.c.number,
    _version.c.branch,
    _version.c.step,
    _version.c.message,
    _version.c.labels,
    _version.c.author,
    _version.c.created_at,
    _version.c.ranks,
    _version.c.nbytes,
    _version.c.nbytes_written,
    _version.c.nbytes_reused,
    _version.c.seconds,
)


def load_versions(
    connection: Connection, ids: Select[Any] | None, *, limit: int | None
) -> list[Version]:
    """Return the committed versions, newest first: all, or those whose ids a query yields."""
    query = (
        select(*_COLUMNS)
        .select_from(_version)
        .outerjoin(_parent, _parent.c.id == _version.c.parent)
        .where(is_visible())
        .order_by(_version.c.number.desc())
        .limit(limit)
    )
    rows = connection.execute(query if ids is None else query.where(_version.c.id.in_(ids))).all()
    if not rows:
        return []
    wanted = wanted_ids(connection, [row.id for row in rows])
    tags: dict[int, list[str]] = {}
    ref = tables.ref
    for tag in connection.execute(
        select(ref.c.version, ref.c.name)
        .where(ref.c.version.in_(wanted), ref.c.kind == "tag")
        .order_by(ref.c.name)
    ):
        tags.setdefault(tag.version, []).append(tag.name)
    metrics: dict[int, dict[str, float]] = {}
    metric = tables.metric
    for value in connection.execute(
        select(metric).where(metric.c.version.in_(wanted)).order_by(metric.c.version, metric.c.name)
    ):
        metrics.setdefault(value.version, {})[value.name] = value.value
    return [
        Version(
            number,
            uid,
            parent,
            branch,
            step,
            tuple(tags.get(id_, ())),
            message,
            metrics.get(id_, {}),
            *rest,
        )
        for id_, number, uid, parent, branch, step, message, *rest in rows
    ]


def id_of_number(connection: Connection, number: int) -> int:
    """Return the id of a committed version.

    Raises:
        NotFoundError: no version has that number, or it was expired.
    """
    found = connection.execute(
        select(_version.c.id, _version.c.number, _version.c.expired_at, _version.c.plan).where(
            _version.c.number == number
        )
    ).one_or_none()
    if found is not None:
        if found.expired_at is not None:
            raise gone(found.number, found.expired_at, found.plan)
        return int(found.id)
    newest = connection.scalar(select(tables.repository.c.last_version))
    if not newest:
        raise NotFoundError(f"no version v{number}: the repository is empty. Save a version first.")
    raise NotFoundError(
        f"no version v{number}; the newest is v{newest}. See 'dcpstore log' for all of them."
    )


def is_visible() -> ColumnElement[bool]:
    """Return the condition that a row of `version` is committed and not expired.

    Said by columns that the index of numbers helps with, where `status` would lead a database to
    another index and a sort.
    """
    return and_(_version.c.number.is_not(None), _version.c.expired_at.is_(None))


def gone(number: int, expired_at: datetime, plan: int | None) -> NotFoundError:
    """Return the error for a version that was expired, or that was forgotten and has a plan yet."""
    when = f"{expired_at:%Y-%m-%d at %H:%M} UTC"
    if plan is not None:
        return NotFoundError(
            f"no version v{number} any more: it was forgotten on {when}. Until the next gc, "
            "'dcpstore undo' can bring it back; 'dcpstore ops' shows what it would undo first."
        )
    return NotFoundError(
        f"no version v{number} any more: it was expired on {when}. See 'dcpstore log' for those "
        "that are kept."
    )


def ancestors(start: int, *, most: int | None = None) -> CTE:
    """Return a table (id, depth) of a version and its ancestors by parent, at `most` levels up."""
    up = select(cast(start, BigInteger).label("id"), cast(0, BigInteger).label("depth")).cte(
        "ancestor", recursive=True
    )
    step = select(_version.c.parent, up.c.depth + 1).where(
        _version.c.id == up.c.id, _version.c.parent.is_not(None)
    )
    if most is not None:
        step = step.where(up.c.depth < most)
    return up.union_all(step)
