"""Stale objects: chunks that they name have moved, so they are to be written again.

A stale page, and a version whose manifest or reference is stale, holds a random mark. Each move of
chunks gives it another one, so a process that wrote the object learns from the mark whether chunks
moved again meanwhile.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping

from sqlalchemy import ColumnElement, Connection, func, select, union_all, update

from dcpstore.catalog.db.key_lists import wanted_ids, wanted_names
from dcpstore.catalog.db.transactions import reads, writes
from dcpstore.catalog.read.trees import holding_tensors, holding_versions
from dcpstore.catalog.schema import tables
from dcpstore.catalog.write.pages import home

__all__ = [
    "are_stale",
    "clear_stale",
    "clear_stale_page",
    "is_tagged",
    "mark_holders_stale",
    "mark_object_stale",
    "mark_objects_stale",
    "mark_version_stale",
    "mark_written_stale",
    "new_mark",
    "stale_pages",
    "stale_versions",
    "tagged_uids",
]

_version, _page = tables.version, tables.page


def new_mark() -> str:
    """Return a mark that nothing has had."""
    return secrets.token_hex(8)


def mark_holders_stale(connection: Connection, tensors: Collection[int]) -> None:
    """Mark the pages that hold chunks of any of the tensors or runs, which are given by id.

    Tagged versions that have them are marked too, for their references name chunks.
    """
    if not tensors:
        return
    node, entry, tensor = tables.node, tables.entry, tables.tensor
    moved = wanted_ids(connection, tensors)
    holders = union_all(
        select(node.c.page).join(entry, entry.c.node == node.c.id).where(entry.c.tensor.in_(moved)),
        select(tensor.c.page).where(tensor.c.id.in_(moved)),
    )
    _mark_pages(connection, _page.c.id.in_(holders))
    versions = holding_versions(holding_tensors(moved)).subquery()
    _mark_versions(connection, _version.c.id.in_(select(versions.c.version)), is_tagged())


def mark_written_stale(connection: Connection, versions: Collection[int]) -> None:
    """Mark the pages that the saves of these versions wrote, which are given by id.

    Tagged ones are marked too.
    """
    if versions:
        wanted = wanted_ids(connection, versions)
        _mark_pages(connection, _page.c.version.in_(wanted))
        _mark_versions(connection, _version.c.id.in_(wanted), is_tagged())


def is_tagged() -> ColumnElement[bool]:
    """Return the condition that a row of `version` has a tag."""
    ref = tables.ref
    return _version.c.id.in_(select(ref.c.version).where(ref.c.kind == "tag"))


def _mark_pages(connection: Connection, *conditions: ColumnElement[bool]) -> None:
    live = _page.c.status == "live"
    connection.execute(update(_page).where(live, *conditions).values(stale=new_mark()))


def _mark_versions(connection: Connection, *conditions: ColumnElement[bool]) -> None:
    connection.execute(update(_version).where(*conditions).values(stale=new_mark()))


@writes(idempotent=True)
def mark_version_stale(connection: Connection, number: int) -> None:
    """Mark a committed version: its manifest is to be written again."""
    _mark_versions(connection, _version.c.number == number, _version.c.status == "committed")


def mark_objects_stale(connection: Connection, keys: Collection[str]) -> None:
    """Mark pages and plans."""
    _mark_pages(connection, _page.c.key.in_(wanted_names(connection, keys)))


@writes(idempotent=True)
def mark_object_stale(connection: Connection, key: str) -> None:
    """Mark a page or plan."""
    mark_objects_stale(connection, [key])


@reads
def are_stale(connection: Connection) -> bool:
    """Tell whether any object is to be written again."""
    marks = (
        select(func.count()).select_from(table).where(table.c.stale.is_not(None)).scalar_subquery()
        for table in (_version, _page)
    )
    return any(connection.execute(select(*marks)).one())


@reads
def stale_pages(connection: Connection) -> dict[str, str]:
    """Return the marks of the stale pages and plans, by key."""
    rows = connection.execute(
        select(_page.c.key, _page.c.stale)
        .where(_page.c.stale.is_not(None), _page.c.status == "live")
        .order_by(_page.c.id)
    )
    return dict(rows.all())


@reads
def stale_versions(connection: Connection) -> dict[int, str]:
    """Return the marks of the stale committed versions, by number."""
    rows = connection.execute(
        select(_version.c.number, _version.c.stale)
        .where(_version.c.stale.is_not(None), _version.c.status == "committed")
        .order_by(_version.c.number)
    )
    return dict(rows.all())


@reads
def tagged_uids(connection: Connection) -> list[str]:
    """Return the uids of the versions that have a tag."""
    return list(connection.scalars(select(_version.c.uid).where(is_tagged())))


@writes()
def clear_stale(connection: Connection, number: int, mark: str) -> bool:
    """Note that a manifest was written again; False if chunks moved after `mark` was read.

    Then the version is marked again, even if another process has cleared it since: of the two
    manifests, the one that was written here may have come last.
    """
    cleared = connection.scalar(
        update(_version)
        .where(_version.c.number == number, _version.c.stale == mark)
        .values(stale=None)
        .returning(_version.c.id)
    )
    if cleared is None:
        mark_version_stale(connection, number)
    return cleared is not None


@writes()
def clear_stale_page(
    connection: Connection, key: str, mark: str, *, nbytes: int, runs: Mapping[bytes, str]
) -> bool:
    """Note that a page or plan was written again, as `clear_stale` does for a manifest.

    Args:
        connection: to the catalog.
        key: of the page.
        mark: that it had before it was written.
        nbytes: its length now.
        runs: that it holds, each with its key.
    """
    cleared = connection.scalar(
        update(_page)
        .where(_page.c.key == key, _page.c.stale == mark)
        .values(stale=None, nbytes=nbytes)
        .returning(_page.c.id)
    )
    if cleared is None:
        mark_object_stale(connection, key)
        return False
    home(connection, {key: cleared}, nodes={}, runs=runs)
    return True
