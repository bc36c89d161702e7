"""Versions are expired by rules or forgotten by name; their rows stay.

Parents and operations refer to the rows. Expire by rules drops the entries at once. A forgotten
version keeps its entries and its plan until the next gc, so that an undo can bring it back: an
expired row that has a plan was forgotten. Invariant: no ref names an expired version.

Versions expire in slices, each of which is one transaction and one operation. So other processes
never wait long, and what a process that ended left unfinished is what the rules say next time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

from sqlalchemy import Connection, Row, Select, delete, select, update

from dcpstore.catalog.db.key_lists import wanted_ids
from dcpstore.catalog.db.transactions import OpenCatalog, reads, writes
from dcpstore.catalog.read.ref_lookup import RefRow, refs_of, resolve
from dcpstore.catalog.read.versions import ancestors, is_visible, load_versions, names_of
from dcpstore.catalog.schema import tables
from dcpstore.catalog.validation import check_text
from dcpstore.catalog.write.forget import loosen
from dcpstore.catalog.write.operations import Change, lock_repository, record
from dcpstore.core.syntax import parse_ref
from dcpstore.errors import InvalidInputError
from dcpstore.records import ForgetReport, RefLike, RefRecord, Version

__all__ = [
    "SLICE",
    "Find",
    "drop_forgotten",
    "expire_slice",
    "find_forgotten",
    "forget_versions",
]

_version = tables.version
_SHOWN = 10  # tags that one message names

SLICE = 1_000  # versions that expire in one transaction

# Returns the ids of versions to expire, `SLICE` at most.
Find = Callable[[Connection], Sequence[int]]


class _Named(Protocol):
    """What names a version: a `Version`, or a row."""

    @property
    def number(self) -> int: ...
    @property
    def uid(self) -> str: ...


class _Move(NamedTuple):
    """A ref of a forgotten version, and where it moves; None deletes it."""

    ref: RefRow
    to: tuple[int, int] | None  # id and number


@writes()
def expire_slice(
    connection: Connection, find: Find, *, author: str, rules: Mapping[str, Any]
) -> list[int]:
    """Expire the versions that `find` returns; return their numbers.

    No ref can move meanwhile. `rules` is recorded with the operation.
    """
    lock_repository(connection)
    found = find(connection)
    if not found:
        return []
    now, ids = datetime.now(UTC), wanted_ids(connection, found)
    going = sorted(_expire(connection, ids, at=now), key=lambda row: row.number)
    _drop(connection, ids)
    _record(connection, "expire", going, {"rules": dict(rules)}, author=author, at=now)
    return [row.number for row in going]


def forget_versions(
    catalog: OpenCatalog,
    refs: Sequence[RefLike],
    *,
    force: bool,
    dry_run: bool,
    author: str,
) -> ForgetReport:
    """Forget the versions that `refs` name, all of them or none; recorded as one operation.

    A branch whose tip is forgotten moves back to the nearest ancestor that stays, and is deleted if
    there is none. A dry run only reads.

    Raises:
        NotFoundError: a ref names nothing.
        InvalidInputError: a ref breaks the grammar; or a version is tagged, and `force` is False
            (with True its tags are deleted).
    """
    check_text(author, what="author")
    going, moves = (
        _find_going(catalog, refs, force=force)
        if dry_run
        else _forget(catalog, refs, force=force, author=author)
    )
    return ForgetReport(
        tuple(going),
        tuple(RefRecord(m.ref.name, m.ref.kind, m.ref.number) for m in moves if m.to is None),
        tuple(RefRecord(m.ref.name, m.ref.kind, m.to[1]) for m in moves if m.to is not None),
        dry_run,
    )


@reads
def _find_going(
    connection: Connection, refs: Sequence[RefLike], *, force: bool
) -> tuple[list[Version], list[_Move]]:
    """Return the versions to forget, by number, and what becomes of their refs."""
    going = _named(connection, refs)
    if not going:
        return [], []
    ids = _ids_of(connection, going)
    held = refs_of(connection, ids)
    tagged = [ref for ref in held if ref.kind == "tag"]
    if tagged and not force:
        raise _tagged_error(tagged)
    return going, [
        _Move(ref, _nearest_ancestor(connection, ref.id, ids) if ref.kind == "branch" else None)
        for ref in held
    ]


@writes()
def _forget(
    connection: Connection, refs: Sequence[RefLike], *, force: bool, author: str
) -> tuple[list[Version], list[_Move]]:
    lock_repository(connection)
    going, moves = _find_going(connection, refs, force=force)
    if going:
        now = datetime.now(UTC)
        _expire(connection, _ids_of(connection, going), at=now)
        _apply(connection, moves)
        detail = {"refs": _as_json(connection, moves)}
        _record(connection, "forget", going, detail, author=author, at=now)
    return going, moves


def _ids_of(connection: Connection, versions: Sequence[Version]) -> Select[Any]:
    """Return a query of the ids of versions."""
    numbers = wanted_ids(connection, [version.number for version in versions])
    query = select(_version.c.id).where(_version.c.number.in_(numbers))
    return wanted_ids(connection, connection.scalars(query).all())


def find_forgotten(connection: Connection) -> list[tuple[int, str]]:
    """Return the ids and uids of the forgotten versions, which an undo can bring back."""
    rows = connection.execute(
        select(_version.c.id, _version.c.uid)
        .where(_version.c.status == "expired", _version.c.plan.is_not(None))
        .order_by(_version.c.number)
    )
    return [(row.id, row.uid) for row in rows]


def drop_forgotten(connection: Connection) -> list[str]:
    """Drop the entries and plans of forgotten versions; return their uids."""
    rows = find_forgotten(connection)
    if rows:
        _drop(connection, wanted_ids(connection, [version for version, _ in rows]))
    return [uid for _, uid in rows]


def _named(connection: Connection, refs: Iterable[RefLike]) -> list[Version]:
    """Return the versions that refs name, each once, by number; plain numbers in one query."""
    given = list(refs)
    if None in given:  # which elsewhere means the tip of the default branch
        raise InvalidInputError("None names no version to forget; give its number, tag or branch.")
    parsed = [parse_ref(ref) for ref in given]
    numbers = {ref.number for ref in parsed if ref.number is not None}
    numbered = select(_version.c.id).where(_version.c.number.in_(wanted_ids(connection, numbers)))
    found = {v.number: v for v in load_versions(connection, numbered)}
    going: dict[int, Version] = {}
    for text, ref in zip(given, parsed, strict=True):
        is_plain = not ref.up and ref.step is None
        version = found.get(ref.number or 0) if is_plain else None
        if version is None or (isinstance(text, Version) and text.uid != version.uid):
            version = resolve(connection, text)
        going[version.number] = version
    return [going[number] for number in sorted(going)]


def _expire(connection: Connection, ids: Select[Any], *, at: datetime) -> Sequence[Row[Any]]:
    """Mark the versions whose ids a query returns as expired; return rows (number, uid)."""
    return connection.execute(
        update(_version)
        .where(_version.c.id.in_(ids))
        .values(status="expired", expired_at=at)
        .returning(_version.c.number, _version.c.uid)
    ).all()


def _drop(connection: Connection, ids: Select[Any]) -> None:
    """Cut expired versions off from their entries and plans; gc deletes what nothing else has."""
    loosen(connection, ids)
    connection.execute(update(_version).where(_version.c.id.in_(ids)).values(plan=None, stale=None))


def _record(
    connection: Connection,
    kind: str,
    going: Iterable[_Named],
    detail: Mapping[str, Any],
    *,
    author: str,
    at: datetime,
) -> None:
    """Record that versions were expired or forgotten."""
    versions = sorted(going, key=lambda version: version.number)
    target = _ranges([version.number for version in versions])
    detail = {"versions": [version.uid for version in versions], **detail}
    record(connection, Change(kind, target, detail=detail), author=author, at=at)


def _nearest_ancestor(
    connection: Connection, version: int, going: Select[Any]
) -> tuple[int, int] | None:
    """Return the id and the number of the nearest ancestor that stays, or None.

    `going` are versions that are about to expire, by id.
    """
    up = ancestors(version)
    row = connection.execute(
        select(_version.c.id, _version.c.number)
        .join(up, up.c.id == _version.c.id)
        .where(is_visible(), _version.c.id.not_in(going))
        .order_by(up.c.depth)
        .limit(1)
    ).one_or_none()
    return None if row is None else (row.id, row.number)


def _apply(connection: Connection, moves: Iterable[_Move]) -> None:
    """Move or delete the refs."""
    ref = tables.ref
    for move in moves:
        is_ref = ref.c.name == move.ref.name
        if move.to is None:
            connection.execute(delete(ref).where(is_ref))
        else:
            connection.execute(update(ref).where(is_ref).values(version=move.to[0]))


def _as_json(connection: Connection, moves: Sequence[_Move]) -> list[dict[str, Any]]:
    """Return moves as the journal stores them, with versions by uid and number."""
    ids = {move.ref.id for move in moves} | {move.to[0] for move in moves if move.to is not None}
    named = names_of(connection, ids)
    return [
        {
            "name": move.ref.name,
            "kind": move.ref.kind,
            "old": named[move.ref.id],
            "new": None if move.to is None else named[move.to[0]],
        }
        for move in moves
    ]


def _tagged_error(tags: Sequence[RefRow]) -> InvalidInputError:
    """Return the error for versions that are tagged, and so not forgotten."""
    listed = ", ".join(f"v{ref.number} ({ref.name})" for ref in tags[:_SHOWN])
    more = f" and {len(tags) - _SHOWN} more" if len(tags) > _SHOWN else ""
    return InvalidInputError(
        f"tagged versions are not forgotten: {listed}{more}. Nothing was changed. Move or delete "
        "the tags first ('dcpstore tag --move', 'dcpstore tag --delete'), or give force=True "
        "(--force), which deletes the tags too."
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers for people: `v1-v3,v5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(f"v{number}" for number in run) for run in runs)
