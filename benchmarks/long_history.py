"""A repository with very many versions, made in seconds: a few are saved, the others are copies.

`lengthen` saves a cycle of versions as a user would, each with one tensor that differs from the one
before, and then adds copies of them in bulk. A copy is a version in its own right: uid, number,
step, metrics, tag, times, operation, place in the ancestry, and manifest. Its contents are those of
the version that it copies, so tables of tensors and packs do not grow: what is measured is what the
number of versions costs, and not what their contents do.

The journal has no entries of copies. The catalog records them as written, because otherwise the
next change would write 100,000 of them. So a deep verify reports them as missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from sqlalchemy import Connection, Table, func, select, text, update

import dcpstore
from benchmarks.states import State
from dcpstore import Repository
from dcpstore.catalog.db.bulk_insert import insert_rows
from dcpstore.catalog.schema import tables
from dcpstore.core.uids import new_uid
from dcpstore.formats.manifest import manifest_key
from dcpstore.formats.sealed import seal

__all__ = ["CYCLE", "ENTRIES", "METRIC", "STEPS", "TAG_EVERY", "lengthen", "state_of"]

ENTRIES = 10
CYCLE = 2 * ENTRIES  # versions after which the contents repeat
TAG_EVERY = 10
METRIC = "val_loss"
STEPS = 10  # of training between two versions
_BETWEEN = timedelta(minutes=10)
_ELEMENTS = 1024
_HEAD = re.compile(  # what `seal` writes
    rb'\{"([a-z]+)": ([0-9]+), "digest": "[0-9a-f]+", "algorithm": "[a-z0-9]+", '
)


def state_of(index: int) -> State:
    """Return the state of the version of an index from 0: one tensor differs from that before."""
    turn = index % CYCLE
    return {
        f"model.layers.{i}.weight": torch.full(
            (_ELEMENTS,), float(i + (ENTRIES if i < turn <= i + ENTRIES else 0))
        )
        for i in range(ENTRIES)
    }


def lengthen(repo: Repository, versions: int) -> None:
    """Give an empty repository so many versions on `main`, and at least one cycle of them.

    The step of a version is `STEPS` times its number, `METRIC` falls as the number grows, every
    tenth version has the tag `tag-<number>`, and one was made every ten minutes until now.
    """
    for index in range(CYCLE):
        number = index + 1
        dcpstore.save(
            state_of(index),
            repo,
            step=STEPS * number,
            tags=_tags(number),
            metrics={METRIC: 1 / number, "lr": 1e-3},
            labels={"run": f"run-{number % TAG_EVERY}"},
            author="ada",
        )
    with repo.catalog.database.write() as connection:
        copies = _copy_versions(connection, versions)
    if not repo.catalog.database.is_sqlite:  # what the server does by itself after a while
        with repo.catalog.database.write() as connection:
            connection.execute(text("ANALYZE"))
    _copy_manifests(Path(repo.storage.url), copies)


def _tags(number: int) -> list[str]:
    return [] if number % TAG_EVERY else [f"tag-{number}"]


def _copy_versions(connection: Connection, versions: int) -> list[tuple[str, str]]:
    """Add copies up to so many versions; return for each the uid that it copies, and its own."""
    saved = _rows(connection, tables.version)
    first = saved[0]["id"]
    lines = _lineage(saved, versions)
    began = datetime.now(UTC) - versions * _BETWEEN
    copies = []
    for index in range(CYCLE, versions):
        source, number = saved[index % CYCLE], index + 1
        at = began + index * _BETWEEN
        copies.append(
            dict(source)
            | {"id": first + index, "uid": new_uid(), "number": number, "step": STEPS * number}
            | {"parent": first + index - 1, **lines[index]}
            | {"labels": {"run": f"run-{number % TAG_EVERY}"}, "wanted_tags": _tags(number)}
            | {"started_at": at, "touched_at": at, "created_at": at}
        )
    _insert(connection, tables.version, copies)
    for table in _owned_by_versions():
        _repeat(connection, table, first, versions)
    _spread(connection, first, began)
    _name(connection, copies)
    if connection.dialect.name == "postgresql":  # the next save takes the id after these
        last = func.pg_get_serial_sequence("version", "id")
        connection.execute(select(func.setval(last, first + max(versions, CYCLE) - 1)))
    sources = (saved[index % CYCLE]["uid"] for index in range(CYCLE, versions))
    return list(zip(sources, (copy["uid"] for copy in copies), strict=True))


def _lineage(saved: Sequence[Mapping[str, Any]], versions: int) -> list[dict[str, Any]]:
    """Return the columns `depth` and `jump` of each version (see `catalog.read.versions`)."""
    first = saved[0]["id"]
    lines = [{"depth": row["depth"], "jump": row["jump"]} for row in saved]
    for parent in range(len(saved) - 1, versions - 1):
        jump = first + parent
        above = lines[parent]["jump"]
        if above is not None:
            further = lines[above - first]["jump"]
            depths = [lines[parent]["depth"], lines[above - first]["depth"]]
            if further is not None:
                depths.append(lines[further - first]["depth"])
                if depths[0] - depths[1] == depths[1] - depths[2]:
                    jump = further
        lines.append({"depth": lines[parent]["depth"] + 1, "jump": jump})
    return lines


def _owned_by_versions() -> list[Table]:
    """Return the tables whose rows belong to one version each, by their keys."""
    id_of_version = tables.version.c.id
    return [
        table
        for table in tables.tables.sorted_tables
        if any(
            key.column is id_of_version and column.name == "version"
            for column in table.primary_key
            for key in column.foreign_keys
        )
    ]


def _repeat(connection: Connection, table: Table, first: int, versions: int) -> None:
    """Give each copy the rows that its original has in a table."""
    version, source = tables.version, tables.version.c.id
    original = first + (source - first) % CYCLE
    rest = [column for column in table.c if column.name != "version"]
    chosen = (
        select(version.c.id, *rest)
        .join(table, table.c.version == original)
        .where(version.c.id.between(first + CYCLE, first + versions - 1))
    )
    names = ["version", *(column.name for column in rest)]
    connection.execute(table.insert().from_select(names, chosen))


def _spread(connection: Connection, first: int, began: datetime) -> None:
    """Give every version a metric of its own, and those that were saved times before the copies."""
    metric, version = tables.metric, tables.version
    connection.execute(
        update(metric)
        .where(metric.c.name == METRIC)
        .values(value=1.0 / (metric.c.version - first + 1))
    )
    for index in range(CYCLE):
        connection.execute(
            update(version)
            .where(version.c.id == first + index)
            .values(created_at=began + index * _BETWEEN)
        )


def _name(connection: Connection, copies: Sequence[Mapping[str, Any]]) -> None:
    """Move the branch to the last copy, tag as saves do, and record an operation for each copy."""
    if not copies:
        return
    repository, operation, ref = tables.repository, tables.operation, tables.ref
    before = connection.execute(select(func.max(operation.c.number))).scalar_one()
    refs: list[dict[str, Any]] = []
    done: list[dict[str, Any]] = []
    for copy in copies:
        facts = {"author": copy["author"], "created_at": copy["created_at"], "new": copy["id"]}
        number = before + len(done) + 1
        done.append(
            {"number": number, "kind": "save", "target": copy["branch"], "old": copy["parent"]}
            | {"detail": None, **facts}
        )
        for tag in copy["wanted_tags"]:
            refs.append({"name": tag, "kind": "tag", "version": copy["id"]})
            done.append(
                {"number": number + 1, "kind": "tag", "target": tag, "old": None}
                | {"detail": {"save": number}, **facts}
            )
    _insert(connection, operation, done)
    _insert(connection, ref, refs)
    tip = copies[-1]
    connection.execute(update(ref).where(ref.c.name == tip["branch"]).values(version=tip["id"]))
    last = done[-1]["number"]
    connection.execute(
        update(repository).values(
            last_version=tip["number"], last_operation=last, last_journaled=last
        )
    )


def _rows(connection: Connection, table: Table) -> list[Mapping[str, Any]]:
    """Return all rows of a table by their ids."""
    return [dict(row) for row in connection.execute(select(table).order_by(table.c.id)).mappings()]


def _insert(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows that all have the same columns."""
    if rows:
        names = list(rows[0])
        insert_rows(connection, table, names, ([row[name] for name in names] for row in rows))


def _copy_manifests(data: Path, copies: Sequence[tuple[str, str]]) -> None:
    """Write the manifest of each copy: that of its original, under the uid of the copy.

    Straight into the folder, without the fsyncs of a save, which take most of its time.
    """
    texts: dict[str, bytes] = {}
    for source, uid in copies:
        if source not in texts:
            texts[source] = (data / manifest_key(source)).read_bytes()
        (data / manifest_key(uid)).write_bytes(_renamed(texts[source], source, uid))


def _renamed(manifest: bytes, old: str, new: str) -> bytes:
    """Return a manifest with another uid for its version, and the digest that then belongs to it.

    The packs keep their names, which begin with the uid of the version that was saved.
    """
    head = _HEAD.match(manifest)
    assert head is not None, f"not a sealed object: {manifest[:80]!r}"
    members = manifest[head.end() :]
    named = re.compile(rb'(uid\\?": ?\\?")' + old.encode())
    return seal(head[1].decode(), int(head[2]), [named.sub(rb"\g<1>" + new.encode(), members)])
