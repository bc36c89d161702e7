"""Branches and tags: created, moved and deleted, each by an operation that can be undone.

Every function locks the repository before it reads a ref, so the ref that was checked is the ref
that moves (compare-and-swap). A tag stays where it is until someone moves it; a branch also moves
in the transaction of a save.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, insert, select, update

from dcpstore.catalog.db.transactions import writes
from dcpstore.catalog.read.ref_lookup import RefKind, RefRow, find_ref, id_of_ref, resolve
from dcpstore.catalog.read.versions import id_of_number, is_ancestor
from dcpstore.catalog.schema import tables
from dcpstore.catalog.validation import check_text
from dcpstore.catalog.write.operations import (
    LOCK,
    Change,
    Recorded,
    insert_operations,
    lock_repository,
    raise_counters,
    record,
)
from dcpstore.core.syntax import check_name
from dcpstore.errors import AlreadyExistsError, ConflictError, InvalidInputError
from dcpstore.records import RefLike, RefRecord

__all__ = ["delete_ref", "make_ref", "roll_back", "taken_error"]

_ref, _version = tables.ref, tables.version


@writes(lock=LOCK)
def make_ref(
    connection: Connection,
    name: str,
    kind: RefKind,
    *,
    version: RefLike | None,
    author: str,
    move: bool = False,
) -> Recorded[RefRecord]:
    """Create a branch or tag for the version that a ref means; recorded as an operation.

    With `move`, an existing ref of this name and kind is moved; if it is at that version already,
    nothing is recorded.

    Raises:
        InvalidInputError: the name breaks the grammar.
        AlreadyExistsError: the name is taken; with `move`, by a ref of the other kind.
        NotFoundError: there is no such version.
    """
    check_name(name, kind=kind)
    check_text(author, what="author")
    key = id_of_ref(version)
    if key is None:
        version = resolve(connection, version)
        key = id_of_ref(version)
    assert key is not None, "a version is found by its uid"
    named = select(_ref.c.version).where(_ref.c.name == name).scalar_subquery()
    row = raise_counters(
        connection,
        *_columns_of(key, "target"),
        *_columns_of(named, "before"),
        select(_ref.c.kind).where(_ref.c.name == name).scalar_subquery().label("before_kind"),
        operations=1,
    )
    if row.target_number is None or row.target_expired_at is not None:
        found = resolve(connection, version)  # by the first digits of its uid, or it raises
        raise_counters(connection, operations=-1)
        return make_ref(connection, name, kind, version=found, author=author, move=move)
    made = RefRecord(name, kind, row.target_number)
    if row.before_id is None:
        connection.execute(insert(_ref).values(name=name, kind=kind, version=row.target_id))
    elif not move or row.before_kind != kind:
        before = RefRow(name, row.before_kind, row.before_id, row.before_number)
        raise taken_error(before, wanted=kind)
    elif row.before_id == row.target_id:
        raise_counters(connection, operations=-1)
        return Recorded(made)
    else:
        connection.execute(update(_ref).where(_ref.c.name == name).values(version=row.target_id))
    names = {
        row.before_id: {"uid": row.before_uid, "version": row.before_number},
        row.target_id: {"uid": row.target_uid, "version": row.target_number},
    }
    change = Change(kind, name, row.before_id, row.target_id)
    return insert_operations(connection, row, [change], names, author=author, value=made)


def _columns_of(key: ColumnElement[int], prefix: str) -> Iterator[ColumnElement[Any]]:
    """Yield queries of facts of the version whose id is `key`, as columns of another statement."""
    for column in (_version.c.id, _version.c.uid, _version.c.number, _version.c.expired_at):
        one = select(column).where(_version.c.id == key).scalar_subquery()
        yield one.label(f"{prefix}_{column.name}")


def taken_error(existing: RefRow, *, wanted: RefKind) -> AlreadyExistsError:
    """Return the error for a name that is taken by `existing`, so no `wanted` can have it."""
    name, kind, _, number = existing
    advice = (
        f", or move the tag with 'dcpstore tag {name} REF --move' (repo.tag(..., move=True))"
        if kind == wanted == "tag"
        else ""
    )
    return AlreadyExistsError(
        f"the name {name!r} is taken: it is a {kind} of v{number}. Choose another name{advice}."
    )


@writes()
def delete_ref(
    connection: Connection, name: str, kind: RefKind, *, expect: int | None, author: str
) -> RefRecord:
    """Delete a tag or branch; return it as it was.

    Raises:
        NotFoundError: there is no such ref of this kind.
        ConflictError: it is not at the version of number `expect`.
    """
    check_text(author, what="author")
    lock_repository(connection)
    found = find_ref(connection, name, kind)
    _check_expected(found, expect)
    connection.execute(delete(_ref).where(_ref.c.name == name))
    record(connection, Change(f"delete_{kind}", name, found.id), author=author)
    return RefRecord(name, kind, found.number)


@writes()
def roll_back(
    connection: Connection,
    branch: str,
    ref: RefLike,
    *,
    force: bool,
    expect_tip: int | None,
    author: str,
) -> RefRecord:
    """Move a branch to the version that `ref` means; deletes nothing.

    Raises:
        NotFoundError: there is no such branch or version.
        InvalidInputError: the version is not an ancestor of the tip, and `force` is False.
        ConflictError: the tip is not at the version of number `expect_tip`.
    """
    check_text(author, what="author")
    lock_repository(connection)
    tip = find_ref(connection, branch, "branch")
    _check_expected(tip, expect_tip)
    target = resolve(connection, ref)
    target_id = id_of_number(connection, target.number)
    if target_id == tip.id:
        return RefRecord(branch, "branch", tip.number)
    if not force and not is_ancestor(connection, target_id, of=tip.id):
        raise InvalidInputError(
            f"v{target.number} (of branch {target.branch!r}) is not an ancestor of "
            f"{branch!r}, which is at v{tip.number}. See 'dcpstore log {branch}' for its "
            "ancestors, or move the branch there anyway with force=True (--force)."
        )
    connection.execute(update(_ref).where(_ref.c.name == branch).values(version=target_id))
    record(connection, Change("rollback", branch, tip.id, target_id), author=author)
    return RefRecord(branch, "branch", target.number)


def _check_expected(found: RefRow, expect: int | None) -> None:
    if expect is not None and found.number != expect:
        raise ConflictError(
            f"the {found.kind} {found.name!r} is at v{found.number}, not at v{expect} as was "
            "expected. Look at what changed it, then decide again."
        )
