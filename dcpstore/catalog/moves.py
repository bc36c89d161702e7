"""Refs that move back or go: rollback and deletion, each an operation that can be undone.

Every statement runs after the operation's number is taken, so the ref that was looked at is the ref
that moves (compare-and-swap); what the caller expects of it is checked in the same transaction.
"""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import Connection, delete, select, update

from dcpstore.catalog import schema
from dcpstore.catalog.checks import check_text
from dcpstore.catalog.lineage import is_ancestor
from dcpstore.catalog.operations import Change, append_operations, take_operations
from dcpstore.catalog.refs import RefKind, RefRow, find_refs, resolve
from dcpstore.catalog.versions import id_of_number
from dcpstore.errors import ConflictError, InvalidInputError, NotFoundError
from dcpstore.records import RefRecord

__all__ = ["delete_ref", "find_ref", "roll_back"]

_ref = schema.ref


def delete_ref(
    connection: Connection, name: str, kind: RefKind, *, expect: int | None, author: str
) -> RefRecord:
    """Remove a tag or branch; return what it was.

    Raises:
        NotFoundError: there is no such ref of this kind.
        ConflictError: it does not name the version of number `expect`.
    """
    check_text(author, what="author")
    number = take_operations(connection)
    found = find_ref(connection, name, kind)
    _check_expected(found, expect)
    connection.execute(delete(_ref).where(_ref.c.name == name))
    change = Change(f"delete_{kind}", name, found.id, None)
    append_operations(connection, number, [change], author=author, at=datetime.now(UTC))
    return RefRecord(name, kind, found.number)


def roll_back(
    connection: Connection,
    branch: str,
    ref: str | int,
    *,
    force: bool,
    expect_tip: int | None,
    author: str,
) -> RefRecord:
    """Move a branch to the version that `ref` means; deletes nothing.

    Raises:
        NotFoundError: there is no such branch or version.
        InvalidInputError: the version is no ancestor of the tip, and `force` is not given.
        ConflictError: the tip is not the version of number `expect_tip`.
    """
    check_text(author, what="author")
    take_operations(connection, 0)
    tip = find_ref(connection, branch, "branch")
    _check_expected(tip, expect_tip)
    target = resolve(connection, ref)
    target_id = id_of_number(connection, target.number)
    if target_id == tip.id:
        return RefRecord(branch, "branch", tip.number)
    if not force and not is_ancestor(connection, target_id, of=tip.id):
        raise InvalidInputError(
            f"v{target.number} (of branch {target.branch!r}) is no ancestor of {branch!r}, "
            f"which is at v{tip.number}. See 'dcpstore log {branch}' for those that are, or move "
            "it there all the same with force=True (--force)."
        )
    connection.execute(update(_ref).where(_ref.c.name == branch).values(version=target_id))
    append_operations(
        connection,
        take_operations(connection),
        [Change("rollback", branch, tip.id, target_id)],
        author=author,
        at=datetime.now(UTC),
    )
    return RefRecord(branch, "branch", target.number)


def find_ref(connection: Connection, name: str, kind: RefKind) -> RefRow:
    """Return a ref of one kind.

    Raises:
        NotFoundError: there is none; names the nearest.
    """
    found = find_refs(connection, [name]).get(name)
    if found is not None and found.kind == kind:
        return found
    if found is not None:
        raise NotFoundError(f"no {kind} {name!r}: it is a {found.kind}. See 'dcpstore {kind}'.")
    known = connection.scalars(select(_ref.c.name).where(_ref.c.kind == kind)).all()
    raise NotFoundError.near(kind, name, known, f"See 'dcpstore {kind}' for all of them.")


def _check_expected(found: RefRow, expect: int | None) -> None:
    if expect is not None and found.number != expect:
        raise ConflictError(
            f"the {found.kind} {found.name!r} is at v{found.number}, not at v{expect} as was "
            "expected. Look at what came in between, then decide anew."
        )
