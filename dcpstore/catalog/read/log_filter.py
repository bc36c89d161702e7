"""The log: which versions it lists, by conditions in SQL, and which is best by a metric.

A page of the log costs about the same however many versions there are. Most conditions are met by
the newest versions, so these are looked at first. If they do not fill the page, an index may know
that few versions meet one of the conditions, and only these are looked at. Else all are, from the
newest on, until the page is full.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    Row,
    Select,
    and_,
    case,
    exists,
    literal,
    select,
    true,
    union_all,
)

from dcpstore.catalog.db.key_lists import wanted_ids
from dcpstore.catalog.db.transactions import reads
from dcpstore.catalog.read.known_names import distinct_names
from dcpstore.catalog.read.versions import (
    ancestors,
    ancestors_at,
    id_of_number,
    is_visible,
    load_version,
    load_versions,
)
from dcpstore.catalog.schema import tables
from dcpstore.catalog.validation import check_labels, check_limit, check_steps, check_text
from dcpstore.core.durations import in_utc
from dcpstore.core.syntax import NAME_CHARACTERS
from dcpstore.errors import InvalidInputError, NotFoundError
from dcpstore.records import Version

__all__ = [
    "LogFilter",
    "best_ids",
    "best_version",
    "check_metrics",
    "has_metric",
    "known_metrics",
    "list_log",
]

_version, _metric, _label, _ref = tables.version, tables.metric, tables.label, tables.ref
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
}
_COMPARISON = re.compile(r"\s*(?P<name>[^<>=!]*[^<>=!\s])\s*(?P<sign>[<>=!]=?)\s*(?P<value>\S+)\s*")
_GLOB = re.compile(f"[*?{NAME_CHARACTERS}]+")
_NEWEST = 1_000  # versions that are looked at before an index is asked
_FEW = 1_000  # versions that are looked at in the order of an index, and sorted
_RECENT = 100  # versions among which a metric usually is
_OFFERED = 500  # names among which the nearest is looked for


@dataclass(frozen=True, slots=True)
class LogFilter:
    """Conditions on the versions of a log; a listed version meets all that are given.

    Args:
        where: comparisons of metrics, such as "val_loss<2.5".
        steps: the first and the last step, either of them None for no end.
        since, until: when it was saved, both included.
        labels: labels that it has, with these texts.
        tag: a pattern that one of its tags matches, with the wildcards * and ?.
        branch: the branch on which it was saved.
    """

    where: tuple[str, ...] = ()
    steps: tuple[int | None, int | None] = (None, None)
    since: datetime | None = None
    until: datetime | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    tag: str | None = None
    branch: str | None = None


class _Condition(NamedTuple):
    """One condition on a row of `version`.

    Attributes:
        test: whether the row meets it.
        ids: the ids of the versions that meet it, and perhaps of others, as an index finds them;
            None where no index does.
    """

    test: ColumnElement[bool]
    ids: Select[Any] | None


@reads
def best_version(
    connection: Connection, name: str, *, mode: Literal["min", "max"], branch: str | None
) -> Version:
    """Return the version with the smallest or largest metric; if several are equal, the earliest.

    Raises:
        NotFoundError: no version (of the branch) has the metric as a number.
    """
    if mode not in ("min", "max"):
        raise InvalidInputError(f"mode {mode!r} is neither 'min' nor 'max'; give one of them.")
    check_text(name, what="metric name")
    on_branch = () if branch is None else (_on_branch(connection, branch),)
    best = best_ids(connection, name, 1, mode=mode, among=on_branch, newer=False)
    found = next(iter(best), None)
    if found is None:
        _check_metric(connection, name)
        where = "" if branch is None else f" on branch {branch!r}"
        raise NotFoundError(f"no version{where} has a number for the metric {name!r}.")
    return load_version(connection, found)


def best_ids(
    connection: Connection,
    name: str,
    count: int,
    *,
    mode: str,
    among: Sequence[ColumnElement[bool]],
    newer: bool,
) -> Sequence[int]:
    """Return the ids of the versions with the smallest or largest metric, the best first.

    Args:
        connection: to the catalog.
        name: of the metric; versions without it, or with a NaN, are left out.
        count: how many at most.
        mode: "min" or "max".
        among: conditions on the versions.
        newer: whether of equal values the newer version is better, or the older.
    """
    # The best of few versions are found among them: most values may be of others, or of expired
    # versions. Else the index of values finds them.
    few = _if_few(connection, select(_version.c.id).where(is_visible(), *among))
    if few is None:
        rated = (
            select(_version.c.id, _version.c.number, _metric.c.value)
            .join(_metric, _metric.c.version == _version.c.id)
            .where(_metric.c.name == name, is_visible(), *among)
            .subquery("rated")
        )
    else:
        of_version = select(_metric.c.value).where(_metric.c.version == _version.c.id)
        value = of_version.where(_metric.c.name == name).scalar_subquery()
        chosen = select(_version.c.id, _version.c.number, value.label("value"))
        rated = chosen.where(_version.c.id.in_(wanted_ids(connection, few))).subquery("rated")
    query = select(rated.c.id).where(rated.c.value.is_not(None))
    best = rated.c.value if mode == "min" else rated.c.value.desc()
    ties = rated.c.number.desc() if newer else rated.c.number
    return connection.scalars(query.order_by(best, ties).limit(count)).all()


@reads
def check_metrics(connection: Connection, names: Iterable[str]) -> None:
    """Check that some version has each metric.

    Raises:
        NotFoundError: none has one; the message has the nearest names.
    """
    for name in names:
        check_text(name, what="metric name")
        _check_metric(connection, name)


def _conditions(connection: Connection, wanted: LogFilter) -> Iterator[_Condition]:
    for text in wanted.where:
        yield _compares(connection, text)
    check_steps(wanted.steps)
    yield from _in_range(_version.c.step, *wanted.steps)
    yield from _in_range(
        _version.c.created_at,
        None if wanted.since is None else in_utc(wanted.since, what="since"),
        None if wanted.until is None else in_utc(wanted.until, what="until"),
    )
    if wanted.tag is not None:
        yield _has_tag(connection, wanted.tag)
    if wanted.branch is not None:
        yield _visible_if(_on_branch(connection, wanted.branch))
    check_labels(wanted.labels)
    for name, text in wanted.labels.items():
        yield _has_label(name, text)


def _visible_if(test: ColumnElement[bool]) -> _Condition:
    """Return a condition that an index of versions answers."""
    return _Condition(test, select(_version.c.id).where(is_visible(), test))


def _in_range(column: ColumnElement[Any], first: Any, last: Any) -> Iterator[_Condition]:
    """Yield the condition that a column lies between two values, either of them None for no end."""
    ends = [
        *([] if first is None else [column >= first]),
        *([] if last is None else [column <= last]),
    ]
    if ends:
        yield _visible_if(and_(*ends))


def _compares(connection: Connection, text: str) -> _Condition:
    match = _COMPARISON.fullmatch(text) if isinstance(text, str) else None
    try:
        value = float(match["value"]) if match else None
    except ValueError:
        value = None
    if match is None or value is None or match["sign"] not in _OPERATORS:
        raise InvalidInputError(
            f"{text!r} is not a comparison of a metric; write a name, one of < <= > >= = !=, and a "
            "number, as in 'val_loss<2.5'."
        )
    name = match["name"]
    check_text(name, what="metric name")
    _check_metric(connection, name)
    compares, is_named = _OPERATORS[match["sign"]], _metric.c.name == name
    # An index finds what is smaller and what is larger, but not what is not equal. Postgres uses it
    # if asked for its order; it has no statistics of the values of one metric.
    signs = ("<", ">") if match["sign"] == "!=" else (match["sign"],)
    parts = [
        select(_metric.c.version)
        .where(is_named, _OPERATORS[sign](_metric.c.value, value))
        .order_by(_metric.c.value)
        .limit(_FEW + 1)
        .subquery()
        for sign in signs
    ]
    found = union_all(*(select(part.c.version) for part in parts)).subquery("compared")
    return _Condition(
        exists().where(
            _metric.c.version == _version.c.id, is_named, compares(_metric.c.value, value)
        ),
        select(found.c.version),
    )


def _check_metric(connection: Connection, name: str) -> None:
    """Raise NotFoundError for a metric that no version has; the message has the nearest names."""
    if not has_metric(connection, name):
        known = known_metrics(connection)
        others = f"Known: {', '.join(known)}." if known else "No version has a metric."
        raise NotFoundError.near("metric", name, known, others)


def has_metric(
    connection: Connection, name: str, *, among: Sequence[ColumnElement[bool]] = ()
) -> bool:
    """Tell whether a version has a metric, if only as a NaN; `among` are conditions on versions."""
    return bool(connection.scalar(select(_is_known(name, among))))


def known_metrics(
    connection: Connection, *, among: Sequence[ColumnElement[bool]] = ()
) -> list[str]:
    """Return the names of the metrics that versions have, sorted; `among` as for `has_metric`."""
    names = distinct_names(_metric.c.name, most=_OFFERED)
    query = select(names.c.name).where(_is_known(names.c.name, among))
    return sorted(connection.scalars(query))


def _is_known(
    name: str | ColumnElement[str], among: Sequence[ColumnElement[bool]]
) -> ColumnElement[bool]:
    """Return the condition that a version has a metric: one of the newest, or any."""
    recent = (
        select(_version.c.id)
        .where(is_visible(), *among)
        .order_by(_version.c.number.desc())
        .limit(_RECENT)
        .subquery("recent")
    )
    has_name = _metric.c.name == name
    of_recent = select(_metric.c.name).where(_metric.c.version == recent.c.id, has_name)
    has_recent = of_recent.correlate_except(_metric).scalar_subquery().is_not(None)
    of_any = select(1).join_from(_metric, _version, _metric.c.version == _version.c.id)
    of_any = of_any.where(has_name, is_visible(), *among)
    return case(  # not OR, for which SQLite would look at both
        (select(1).select_from(recent).where(has_recent).exists(), true()),
        else_=of_any.correlate_except(_metric, _version).exists(),
    )


def _has_label(name: str, text: str) -> _Condition:
    is_named, start = _label.c.name == name, tables.text_start(_label.c.value)
    # In the order of the index, for the same reason as in `_compares`. With the whole text too,
    # SQLite would put it into `start`, and then not know the index of that.
    ids = select(_label.c.version).where(is_named, start == tables.text_start(literal(text)))
    return _Condition(
        exists().where(_label.c.version == _version.c.id, is_named, _label.c.value == text),
        ids.order_by(_label.c.version),
    )


def _has_tag(connection: Connection, glob: str) -> _Condition:
    if not _GLOB.fullmatch(glob):
        raise InvalidInputError(
            f"{glob!r} is not a pattern of tags; write a tag, in which * stands for any characters "
            "and ? for one."
        )
    if connection.dialect.name == "sqlite":
        matches = _ref.c.name.op("GLOB")(glob)
    else:
        pattern = re.escape(glob).replace(r"\*", ".*").replace(r"\?", ".")
        matches = _ref.c.name.op("~")(f"^{pattern}$")
    is_tag = _ref.c.kind == "tag"
    # What stands before the first wildcard is a range of the index; "~" sorts after every character
    # of a name.
    start = re.split("[*?]", glob, maxsplit=1)[0]
    in_range = and_(_ref.c.name >= start, _ref.c.name <= start + "~")
    ids = select(_ref.c.version).where(is_tag, in_range, matches)
    return _Condition(exists().where(_ref.c.version == _version.c.id, is_tag, matches), ids)


def _on_branch(connection: Connection, branch: str) -> ColumnElement[bool]:
    on_branch = _version.c.branch == branch
    check_text(branch, what="branch")
    if not connection.scalar(select(exists().where(on_branch, is_visible()))):
        names = distinct_names(_version.c.branch, is_visible(), most=_OFFERED)
        known = connection.scalars(select(names.c.name)).all()
        raise NotFoundError.near("branch", branch, known, "See 'dcpstore branch' for all of them.")
    return on_branch


@reads
def list_log(
    connection: Connection,
    start: int | None = None,
    *,
    limit: int | None = None,
    wanted: LogFilter | None = None,
) -> list[Version]:
    """Return versions, newest first: all, or `start` and its ancestors.

    Args:
        connection: to the catalog.
        start: the number of a version.
        limit: return at most so many.
        wanted: return only versions that meet these conditions.

    Raises:
        InvalidInputError: `limit` is not a number of rows, or a condition of `wanted` is invalid.
        NotFoundError: there is no version `start`; or none has a metric or branch of `wanted`.
    """
    check_limit(limit)
    if limit == 0:
        return []
    first = None if start is None else id_of_number(connection, start)
    conditions = [] if wanted is None else list(_conditions(connection, wanted))
    if first is None and not conditions:
        return load_versions(connection, limit=limit)
    ids = _find(connection, first, conditions, limit=limit)
    return load_versions(connection, wanted_ids(connection, ids))


def _find(
    connection: Connection,
    first: int | None,
    conditions: Sequence[_Condition],
    *,
    limit: int | None,
) -> Sequence[int]:
    """Return the ids of the newest versions that meet all conditions.

    They are `first` and its ancestors, or any where `first` is None.
    """
    tests = [is_visible(), *(condition.test for condition in conditions)]
    if limit is not None:
        found = _walk(connection, first, tests, limit=limit, most=_NEWEST)
        if len(found) == limit:
            return found
    indexed = [condition.ids for condition in conditions if condition.ids is not None]
    if first is not None:  # most of its ancestors may have expired
        visible = select(_version.c.id).where(is_visible())
        indexed.append(visible.order_by(_version.c.number.desc()))
    for ids in indexed:
        few = _if_few(connection, ids)
        if few is not None:
            query = (
                select(_version.c.id, _version.c.depth)
                .where(_version.c.id.in_(wanted_ids(connection, few)), *tests)
                .order_by(_version.c.number.desc())
                .limit(limit if first is None else None)
            )
            return _in_line(connection, connection.execute(query).all(), first, limit=limit)
    return _walk(connection, first, tests, limit=limit)


def _if_few(connection: Connection, ids: Select[Any]) -> Sequence[int] | None:
    """Return the ids that a query returns, if they are few, else None."""
    found = connection.scalars(ids.limit(_FEW + 1)).all()
    return found if len(found) <= _FEW else None


def _in_line(
    connection: Connection,
    rows: Sequence[Row[int, int | None]],
    first: int | None,
    *,
    limit: int | None,
) -> list[int]:
    """Return the ids of rows (id, depth) that are `first` or its ancestors, `limit` at most."""
    if first is None:
        return [row.id for row in rows]
    found: list[int] = []
    # Usually the first part fills the page; there are few rows in all.
    size = max(4 * limit, _RECENT) if limit is not None else _FEW
    for begin in range(0, len(rows), size):
        part = rows[begin : begin + size]
        line = ancestors_at(connection, first, {row.depth for row in part})
        found.extend(row.id for row in part if row.id in line)
        if limit is not None and len(found) >= limit:
            break
    return found[:limit]


def _walk(
    connection: Connection,
    first: int | None,
    tests: Sequence[ColumnElement[bool]],
    *,
    limit: int | None,
    most: int | None = None,
) -> Sequence[int]:
    """Return the ids of the first `limit` versions that pass all tests, from the newest on.

    Looks at `most` versions at most. The database stops as soon as `limit` are found: it reads the
    ancestors one after another, each has one parent, and so there is one order only.
    """
    if first is None:
        newest = select(_version.c.id, _version.c.number).where(is_visible())
        line: FromClause = newest.order_by(_version.c.number.desc()).limit(most).subquery("line")
    else:
        line = ancestors(first, most=None if most is None else most - 1)
    # A subquery that returns a value is asked for each row, by the key of the version; no planner
    # makes a join of it, for which it would read all versions.
    passed = select(_version.c.number).where(_version.c.id == line.c.id, *tests).scalar_subquery()
    query = select(line.c.id).where(passed.is_not(None)).limit(limit)
    if first is None:
        query = query.order_by(line.c.number.desc())
    return connection.scalars(query).all()
