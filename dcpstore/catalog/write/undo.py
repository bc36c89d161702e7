"""Undo: the last operation that is not undone is taken back, as an operation of its own.

What an operation says of a ref before and after it is all that an undo needs; the undo is one
operation for each that it takes back, with both the other way round, so a rebuild follows it as it
follows any. `detail["undoes"]` is their number, by which the next undo goes further back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from dcpstore.catalog.db.key_lists import wanted_ids, wanted_names
from dcpstore.catalog.db.transactions import writes
from dcpstore.catalog.read.ref_lookup import RefKind, find_refs
from dcpstore.catalog.schema import tables
from dcpstore.catalog.validation import check_text
from dcpstore.catalog.write.annotations import revert_labels, revert_metrics
from dcpstore.catalog.write.operations import (
    Change,
    append_operations,
    list_operations,
    take_operations,
)
from dcpstore.errors import ConflictError, InvalidInputError, NotFoundError
from dcpstore.formats.journal_entry import kind_of
from dcpstore.records import Operation

__all__ = ["undo_last"]

_ref, _version, _operation = tables.ref, tables.version, tables.operation
_BATCH = 100  # operations that are looked at together, newest first


class _Move(NamedTuple):
    """A ref to take back: from the version `now`, to `then`; by id, None where there is no ref."""

    name: str
    kind: RefKind
    now: int | None
    then: int | None


@writes()
def undo_last(connection: Connection, *, expect: int | None, author: str) -> Operation:
    """Take back the last operation that is not undone; return the operation that did so.

    A save goes together with its tags: its version stays, and the branch moves back. What was
    forgotten comes back with the refs that it had. What expire and gc did cannot be taken back, and
    is passed over.

    Raises:
        InvalidInputError: nothing is left to undo, or `expect` is no number.
        NotFoundError: a version that a ref would go back to was expired, or gc dropped what was
            forgotten.
        ConflictError: the operation is not number `expect`, or a ref is not where it put it.
    """
    check_text(author, what="author")
    if expect is not None and type(expect) is not int:
        raise InvalidInputError(
            f"expect is {expect!r}; give the number of an operation, as 'dcpstore ops' shows it."
        )
    take_operations(connection, 0)
    rows = _last_not_undone(connection, expect)
    last = rows[0]
    if expect is not None and last.number != expect:
        raise ConflictError(
            f"the last operation that is not undone is {last.number} ({last.kind} of "
            f"{last.target!r}), not {expect} as was expected. See 'dcpstore ops'."
        )
    if kind_of(last.kind).adds:
        changes = [_take_back_addition(connection, last)]
    elif last.kind == "forget":
        changes = [_remember(connection, last)]
    else:
        moves = [
            _Move(row.target, kind, row.new, row.old) for row in rows if (kind := _ref_kind(row))
        ]
        _check(connection, last, moves)
        _move(connection, moves)
        changes = [
            Change("undo", row.target, row.new, row.old, {"undoes": row.number}) for row in rows
        ]
    first = take_operations(connection, len(changes))
    append_operations(connection, first, changes, author=author, at=datetime.now(UTC))
    done = list_operations(connection, limit=len(changes))
    return done[-1]


def _last_not_undone(connection: Connection, expect: int | None) -> Sequence[Row[Any]]:
    """Return the rows of the operation to undo: one, or a save and then its tags.

    What was forgotten for good is passed over only where `expect` names another operation: who
    wants the versions back must not lose something else instead.
    """
    undone: set[int] = set()  # an undo comes after what it undoes, so it is met first
    parts: list[Row[Any]] = []
    for row in _newest_first(connection):
        if row.kind == "undo":
            undone.add(row.detail["undoes"])
        elif row.number in undone:
            continue
        elif row.kind == "tag" and row.detail is not None:  # of a save, which is met soon
            parts.append(row)
        elif (row.target and _ref_kind(row)) or kind_of(row.kind).adds:
            own = [part for part in parts if part.detail["save"] == row.number]
            return [row, *reversed(own)]
        elif row.kind == "forget" and (
            expect in {None, row.number} or _may_come_back(connection, row.detail["versions"])
        ):
            return [row]
    raise InvalidInputError("nothing is left to undo. See 'dcpstore ops' for what was done.")


def _ref_kind(row: Row[Any]) -> RefKind | None:
    """Return the kind of the ref that an operation changed, if it did."""
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
    """Raise where a ref is not as the operation left it, or cannot go back."""
    what = f"operation {last.number} ({last.kind} of {last.target!r})"
    refs = find_refs(connection, [move.name for move in moves])
    for move in moves:
        found = refs.get(move.name)
        here = None if found is None or found.kind != move.kind else found.id
        if here != move.now or (found is not None and move.now is None):
            at = "gone" if found is None else f"a {found.kind} at v{found.number}"
            raise ConflictError(
                f"cannot undo {what}: {move.name!r} is {at}, not where that operation left it. "
                "See 'dcpstore ops', and move the ref with 'dcpstore rollback' or 'dcpstore tag'."
            )
    targets = [move.then for move in moves if move.then is not None]
    for row in connection.execute(
        select(_version.c.number, _version.c.expired_at).where(
            _version.c.id.in_(wanted_ids(connection, targets)), _version.c.expired_at.is_not(None)
        )
    ):
        raise NotFoundError(
            f"cannot undo {what}: it would go back to v{row.number}, which was expired on "
            f"{row.expired_at:%Y-%m-%d at %H:%M} UTC. See 'dcpstore log' for the versions that "
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


def _remember(connection: Connection, row: Row[Any]) -> Change:
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
    return Change("undo", row.target, None, None, detail)


def _take_back_addition(connection: Connection, row: Row[Any]) -> Change:
    names = row.detail["added"]
    if row.kind == "metrics":
        revert_metrics(connection, row.new, names)
    else:
        revert_labels(connection, row.new, names)
    detail = {"undoes": row.number, "removed": {row.kind: names}}
    return Change("undo", "", None, row.new, detail)


def _bring_back(connection: Connection, uids: Collection[str], *, what: str) -> None:
    """Make forgotten versions visible again; `what` forgot them.

    Raises:
        NotFoundError: gc has dropped what they held.
    """
    if not _may_come_back(connection, uids):
        raise NotFoundError(
            f"cannot undo {what}: gc has dropped what was forgotten. To undo what was done before, "
            "name that operation: undo(expect=...) (--expect). See 'dcpstore ops'."
        )
    connection.execute(
        update(_version)
        .where(_version.c.uid.in_(wanted_names(connection, uids)))
        .values(status="committed", expired_at=None)
    )


def _may_come_back(connection: Connection, uids: Collection[str]) -> bool:
    """Tell whether versions were forgotten, and all of them can be brought back."""
    kept = connection.scalar(
        select(func.count()).where(
            _version.c.uid.in_(wanted_names(connection, uids)),
            _version.c.status == "expired",
            _version.c.plan.is_not(None),
        )
    )
    return kept == len(uids)
