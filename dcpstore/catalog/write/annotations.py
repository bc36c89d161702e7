"""Metrics and labels that a version is given after its save: an evaluation often ends later.

They only ever come in addition: what a version says already it says for good, unless an undo takes
back the very operation that added it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

from sqlalchemy import Connection, delete, insert, select, update

from dcpstore.catalog.db.transactions import writes
from dcpstore.catalog.read.ref_lookup import resolve
from dcpstore.catalog.read.versions import id_of_number, load_versions
from dcpstore.catalog.schema import tables
from dcpstore.catalog.validation import check_labels, check_metrics, check_text
from dcpstore.catalog.write.operations import Change, append_operations, take_operations
from dcpstore.errors import AlreadyExistsError
from dcpstore.records import Version

__all__ = ["add_labels", "add_metrics", "revert_labels", "revert_metrics"]

_version, _metric = tables.version, tables.metric
T = TypeVar("T", float, str)


@writes()
def add_metrics(
    connection: Connection, ref: str | int | None, metrics: Mapping[str, float], *, author: str
) -> Version:
    """Add metrics to a version; return it as it is now.

    Raises:
        InvalidInputError: a name or value that cannot be kept.
        AlreadyExistsError: a metric is there with another value.
    """
    check_metrics(metrics)
    take_operations(connection, 0)
    version = resolve(connection, ref)
    new = _new(version, "metric", version.metrics, {k: float(v) for k, v in metrics.items()})
    if not new:
        return version
    target = id_of_number(connection, version.number)
    connection.execute(
        insert(_metric),
        [{"version": target, "name": name, "value": value} for name, value in new.items()],
    )
    return _record(connection, target, "metrics", new, author=author)


@writes()
def add_labels(
    connection: Connection, ref: str | int | None, labels: Mapping[str, str], *, author: str
) -> Version:
    """Add labels to a version; return it as it is now.

    Raises:
        InvalidInputError: a name or value that cannot be kept.
        AlreadyExistsError: a label is there with another value.
    """
    check_labels(labels)
    take_operations(connection, 0)
    version = resolve(connection, ref)
    new = _new(version, "label", version.labels, labels)
    if not new:
        return version
    target = id_of_number(connection, version.number)
    connection.execute(
        update(_version).where(_version.c.id == target).values(labels={**version.labels, **new})
    )
    return _record(connection, target, "labels", new, author=author)


def revert_metrics(connection: Connection, version: int, names: Collection[str]) -> None:
    """Remove metrics that were added."""
    connection.execute(
        delete(_metric).where(_metric.c.version == version, _metric.c.name.in_(list(names)))
    )


def revert_labels(connection: Connection, version: int, names: Collection[str]) -> None:
    """Remove labels that were added."""
    kept = connection.execute(
        select(_version.c.labels).where(_version.c.id == version)
    ).scalar_one()
    connection.execute(
        update(_version)
        .where(_version.c.id == version)
        .values(labels={name: text for name, text in kept.items() if name not in names})
    )


def _new(
    version: Version, what: str, there: Mapping[str, T], given: Mapping[str, T]
) -> dict[str, T]:
    """Return what of `given` is not there yet."""
    for name, value in given.items():
        if name in there and not _same(there[name], value):
            raise AlreadyExistsError(
                f"{version} has the {what} {name!r} already: {there[name]!r}, not {value!r}. "
                "Choose another name."
            )
    return {name: value for name, value in given.items() if name not in there}


def _same(one: float | str, other: float | str) -> bool:
    both = (one, other)
    return one == other or all(isinstance(v, float) and math.isnan(v) for v in both)


def _record(
    connection: Connection, target: int, kind: str, added: Mapping[str, Any], *, author: str
) -> Version:
    """Record an addition; return the version."""
    check_text(author, what="author")
    append_operations(
        connection,
        take_operations(connection),
        [Change(kind, "", None, target, {"added": list(added)})],
        author=author,
        at=datetime.now(UTC),
    )
    (version,) = load_versions(
        connection, select(_version.c.id).where(_version.c.id == target), limit=1
    )
    return version
