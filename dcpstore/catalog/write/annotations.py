"""Metrics and labels that are added to a version after its save, by a later evaluation perhaps.

Invariant: they are only added. A value that a version has is never replaced, and only an undo of
the operation that added it removes it. Labels are in `version.labels`, which is read with the
version, and in the table `label`, by which versions are found; both always say the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from sqlalchemy import Connection, delete, insert, select, update

from dcpstore.catalog.db.bulk_insert import insert_rows
from dcpstore.catalog.db.transactions import writes
from dcpstore.catalog.read.ref_lookup import resolve
from dcpstore.catalog.read.versions import id_of_number, load_version
from dcpstore.catalog.schema import tables
from dcpstore.catalog.validation import check_labels, check_metrics, check_text
from dcpstore.catalog.write.operations import Change, lock_repository, record
from dcpstore.errors import AlreadyExistsError
from dcpstore.records import RefLike, Version

__all__ = [
    "add_labels",
    "add_metrics",
    "insert_labels",
    "insert_metrics",
    "revert_labels",
    "revert_metrics",
]

_version, _metric, _label = tables.version, tables.metric, tables.label
T = TypeVar("T", float, str)


@writes()
def add_metrics(
    connection: Connection, ref: RefLike | None, metrics: Mapping[str, float], *, author: str
) -> Version:
    """Add metrics to a version; return it as it is now.

    Raises:
        InvalidInputError: a database cannot store a name or a value.
        AlreadyExistsError: the version has a metric already, with another value.
    """
    check_metrics(metrics)
    # Before the version is read, so that no other process adds the same name meanwhile.
    lock_repository(connection)
    version = resolve(connection, ref)
    new = _new(version, "metric", version.metrics, {k: float(v) for k, v in metrics.items()})
    if not new:
        return version
    target = id_of_number(connection, version.number)
    insert_metrics(connection, target, new)
    return _record(connection, target, "metrics", new, author=author)


@writes()
def add_labels(
    connection: Connection, ref: RefLike | None, labels: Mapping[str, str], *, author: str
) -> Version:
    """Add labels to a version; return it as it is now.

    Raises:
        InvalidInputError: a database cannot store a name or a text.
        AlreadyExistsError: the version has a label already, with another text.
    """
    check_labels(labels)
    lock_repository(connection)
    version = resolve(connection, ref)
    new = _new(version, "label", version.labels, labels)
    if not new:
        return version
    target = id_of_number(connection, version.number)
    _set_labels(connection, target, {**version.labels, **new})
    insert_labels(connection, {target: new})
    return _record(connection, target, "labels", new, author=author)


def insert_metrics(connection: Connection, version: int, metrics: Mapping[str, float]) -> None:
    """Insert metrics of the version of an id, which has none of them yet."""
    if metrics:
        connection.execute(
            insert(_metric),
            [{"version": version, "name": k, "value": float(v)} for k, v in metrics.items()],
        )


def insert_labels(connection: Connection, labels: Mapping[int, Mapping[str, str]]) -> None:
    """Insert labels of versions, by id, which have none of them yet."""
    rows = (
        (version, name, text) for version, some in labels.items() for name, text in some.items()
    )
    insert_rows(connection, _label, ("version", "name", "value"), rows)


def revert_metrics(connection: Connection, version: int, names: Collection[str]) -> None:
    """Remove metrics that were added."""
    connection.execute(
        delete(_metric).where(_metric.c.version == version, _metric.c.name.in_(list(names)))
    )


def revert_labels(connection: Connection, version: int, names: Collection[str]) -> None:
    """Remove labels that were added."""
    labels = connection.execute(
        select(_version.c.labels).where(_version.c.id == version)
    ).scalar_one()
    kept = {name: text for name, text in labels.items() if name not in names}
    _set_labels(connection, version, kept)
    connection.execute(
        delete(_label).where(_label.c.version == version, _label.c.name.in_(list(names)))
    )


def _set_labels(connection: Connection, version: int, labels: Mapping[str, str]) -> None:
    connection.execute(update(_version).where(_version.c.id == version).values(labels=labels))


def _new(
    version: Version, what: str, existing: Mapping[str, T], given: Mapping[str, T]
) -> dict[str, T]:
    """Return those of `given` that the version does not have yet."""
    for name, value in given.items():
        if name in existing and not _same(existing[name], value):
            raise AlreadyExistsError(
                f"{version} has the {what} {name!r} already: {existing[name]!r}, not {value!r}. "
                "Choose another name."
            )
    return {name: value for name, value in given.items() if name not in existing}


def _same(one: float | str, other: float | str) -> bool:
    """Tell whether two values are equal; a NaN is equal to a NaN."""
    return one == other or (one != one and other != other)  # noqa: PLR0124


def _record(
    connection: Connection, target: int, kind: str, added: Mapping[str, Any], *, author: str
) -> Version:
    """Record an addition to the version of id `target`; return the version."""
    check_text(author, what="author")
    record(connection, Change(kind, new=target, detail={"added": list(added)}), author=author)
    return load_version(connection, target)
