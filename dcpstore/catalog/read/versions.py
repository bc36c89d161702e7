"""Version rows as `Version` records, in three queries for any number, and the search for ancestors.

A version has an internal id from the moment its save begins, and a number from the moment it
commits. Only numbers leave the catalog.

Each version stores its `depth` (how many ancestors it has) and a `jump`, an ancestor further up:
if the two jumps before it are equally long it jumps over both, otherwise to its parent. So an
ancestor at any depth is found in a number of rows that grows with the logarithm of the distance.
Source: Myers, "An applicative random-access stack", Information Processing Letters 17 (1983).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any, NamedTuple

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    Connection,
    ScalarSelect,
    Select,
    case,
    cast,
    literal,
    select,
    true,
    union_all,
)

from dcpstore.catalog.db.key_lists import wanted_ids
from dcpstore.catalog.db.transactions import reads, reads_once
from dcpstore.catalog.schema import tables
from dcpstore.catalog.schema.tables import columns_of
from dcpstore.errors import NotFoundError
from dcpstore.records import Version, VersionInfo, VersionStats

__all__ = [
    "INFO",
    "STATS",
    "WITHOUT_PARENT",
    "Lineage",
    "ancestor_at",
    "ancestors",
    "ancestors_at",
    "depth_of",
    "expired_error",
    "find_version",
    "id_of_number",
    "is_ancestor",
    "is_visible",
    "lineage_below",
    "lineages",
    "load_version",
    "load_versions",
    "metrics_of",
    "names_of",
]

_version = tables.version
_parent = tables.version.alias("parent_version")
INFO, STATS = columns_of(VersionInfo), columns_of(VersionStats)
_FACTS = [_version.c[name] for name in (*INFO, *STATS)]  # not other columns, which can be long


def load_versions(
    connection: Connection,
    ids: Select[Any] | None = None,
    *,
    limit: int | None = None,
    with_expired: bool = False,
) -> list[Version]:
    """Return the committed versions, newest first: all, or those whose ids a query returns.

    Those that have expired are left out, unless `with_expired` is given.
    """
    query = (
        select(
            _version.c.id,
            _version.c.number,
            _parent.c.number.label("parent"),
            *_FACTS,
        )
        .select_from(_version)
        .outerjoin(_parent, _parent.c.id == _version.c.parent)
        .where(_version.c.number.is_not(None) if with_expired else is_visible())
    )
    if ids is None:
        query = query.order_by(_version.c.number.desc()).limit(limit)
        rows = list(connection.execute(query))
    else:  # asked to sort them, SQLite would look for them among all versions, in their order
        found = connection.execute(query.where(_version.c.id.in_(ids)))
        rows = sorted(found, key=lambda row: row.number, reverse=True)[:limit]
    if not rows:
        return []
    wanted = wanted_ids(connection, [row.id for row in rows])
    tags: dict[int, list[str]] = {}
    ref = tables.ref
    # Sorted here: asked to, SQLite would look for the versions among all tags, in their order.
    for tag in connection.execute(
        select(ref.c.version, ref.c.name).where(ref.c.version.in_(wanted), ref.c.kind == "tag")
    ):
        tags.setdefault(tag.version, []).append(tag.name)
    metrics = metrics_of(connection, wanted)
    return [
        Version(
            number=number,
            parent=parent,
            tags=tuple(sorted(tags.get(id_, ()))),
            metrics=metrics.get(id_, {}),
            **dict(zip((*INFO, *STATS), facts, strict=True)),
        )
        for id_, number, parent, *facts in rows
    ]


@reads_once
def find_version(connection: Connection, key: int | ScalarSelect[int]) -> Version | None:
    """Return the version of an id, or of the id that a query finds; None if it is not visible.

    One query: each tag and metric is a row, which repeats the facts of the version.
    """
    ref, metric = tables.ref, tables.metric
    # With the key in each part, both databases use their indexes.
    no_value = literal(None, tables.Metric()).label("value")
    tag = select(ref.c.name, no_value, literal(True).label("is_tag"))
    number = select(metric.c.name, metric.c.value, literal(False))
    extras = union_all(
        tag.where(ref.c.version == key, ref.c.kind == "tag"), number.where(metric.c.version == key)
    ).subquery("extra")
    rows = connection.execute(
        select(_version.c.number, _parent.c.number.label("parent"), *_FACTS, extras)
        .select_from(_version)
        .outerjoin(_parent, _parent.c.id == _version.c.parent)
        .outerjoin(extras, true())
        .where(_version.c.id == key, is_visible())
        .order_by(extras.c.name)
    ).all()
    if not rows:
        return None
    held, parent, *facts = rows[0][: 2 + len(_FACTS)]
    return Version(
        number=held,
        parent=parent,
        tags=tuple(row.name for row in rows if row.is_tag),
        metrics={row.name: row.value for row in rows if row.is_tag is False},
        **dict(zip((*INFO, *STATS), facts, strict=True)),
    )


def load_version(connection: Connection, version: int) -> Version:
    """Return the version of an id, which is committed and not expired."""
    found = find_version(connection, version)
    assert found is not None, "the version is visible"
    return found


def metrics_of(connection: Connection, ids: Select[Any]) -> dict[int, dict[str, float]]:
    """Return the metrics, sorted by name, of the versions whose ids a query returns; by id."""
    metric = tables.metric
    found: dict[int, dict[str, float]] = {}
    for row in connection.execute(
        select(metric).where(metric.c.version.in_(ids)).order_by(metric.c.version, metric.c.name)
    ):
        found.setdefault(row.version, {})[row.name] = row.value
    return found


def names_of(connection: Connection, ids: Collection[int]) -> dict[int | None, dict[str, Any]]:
    """Return the uid and number of versions by id, as JSON: so the journal names them."""
    rows = connection.execute(
        select(_version.c.id, _version.c.uid, _version.c.number).where(
            _version.c.id.in_(wanted_ids(connection, ids))
        )
    )
    return {row.id: {"uid": row.uid, "version": row.number} for row in rows}


@reads
def id_of_number(connection: Connection, number: int) -> int:
    """Return the id of a committed version.

    Raises:
        NotFoundError: no version has that number, or it was expired.
    """
    found = connection.execute(
        select(_version.c.id, _version.c.expired_at, _version.c.plan).where(
            _version.c.number == number
        )
    ).one_or_none()
    if found is not None:
        if found.expired_at is not None:
            raise expired_error(number, found.expired_at, found.plan)
        return int(found.id)
    newest = connection.scalar(select(tables.repository.c.last_version))
    if not newest:
        raise NotFoundError(f"no version v{number}: the repository is empty. Save a version first.")
    raise NotFoundError(
        f"no version v{number}; the newest is v{newest}. See 'dcpstore log' for all of them."
    )


def is_visible() -> ColumnElement[bool]:
    """Return the condition that a row of `version` is committed and not expired.

    It tests the columns for which the index of numbers is used; with `status` a database would take
    another index, and sort.
    """
    return _version.c.number.is_not(None) & _version.c.expired_at.is_(None)


def expired_error(number: int, expired_at: datetime, plan: int | None) -> NotFoundError:
    """Return the error for an expired version; one that still has a `plan` was forgotten."""
    when = f"{expired_at:%Y-%m-%d at %H:%M} UTC"
    if plan is not None:
        return NotFoundError(
            f"no version v{number} any more: it was forgotten on {when}. Until the next gc, "
            "'dcpstore undo' can bring it back; 'dcpstore ops' shows what it would undo first."
        )
    return NotFoundError(
        f"no version v{number} any more: it was expired on {when}. See 'dcpstore log' for the "
        "versions that are kept."
    )


def ancestors(start: int, *, most: int | None = None) -> CTE:
    """Return a table (id, depth) of a version and its ancestors, `most` generations up at most."""
    up = select(cast(start, BigInteger).label("id"), cast(0, BigInteger).label("depth")).cte(
        "ancestor", recursive=True
    )
    step = select(_version.c.parent, up.c.depth + 1).where(
        _version.c.id == up.c.id, _version.c.parent.is_not(None)
    )
    if most is not None:
        step = step.where(up.c.depth < most)
    return up.union_all(step)


class Lineage(NamedTuple):
    """A version, and what the lineage of a child of it is computed from.

    `above` and `further` are the depths of its jump, and of the jump of that one, which is
    `target`.
    """

    id: int
    uid: str
    number: int | None
    depth: int
    above: int | None
    further: int | None
    target: int | None

    @property
    def below(self) -> dict[str, int | None]:
        """The columns `depth` and `jump` of a child."""
        equally_long = (
            self.target is not None
            and self.above is not None
            and self.further is not None
            and self.depth - self.above == self.above - self.further
        )
        return {"depth": self.depth + 1, "jump": self.target if equally_long else self.id}


WITHOUT_PARENT: Mapping[str, int | None] = MappingProxyType({"depth": 0, "jump": None})


def lineages() -> Select[Any]:
    """Return a query of the columns of `Lineage` for all versions, to be narrowed."""
    above, further = _version.alias("above"), _version.alias("further")
    return (
        select(
            _version.c.id,
            _version.c.uid,
            _version.c.number,
            _version.c.depth,
            above.c.depth.label("above"),
            further.c.depth.label("further"),
            further.c.id.label("target"),
        )
        .outerjoin_from(_version, above, above.c.id == _version.c.jump)
        .outerjoin(further, further.c.id == above.c.jump)
    )


def lineage_below(connection: Connection, parent: int | None) -> Mapping[str, int | None]:
    """Return the columns `depth` and `jump` of a version whose parent has the id `parent`."""
    if parent is None:
        return WITHOUT_PARENT
    return Lineage(*connection.execute(lineages().where(_version.c.id == parent)).one()).below


def depth_of(connection: Connection, version: int) -> int:
    """Return how many ancestors a version has."""
    return int(
        connection.execute(select(_version.c.depth).where(_version.c.id == version)).scalar_one()
    )


def ancestors_at(connection: Connection, start: int, depths: Collection[int]) -> set[int]:
    """Return the ids of the ancestors of `start` (or itself) at some depths; one statement.

    A depth that is greater than that of `start` has none.
    """
    wanted = wanted_ids(connection, depths).subquery("wanted")
    (target,) = wanted.c
    up = (
        select(cast(target, BigInteger).label("target"), _version.c.id, _version.c.depth)
        .select_from(_version)
        .join(wanted, target <= _version.c.depth)
        .where(_version.c.id == start)
        .cte("up", recursive=True)
    )
    jump = _version.alias("jump_version")
    here, above = _version.alias("here"), _version.alias("above")
    step = (
        select(up.c.target, above.c.id, above.c.depth)
        .select_from(up)
        .join(here, here.c.id == up.c.id)
        .outerjoin(jump, jump.c.id == here.c.jump)
        # Take the jump unless it leads too far up.
        .join(
            above,
            above.c.id == case((jump.c.depth >= up.c.target, jump.c.id), else_=here.c.parent),
        )
        .where(up.c.depth > up.c.target)
    )
    up = up.union_all(step)
    return set(connection.scalars(select(up.c.id).where(up.c.depth == up.c.target)))


def ancestor_at(connection: Connection, start: int, depth: int) -> int:
    """Return the id of the ancestor of `start` (or itself) at a depth, which is at most its own."""
    (found,) = ancestors_at(connection, start, [depth])
    return found


def is_ancestor(connection: Connection, version: int, *, of: int) -> bool:
    """Tell whether a version is the other, or one of its ancestors."""
    return version in ancestors_at(connection, of, [depth_of(connection, version)])
