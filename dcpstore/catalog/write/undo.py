"""Undo: the last operation that is not undone is reverted, by an operation of its own.

An operation records a ref before and after it, and an undo needs no more. For each operation that
it reverts it records one, with the two values swapped, so a rebuild replays it like any other.
`detail["undoes"]` is the number of the reverted operation, so that the next undo goes further back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from dcpstore.catalog.db.key_lists import wanted_ids, wanted_names
from dcpstore.catalog.db.transactions import writes
from dcpstore.catalog.read.ref_lookup import RefKind, find_refs
from dcpstore.catalog.schema import tables
from dcpstore.catalog.validation import check_text
from dcpstore.catalog.write.annotations import revert_labels, revert_metrics
from dcpstore.catalog.write.operations import Change, list_operations, lock_repository, record
from dcpstore.errors import ConflictError, InvalidInputError, NotFoundError
from dcpstore.formats.journal_entry import kind_of
from dcpstore.records import Operation

__all__ = ["undo_last"]

_ref, _version, _operation = tables.ref, tables.version, tables.operation
_BATCH = 100  # operations that one query reads, newest first


class _Move(NamedTuple):
    """A ref to move from version `now` back to `then`; ids, or None where there is no ref."""

    name: str
    kind: RefKind
    now: int | None
    then: int | None


@writes()
def undo_last(connection: Connection, *, expect: int | None, author: str) -> Operation:
    """Revert the last operation that is not undone; return the operation that reverts it.

    A save is reverted together with its tags: its version stays, and the branch moves back.
    Forgotten versions come back with the refs that they had. A gc changes nothing that people see,
    and is skipped.

    Raises:
        InvalidInputError: nothing is left to undo, or `expect` is not a number.
        NotFoundError: a version to which a ref would go back was expired, or gc has dropped
            forgotten versions.
        ConflictError: the operation is not number `expect`, or a ref is not where it put it; or a
            later operation, such as an expire, cannot be undone, and `expect` is not given.
    """
    check_text(author, what="author")
    if expect is not None and type(expect) is not int:
        raise InvalidInputError(
            f"expect is {expect!r}; give the number of an operation, as 'dcpstore ops' shows it."
        )
    lock_repository(connection)
    rows = _last_not_undone(connection, expect)
    last = rows[0]
    if expect is not None and last.number != expect:
        raise ConflictError(
            f"the last operation that is not undone is {last.number} ({last.kind} of "
            f"{last.target!r}), not {expect} as was expected. See 'dcpstore ops'."
        )
    if kind_of(last.kind).adds:
        changes = [_revert_addition(connection, last)]
    elif last.kind == "forget":
        changes = [_revert_forget(connection, last)]
    else:
        moves = [
            _Move(row.target, kind, row.new, row.old) for row in rows if (kind := _ref_kind(row))
        ]
        _check(connection, last, moves)
        _move(connection, moves)
        changes = [
            Change("undo", row.target, row.new, row.old, {"undoes": row.number}) for row in rows
        ]
    record(connection, *changes, author=author)
    return list_operations(connection, limit=len(changes))[-1]


def _last_not_undone(connection: Connection, expect: int | None) -> Sequence[Row[Any]]:
    """Return the rows of the operation to undo: one row, or a save and then its tags.

    What cannot be undone is skipped only if `expect` names another operation: a caller who wants
    expired or forgotten versions back must not lose something else instead.

    Raises:
        InvalidInputError: nothing is left to undo.
        ConflictError: a later operation cannot be undone, and `expect` is None or its number.
    """
    undone: set[int] = set()  # an undo comes after what it undoes, so it is read first
    parts: list[Row[Any]] = []
    final: Row[Any] | None = None  # the newest operation that cannot be undone
    for row in _newest_first(connection):
        if row.kind == "undo":
            undone.add(row.detail["undoes"])
        elif row.number in undone:
            continue
        elif row.kind == "tag" and row.detail is not None:  # of a save, whose row comes next
            parts.append(row)
        elif (row.target and _ref_kind(row)) or kind_of(row.kind).adds:
            _check_passed(final, row, expect)
            own = [part for part in parts if part.detail["save"] == row.number]
            return [row, *reversed(own)]
        elif row.kind == "forget" and (
            expect in {None, row.number} or _can_come_back(connection, row.detail["versions"])
        ):
            _check_passed(final, row, expect)
            return [row]
        # Once an operation before it is undone, the caller has agreed to leave this one.
        elif final is None and _is_final(row) and row.number <= min(undone, default=row.number):
            final = row
    why = f": {final.kind} (operation {final.number}) cannot be undone" if final is not None else ""
    raise InvalidInputError(f"nothing is left to undo{why}. See 'dcpstore ops' for what was done.")


def _is_final(row: Row[Any]) -> bool:
    """Tell whether an operation changed what people see, and cannot be undone.

    That is an expire, and a copy that made a version. The expire that a rebuild records is not one:
    it says which versions were lost before.
    """
    if row.kind == "expire":
        return "lost" not in row.detail.get("rules", {})
    return row.kind == "copy" and not row.target


def _check_passed(final: Row[Any] | None, row: Row[Any], expect: int | None) -> None:
    """Raise ConflictError if `final` came after `row`, and `expect` does not pass over it."""
    if final is None or expect not in {None, final.number}:
        return
    what = f"{row.kind} {row.target!r}" if row.target else row.kind
    raise ConflictError(
        f"the last operation, {final.kind} (operation {final.number}), cannot be undone. To undo "
        f"the one before it ({what}, operation {row.number}), run 'dcpstore undo --expect "
        f"{row.number}' (repo.undo(expect={row.number}))."
    )


def _ref_kind(row: Row[Any]) -> RefKind | None:
    """Return the kind of the ref that an operation changed; None if it changed none."""
    target = kind_of(row.kind).target
    return None if target == "versions" else target


def _newest_first(connection: Connection) -> Iterator[Row[Any]]:
    before = None
    while True:
        query = select(_operation).order_by(_operation.c.number.desc()).limit(_BATCH)
        if before is not None:
            query = query.where(_operation.c.number < before)
        rows = connection.execute(query).all()
        yield from rows
        if len(rows) < _BATCH:
            return
        before = rows[-1].number


def _check(connection: Connection, last: Row[Any], moves: Sequence[_Move]) -> None:
    """Raise if a ref is not as the operation left it, or cannot go back.

    Raises:
        ConflictError: another operation moved or deleted the ref.
        NotFoundError: the version to go back to was expired.
    """
    what = f"operation {last.number} ({last.kind} of {last.target!r})"
    refs = find_refs(connection, [move.name for move in moves])
    for move in moves:
        found = refs.get(move.name)
        here = None if found is None or found.kind != move.kind else found.id
        if here != move.now or (found is not None and move.now is None):
            at = "deleted" if found is None else f"a {found.kind} at v{found.number}"
            raise ConflictError(
                f"cannot undo {what}: {move.name!r} is {at}, not where that operation left it. "
                "See 'dcpstore ops', and move the ref with 'dcpstore rollback' or 'dcpstore tag'."
            )
    targets = [move.then for move in moves if move.then is not None]
    expired = connection.execute(
        select(_version.c.number, _version.c.expired_at).where(
            _version.c.id.in_(wanted_ids(connection, targets)), _version.c.expired_at.is_not(None)
        )
    ).first()
    if expired is not None:
        raise NotFoundError(
            f"cannot undo {what}: it would go back to v{expired.number}, which was expired on "
            f"{expired.expired_at:%Y-%m-%d at %H:%M} UTC. See 'dcpstore log' for the versions that "
            "are kept, and move the ref with 'dcpstore rollback --force'."
        )


def _move(connection: Connection, moves: Sequence[_Move]) -> None:
    for name, kind, now, then in moves:
        if then is None:
            connection.execute(delete(_ref).where(_ref.c.name == name))
        elif now is None:
            connection.execute(insert(_ref).values(name=name, kind=kind, version=then))
        else:
            connection.execute(update(_ref).where(_ref.c.name == name).values(version=then))


def _revert_forget(connection: Connection, row: Row[Any]) -> Change:
    """Bring forgotten versions back, with the refs that they had."""
    uids, refs = row.detail["versions"], row.detail["refs"]
    _bring_back(connection, uids, what=f"operation {row.number} (forget of {row.target!r})")
    named = {end["uid"] for ref in refs for end in (ref["old"], ref["new"]) if end is not None}
    ids: dict[str | None, int] = {
        found.uid: found.id
        for found in connection.execute(
            select(_version.c.uid, _version.c.id).where(
                _version.c.uid.in_(wanted_names(connection, named))
            )
        )
    }
    moves = [
        _Move(
            ref["name"], ref["kind"], *(end and ids[end["uid"]] for end in (ref["new"], ref["old"]))
        )
        for ref in refs
    ]
    _check(connection, row, moves)
    _move(connection, moves)
    back = [ref | {"old": ref["new"], "new": ref["old"]} for ref in refs]
    detail = {"undoes": row.number, "versions": uids, "refs": back}
    return Change("undo", row.target, detail=detail)


def _revert_addition(connection: Connection, row: Row[Any]) -> Change:
    """Remove the metrics or labels that an operation added."""
    names = row.detail["added"]
    if row.kind == "metrics":
        revert_metrics(connection, row.new, names)
    else:
        revert_labels(connection, row.new, names)
    detail = {"undoes": row.number, "removed": {row.kind: names}}
    return Change("undo", new=row.new, detail=detail)


def _bring_back(connection: Connection, uids: Collection[str], *, what: str) -> None:
    """Make forgotten versions visible again; `what` is the operation that forgot them.

    Raises:
        NotFoundError: gc has dropped their entries.
    """
    if not _can_come_back(connection, uids):
        raise NotFoundError(
            f"cannot undo {what}: gc has dropped the forgotten versions. To undo an operation "
            "before it, give its number: undo(expect=...) (--expect). See 'dcpstore ops'."
        )
    connection.execute(
        update(_version)
        .where(_version.c.uid.in_(wanted_names(connection, uids)))
        .values(status="committed", expired_at=None)
    )


def _can_come_back(connection: Connection, uids: Collection[str]) -> bool:
    """Tell whether these versions were forgotten, and all of them can be brought back."""
    kept = connection.scalar(
        select(func.count()).where(
            _version.c.uid.in_(wanted_names(connection, uids)),
            _version.c.status == "expired",
            _version.c.plan.is_not(None),
        )
    )
    return kept == len(uids)
