"""The log: which versions it lists, by conditions in SQL, and which is best by a metric."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import (
    JSON,
    ColumnElement,
    Connection,
    Select,
    Text,
    exists,
    func,
    select,
    type_coerce,
)

from dcpstore.catalog.db.transactions import reads
from dcpstore.catalog.read.versions import (
    ancestors,
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

__all__ = ["LogFilter", "best_version", "check_metrics", "list_log"]

_version, _metric, _ref = tables.version, tables.metric, tables.ref
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
    value = _metric.c.value
    query = (
        select(_version.c.id)
        .join(_metric, _metric.c.version == _version.c.id)
        .where(_metric.c.name == name, value.is_not(None), is_visible())
        .order_by(value if mode == "min" else value.desc(), _version.c.number)
        .limit(1)
    )
    if branch is not None:
        query = query.where(_on_branch(connection, branch))
    found = connection.scalar(query)
    if found is None:
        _check_metric(connection, name)
        where = "" if branch is None else f" on branch {branch!r}"
        raise NotFoundError(f"no version{where} has a number for the metric {name!r}.")
    return load_version(connection, found)


@reads
def check_metrics(connection: Connection, names: Iterable[str]) -> None:
    """Check that some version has each metric.

    Raises:
        NotFoundError: none has one; the message has the nearest names.
    """
    for name in names:
        check_text(name, what="metric name")
        _check_metric(connection, name)


def _conditions(connection: Connection, wanted: LogFilter) -> Iterator[ColumnElement[bool]]:
    for text in wanted.where:
        yield _compares(connection, text)
    check_steps(wanted.steps)
    first, last = wanted.steps
    if first is not None:
        yield _version.c.step >= first
    if last is not None:
        yield _version.c.step <= last
    if wanted.since is not None:
        yield _version.c.created_at >= in_utc(wanted.since, what="since")
    if wanted.until is not None:
        yield _version.c.created_at <= in_utc(wanted.until, what="until")
    check_labels(wanted.labels)
    for name, text in wanted.labels.items():
        yield _has_label(connection, name, text)
    if wanted.tag is not None:
        yield _has_tag(connection, wanted.tag)
    if wanted.branch is not None:
        yield _on_branch(connection, wanted.branch)


def _compares(connection: Connection, text: str) -> ColumnElement[bool]:
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
    return exists().where(
        _metric.c.version == _version.c.id,
        _metric.c.name == name,
        _OPERATORS[match["sign"]](_metric.c.value, value),
    )


def _check_metric(connection: Connection, name: str) -> None:
    """Raise NotFoundError for a metric that no version has; the message has the nearest names."""
    names = select(_metric.c.name).join(_version, _version.c.id == _metric.c.version)
    names = names.where(is_visible())
    if connection.scalar(names.where(_metric.c.name == name).limit(1)) is None:
        known = connection.scalars(names.distinct()).all()
        others = f"Known: {', '.join(sorted(known))}." if known else "No version has a metric."
        raise NotFoundError.near("metric", name, known, others)


def _has_label(connection: Connection, name: str, text: str) -> ColumnElement[bool]:
    labels = type_coerce(_version.c.labels, Text)
    if connection.dialect.name == "sqlite":
        each = func.json_each(labels).table_valued("key", "value", name="label")
        return select(1).select_from(each).where(each.c.key == name, each.c.value == text).exists()
    return func.json_extract_path_text(labels.cast(JSON), name) == text


def _has_tag(connection: Connection, glob: str) -> ColumnElement[bool]:
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
    return exists().where(_ref.c.version == _version.c.id, _ref.c.kind == "tag", matches)


def _on_branch(connection: Connection, branch: str) -> ColumnElement[bool]:
    on_branch = _version.c.branch == branch
    check_text(branch, what="branch")
    if not connection.scalar(select(exists().where(on_branch, is_visible()))):
        known = connection.scalars(select(_version.c.branch).where(is_visible()).distinct()).all()
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
    ids: Select[Any] | None = None
    if start is not None:
        first = id_of_number(connection, start)
        if limit is not None and wanted is None:
            # Usually the nearest ancestors are enough; then we do not visit the others.
            near = select(ancestors(first, most=limit - 1).c.id)
            found = load_versions(connection, near, limit=limit)
            if len(found) == limit:
                return found
            # Fewer than `limit`: some expired, or history ends. Search all ancestors.
        ids = select(ancestors(first).c.id)
    if wanted is not None:
        query = select(_version.c.id).where(*_conditions(connection, wanted))
        ids = query if ids is None else query.where(_version.c.id.in_(ids))
    return load_versions(connection, ids, limit=limit)
