"""The objects in the data folder that describe versions: their rows, and what lies in which.

Invariant: what the manifest of a version names was in the catalog when the version was committed,
in the object in which the manifest looks for it. So gc, which keeps what a row names, keeps it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime

from sqlalchemy import Connection, bindparam, delete, exists, select, update

from dcpstore.catalog.db.bulk_insert import RowsOfTables
from dcpstore.catalog.db.key_lists import wanted_names
from dcpstore.catalog.db.transactions import reads, writes
from dcpstore.catalog.read.stored_pages import find_pages, find_runs
from dcpstore.catalog.read.versions import id_of_number
from dcpstore.catalog.schema import tables
from dcpstore.catalog.schema.tables import hex_start
from dcpstore.catalog.write.operations import lock_repository
from dcpstore.catalog.write.row_ids import RowIds, find_ids
from dcpstore.errors import ConflictError
from dcpstore.records import PackRecord, VersionObjects

__all__ = [
    "add_pages",
    "find_doomed_pages",
    "forget_pages",
    "home",
    "home_objects",
    "objects_error",
    "place_objects",
]

_page, _node, _tensor = tables.page, tables.node, tables.tensor


def add_pages(last: RowsOfTables, version: int, written: Sequence[PackRecord], ids: RowIds) -> None:
    """Add the objects that a save wrote for the version of this id."""
    last.add(
        _page,
        ("id", "key", "nbytes", "version", "status"),
        [(ids.new[one.key], one.key, one.nbytes, version, "live") for one in written],
    )


def place_objects(
    connection: Connection, pages: Mapping[str, int], objects: VersionObjects, *, plan: int
) -> None:
    """Note which of the pages that a version wrote hold rows that lie in none.

    Its tree and plan have been written; the plan is given by id, and `pages` are ids by key.

    Raises:
        ConflictError: what the manifest names is gone, or lies in the page of another save.
    """
    home(connection, pages, nodes=objects.nodes, runs=objects.runs)
    table = tables.plan
    if (page := pages.get(objects.plan)) is not None:
        is_new = table.c.id == plan, table.c.page.is_(None)
        connection.execute(update(table).where(*is_new).values(page=page))
    found = connection.scalar(
        select(_page.c.key).join(table, table.c.page == _page.c.id).where(table.c.id == plan)
    )
    if (
        found != objects.plan
        or find_pages(connection, objects.nodes) != objects.nodes
        or find_runs(connection, objects.runs) != objects.runs
    ):
        raise objects_error()


def objects_error() -> ConflictError:
    """Return the error for what a manifest names and the catalog has elsewhere, or not."""
    return ConflictError(
        "another save wrote the same entries at the same time, or gc deleted entries that this "
        "one found. Save again."
    )


def home(
    connection: Connection,
    pages: Mapping[str, int],
    *,
    nodes: Mapping[bytes, str],
    runs: Mapping[bytes, str],
) -> None:
    """Note in which page nodes and runs lie, where that is one of `pages` and they lie in none."""
    of_nodes = [
        {"held": digest, "at": pages[key]} for digest, key in sorted(nodes.items()) if key in pages
    ]
    if of_nodes:
        is_own = (_node.c.digest == bindparam("held")) & _node.c.page.is_(None)
        connection.execute(update(_node).where(is_own).values(page=bindparam("at")), of_nodes)
    of_runs = [
        {"held": digest, "start": digest.hex()[:20], "at": pages[key]}
        for digest, key in sorted(runs.items())
        if key in pages
    ]
    if of_runs:
        is_run = (hex_start(_tensor.c.digest) == bindparam("start")) & (
            _tensor.c.digest == bindparam("held")
        )
        connection.execute(
            update(_tensor).where(is_run, _tensor.c.page.is_(None)).values(page=bindparam("at")),
            of_runs,
        )


@writes()
def home_objects(connection: Connection, number: int, objects: VersionObjects) -> None:
    """Note the objects that were written for a committed version, which had none.

    Raises:
        ConflictError: another process has done so, or gc deleted what it found.
        NotFoundError: there is no such version any more.
    """
    lock_repository(connection)
    version = id_of_number(connection, number)
    held = select(tables.version.c.plan).where(tables.version.c.id == version)
    plan = connection.execute(held).scalar_one()
    (ids,) = find_ids(connection, [(_page, [one.key for one in objects.written])])
    last = RowsOfTables()
    add_pages(last, version, objects.written, ids)
    last.insert(connection)
    place_objects(connection, ids.new, objects, plan=plan)


@reads
def find_doomed_pages(connection: Connection, *, before: datetime) -> list[PackRecord]:
    """Return the pages and plans that were condemned before a time."""
    rows = connection.execute(
        select(_page.c.key, _page.c.nbytes)
        .where(_page.c.status == "condemned", _page.c.condemned_at <= before)
        .order_by(_page.c.key)
    )
    return [PackRecord(*row) for row in rows]


@writes()
def forget_pages(connection: Connection, keys: Collection[str]) -> None:
    """Remove the rows of pages and plans whose bytes were deleted, if nothing names them."""
    named = (_node.c.page, _tensor.c.page, tables.plan.c.page)
    connection.execute(
        delete(_page).where(
            _page.c.key.in_(wanted_names(connection, keys)),
            _page.c.status == "condemned",
            *(~exists().where(column == _page.c.id) for column in named),
        )
    )
