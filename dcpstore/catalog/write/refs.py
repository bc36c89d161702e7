"""Branches and tags: created, moved and deleted, each by an operation that can be undone.

Every function locks the repository before it reads a ref, so the ref that was checked is the ref
that moves (compare-and-swap). A tag stays where it is until someone moves it; a branch also moves
in the transaction of a save.
"""

from __future__ import annotations

from sqlalchemy import Connection, delete, insert, update

from dcpstore.catalog.db.transactions import writes
from dcpstore.catalog.read.ref_lookup import RefKind, RefRow, find_ref, find_refs, resolve
from dcpstore.catalog.read.versions import id_of_number, is_ancestor
from dcpstore.catalog.schema import tables
from dcpstore.catalog.validation import check_text
from dcpstore.catalog.write.operations import Change, lock_repository, record
from dcpstore.core.syntax import check_name
from dcpstore.errors import AlreadyExistsError, ConflictError, InvalidInputError
from dcpstore.records import RefLike, RefRecord

__all__ = ["delete_ref", "make_ref", "roll_back", "taken_error"]

_ref = tables.ref


@writes()
def make_ref(
    connection: Connection,
    name: str,
    kind: RefKind,
    *,
    version: int,
    author: str,
    move: bool = False,
) -> RefRecord:
    """Create a branch or tag for the version of number `version`; recorded as an operation.

    With `move`, an existing ref of this name and kind is moved; if it is at that version already,
    nothing is recorded.

    Raises:
        InvalidInputError: the name breaks the grammar.
        AlreadyExistsError: the name is taken; with `move`, by a ref of the other kind.
        NotFoundError: there is no such version.
    """
    check_name(name, kind=kind)
    check_text(author, what="author")
    # Before the first read, so that the ref is still the same when it is written.
    lock_repository(connection)
    target = id_of_number(connection, version)
    before = find_refs(connection, [name]).get(name)
    if before is None:
        connection.execute(insert(_ref).values(name=name, kind=kind, version=target))
    elif not move or before.kind != kind:
        raise taken_error(before, wanted=kind)
    elif before.id == target:
        return RefRecord(name, kind, version)
    else:
        connection.execute(update(_ref).where(_ref.c.name == name).values(version=target))
    change = Change(kind, name, None if before is None else before.id, target)
    record(connection, change, author=author)
    return RefRecord(name, kind, version)


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
