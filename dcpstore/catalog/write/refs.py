"""Refs that move back or go: rollback and deletion, each an operation that can be undone.

Every statement runs after the operation's number is taken, so the ref that was looked at is the ref
that moves (compare-and-swap); what the caller expects of it is checked in the same transaction.

Branches and tags: one name has one meaning, and a ref resolves to one version.

A tag stays where it is until someone moves it; a branch moves in the transaction of a save, or back
(`moves`, `undoing`).
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection, Select, delete, exists, insert, select, update

from dcpstore.catalog.db.key_lists import wanted_names
from dcpstore.catalog.read.ancestors import ancestor_at, depth_of, is_ancestor
from dcpstore.catalog.read.versions import ancestors, gone, id_of_number, is_visible, load_versions
from dcpstore.catalog.schema import tables as schema
from dcpstore.catalog.validation import check_text
from dcpstore.catalog.write.operations import Change, append_operations, take_operations
from dcpstore.core.ref_syntax import Ref, check_name, parse_ref
from dcpstore.errors import AlreadyExistsError, ConflictError, InvalidInputError, NotFoundError
from dcpstore.records import RefRecord, Version

__all__ = [
    "DEFAULT_BRANCH",
    "RefRow",
    "delete_ref",
    "find_ref",
    "find_refs",
    "list_refs",
    "make_ref",
    "refs_of",
    "resolve",
    "roll_back",
    "taken",
]

DEFAULT_BRANCH = "main"
_SHOWN = 10  # versions that one message names
RefKind = Literal["branch", "tag"]


class RefRow(NamedTuple):
    """A ref with the id and the number of its version."""

    name: str
    kind: RefKind
    id: int
    number: int


def resolve(connection: Connection, ref: str | int | None) -> Version:
    """Return the version that `ref` means; None is the tip of the default branch.

    Raises:
        InvalidInputError: `ref` breaks the grammar.
        NotFoundError: nothing is called so, or the walk leaves the history.
    """
    parsed = Ref(name=DEFAULT_BRANCH) if ref is None else parse_ref(ref)
    found = _start(connection, parsed)
    if parsed.up:
        found = _up(connection, found, parsed)
    if parsed.step is not None:
        found = _at_step(connection, found, parsed)
    versions = load_versions(
        connection, select(schema.version.c.id).where(schema.version.c.id == found), limit=1
    )
    if not versions:  # the walk up ended at one whose row alone is kept
        version = schema.version
        raise gone(
            *connection.execute(
                select(version.c.number, version.c.expired_at, version.c.plan).where(
                    version.c.id == found
                )
            ).one()
        )
    return versions[0]


def find_refs(connection: Connection, names: Iterable[str]) -> dict[str, RefRow]:
    """Return the branches and tags of these names, by name.

    Raises:
        InvalidInputError: a name is no text.
    """
    asked = list(names)
    for name in asked:
        if not isinstance(name, str):
            raise InvalidInputError(f"{name!r} names no branch or tag; give its name, a text.")
    wanted = wanted_names(connection, asked)
    rows = connection.execute(_rows().where(schema.ref.c.name.in_(wanted)))
    return {row.name: RefRow(*row) for row in rows}


def list_refs(connection: Connection, kind: RefKind | None) -> list[RefRecord]:
    """Return all branches and tags, or those of one kind, sorted by name."""
    query = _rows().order_by(schema.ref.c.name)
    if kind is not None:
        query = query.where(schema.ref.c.kind == kind)
    rows = connection.execute(query)
    return [RefRecord(row.name, row.kind, row.number) for row in rows]


def refs_of(connection: Connection, versions: Select[Any]) -> list[RefRow]:
    """Return the refs that name versions, whose ids a query yields, sorted by name."""
    query = _rows().where(schema.ref.c.version.in_(versions)).order_by(schema.ref.c.name)
    return [RefRow(*row) for row in connection.execute(query)]


def make_ref(
    connection: Connection,
    name: str,
    kind: RefKind,
    *,
    version: int,
    author: str,
    move: bool = False,
) -> RefRecord:
    """Name the version of number `version`; recorded as an operation.

    With `move`, a ref of this name and kind moves there; where it is there already, nothing is
    recorded.

    Raises:
        InvalidInputError: the name breaks the grammar.
        AlreadyExistsError: the name is taken, with `move` by a ref of the other kind.
        NotFoundError: there is no such version.
    """
    check_name(name, kind=kind)
    check_text(author, what="author")
    take_operations(connection, 0)
    target = id_of_number(connection, version)
    before = find_refs(connection, [name]).get(name)
    if before is None:
        connection.execute(insert(schema.ref).values(name=name, kind=kind, version=target))
    elif not move or before.kind != kind:
        raise taken(before, wanted=kind)
    elif before.id == target:
        return RefRecord(name, kind, version)
    else:
        connection.execute(
            update(schema.ref).where(schema.ref.c.name == name).values(version=target)
        )
    append_operations(
        connection,
        take_operations(connection),
        [Change(kind, name, None if before is None else before.id, target)],
        author=author,
        at=datetime.now(UTC),
    )
    return RefRecord(name, kind, version)


def taken(existing: RefRow, *, wanted: RefKind) -> AlreadyExistsError:
    """Return the error for a name that has a meaning already, and cannot be a `wanted` too."""
    name, kind, _, number = existing
    advice = (
        f", or move the tag with 'dcpstore tag {name} REF --move' (repo.tag(..., move=True))"
        if kind == wanted == "tag"
        else ""
    )
    return AlreadyExistsError(
        f"the name {name!r} is taken: it is a {kind} of v{number}. Choose another name{advice}."
    )


def _find_uid(connection: Connection, prefix: str) -> int | None:
    """Return the id of the version whose uid begins with these lower-case hex digits, if one does.

    Raises:
        InvalidInputError: several do; lists them.
        NotFoundError: it was expired.
    """
    version = schema.version
    rows = connection.execute(
        select(version.c.id, version.c.uid, version.c.number, version.c.expired_at, version.c.plan)
        .where(version.c.uid >= prefix, version.c.uid < prefix + "g", version.c.number.is_not(None))
        .order_by(version.c.uid)
        .limit(_SHOWN + 1)
    ).all()
    if len(rows) > 1:
        listed = ", ".join(f"{row.uid} (v{row.number})" for row in rows[:_SHOWN])
        more = " and more" if len(rows) > _SHOWN else ""
        raise InvalidInputError(
            f"several versions have a uid that begins with {prefix!r}: {listed}{more}. "
            "Write more of its digits."
        )
    if rows and rows[0].expired_at is not None:
        raise gone(rows[0].number, rows[0].expired_at, rows[0].plan)
    return rows[0].id if rows else None


def _rows() -> Select[Any]:
    ref, version = schema.ref, schema.version
    return select(ref.c.name, ref.c.kind, version.c.id, version.c.number).join(
        version, version.c.id == ref.c.version
    )


def _start(connection: Connection, ref: Ref) -> int:
    """Return the id of the version where a ref begins."""
    by_uid = None
    if ref.name is not None and (found := find_refs(connection, [ref.name]).get(ref.name)):
        return found.id
    if ref.uid is not None and not _is_number(connection, ref.number):
        by_uid = _find_uid(connection, ref.uid)
    if by_uid is not None:
        return by_uid
    if ref.number is not None:
        return id_of_number(connection, ref.number)
    if ref.name is None:
        raise NotFoundError(
            f"no version has a uid that begins with {ref.uid!r}. See 'dcpstore log --json'."
        )
    known = connection.scalars(select(schema.ref.c.name)).all()
    if not known and connection.scalar(select(exists().where(is_visible()))):
        raise NotFoundError(
            f"no branch or tag {ref.name!r}: the repository has versions, but none has a name. See "
            "'dcpstore log' for their numbers, and begin a branch with 'dcpstore branch --at'."
        )
    if not known:
        raise NotFoundError(
            f"no branch or tag {ref.name!r}: the repository is empty. Save a version first."
        )
    raise NotFoundError.near(
        "branch or tag", ref.name, known, "See 'dcpstore tag' and 'dcpstore branch' for all names."
    )


def _is_number(connection: Connection, number: int | None) -> bool:
    version = schema.version
    return number is not None and bool(
        connection.scalar(select(exists().where(version.c.number == number)))
    )


def _up(connection: Connection, start: int, ref: Ref) -> int:
    depth = depth_of(connection, start)
    if depth < ref.up:
        noun = "ancestor" if depth == 1 else "ancestors"
        raise NotFoundError(
            f"no version {str(ref)!r}: the start has {depth} {noun}. "
            "See 'dcpstore log' for the history."
        )
    return ancestor_at(connection, start, depth - ref.up)


def _at_step(connection: Connection, start: int, ref: Ref) -> int:
    version = schema.version
    # Of one line of history, the newest has the greatest number; most steps are there once.
    candidates = connection.scalars(
        select(version.c.id)
        .where(version.c.step == ref.step, is_visible())
        .order_by(version.c.number.desc())
    )
    for candidate in candidates:
        if is_ancestor(connection, candidate, of=start):
            return int(candidate)
    up = ancestors(start)
    steps = {
        step
        for step in connection.scalars(
            select(version.c.step).join(up, up.c.id == version.c.id).where(is_visible())
        )
        if step is not None
    }
    near = sorted(steps, key=lambda step: abs(step - (ref.step or 0)))[:3]
    there = f"The nearest steps are {', '.join(map(str, sorted(near)))}." if near else ""
    raise NotFoundError(
        f"no version {str(ref)!r}: none on the way up has step {ref.step}. {there} "
        "See 'dcpstore log' for the history."
    )


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
