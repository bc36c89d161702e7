"""The journal: a durable copy of every finished operation, in the data folder.

An operation describes itself: it names versions by uid and number, and if it created a version or
changed its facts, it holds the whole row. `restore` reads it back. Every change of the repository
calls `write_journal` afterwards. Operations that an earlier crash left unwritten are written first,
so there are no gaps. If two processes write one operation, they write the same bytes, whether they
read the operation from the catalog or have just made it. Whenever another 32 are written, the
process compacts what lies there (`stored_journal`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from functools import partial, wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

from sqlalchemy import Connection, Select, select, update

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.db.key_lists import wanted_ids
from dcpstore.catalog.db.transactions import reads, reads_once, writes
from dcpstore.catalog.maintenance.stored_journal import compact, first_intact
from dcpstore.catalog.read.versions import INFO, STATS, metrics_of, names_of
from dcpstore.catalog.schema import tables
from dcpstore.catalog.write.operations import (
    Change,
    Recorded,
    as_entry,
    list_operations,
    made_version,
)
from dcpstore.core.reentry import changing
from dcpstore.errors import CorruptionError, DcpstoreError, NotFoundError
from dcpstore.formats.journal_entry import (
    decode_operation,
    encode_operation,
    kind_of,
    operation_key,
)
from dcpstore.formats.journal_segment import (
    SHORTEST,
    encode_segment,
    segment_key,
    spans_within,
)
from dcpstore.records import VersionInfo, VersionStats
from dcpstore.storage.interface import Storage

__all__ = [
    "JOURNAL_BATCH",
    "ChangedRef",
    "Journaled",
    "changed_refs",
    "changing_repository",
    "check_owner",
    "journal_again",
    "journal_entries",
    "journaled",
    "last_journaled",
    "mark_journaled",
    "recorded",
    "unjournaled",
    "write_journal",
]

JOURNAL_BATCH = 500  # operations that are read and marked as written at a time

# JSON to be written, with values of every kind, hence `Any`.
Json = dict[str, Any]


class ChangedRef(NamedTuple):
    """What an operation did to one ref; `old` and `new` name versions by uid and number, or None.

    `kind` is None where the operation does not say whether it is a tag or a branch.
    """

    name: str
    kind: str | None
    old: Mapping[str, Any] | None
    new: Mapping[str, Any] | None


def changed_refs(entry: Mapping[str, Any]) -> Iterator[ChangedRef]:
    """Yield what an operation, as a journal entry, did to refs: its detail may list several."""
    detail = entry["detail"] or {}
    if "refs" in detail:
        for ref in detail["refs"]:
            yield ChangedRef(ref["name"], ref["kind"], ref["old"], ref["new"])
    elif entry["target"] and (entry["old"] or entry["new"]):
        kind = kind_of(entry["kind"]).target
        yield ChangedRef(entry["target"], kind, entry["old"], entry["new"])


@reads
def unjournaled(connection: Connection) -> list[Json]:
    """Return the oldest operations that may be missing in the data folder, as journal entries."""
    written = connection.scalar(select(tables.repository.c.last_journaled))
    number = tables.operation.c.number
    return _entries(connection, select(tables.operation).where(number > written))


@reads
def journal_entries(connection: Connection, numbers: Sequence[int]) -> list[Json]:
    """Return operations by their numbers, as journal entries; those that there are."""
    found: list[Json] = []
    for start in range(0, len(numbers), JOURNAL_BATCH):
        wanted = numbers[start : start + JOURNAL_BATCH]
        number = tables.operation.c.number
        found += _entries(connection, select(tables.operation).where(number.in_(wanted)))
    return found


def _entries(connection: Connection, wanted: Select[Any]) -> list[Json]:
    """Return the first of the operations that are wanted, at most `JOURNAL_BATCH`, in order."""
    rows = connection.execute(wanted.order_by(tables.operation.c.number).limit(JOURNAL_BATCH)).all()
    if not rows:
        return []
    named = {found for row in rows for found in (row.old, row.new) if found is not None}
    describes = {row.number: kind_of(row.kind).describes for row in rows}
    made = {row.new for row in rows if row.new is not None and describes[row.number]}
    versions = names_of(connection, named)
    facts = _versions_as_json(connection, made)
    return [
        as_entry(
            row.number,
            Change(row.kind, row.target, row.old, row.new, row.detail),
            versions,
            author=row.author,
            at=row.created_at,
        )
        | ({"version": facts[row.new]} if row.new in facts and describes[row.number] else {})
        | ({"repository": _repository_as_json(connection)} if row.kind == "init" else {})
        for row in rows
    ]


@writes(idempotent=True, once=True)
def mark_journaled(connection: Connection, number: int) -> None:
    """Note that every operation up to `number` is durable in the data folder."""
    written = tables.repository.c.last_journaled
    connection.execute(
        update(tables.repository).where(written < number).values(last_journaled=number)
    )


@reads_once
def last_journaled(connection: Connection) -> int:
    """Return the number of the last operation that is known to be in the data folder."""
    return int(connection.execute(select(tables.repository.c.last_journaled)).scalar_one())


@writes(idempotent=True, once=True)
def journal_again(connection: Connection, number: int) -> None:
    """Note that the operations from `number` on must be written again."""
    written = tables.repository.c.last_journaled
    connection.execute(
        update(tables.repository).where(written >= number).values(last_journaled=number - 1)
    )


def _repository_as_json(connection: Connection) -> Json:
    """Return the repository's row, without its counters and the place of its data."""
    row = connection.execute(select(tables.repository)).one()
    return {
        "uid": row.uid,
        "format_version": row.format_version,
        "chunk_nbytes": row.chunk_nbytes,
        "chunk_codec": row.chunk_codec,
        "created_at": row.created_at.isoformat(),
    }


def _versions_as_json(connection: Connection, ids: set[int]) -> dict[int, Json]:
    """Return the rows of versions, with their packs and metrics, by id."""
    if not ids:
        return {}
    version, parent = tables.version, tables.version.alias("parent_version")
    pack = tables.pack
    wanted = wanted_ids(connection, ids)
    metrics = metrics_of(connection, wanted)
    packs: dict[int, list[tuple[str, int]]] = {}
    for row in connection.execute(
        select(pack.c.version, pack.c.key, pack.c.nbytes).where(
            pack.c.version.in_(wanted), pack.c.planned_at.is_(None)
        )
    ):
        packs.setdefault(row.version, []).append((row.key, row.nbytes))
    rows = connection.execute(
        select(version, parent.c.uid.label("parent_uid"))
        .outerjoin(parent, parent.c.id == version.c.parent)
        .where(version.c.id.in_(wanted))
    ).mappings()
    return {
        row["id"]: made_version(
            VersionInfo(**{name: row[name] for name in INFO}, metrics=metrics.get(row["id"], {})),
            VersionStats(**{name: row[name] for name in STATS}),
            number=row["number"],
            parent=row["parent_uid"],
            started_at=row["started_at"],
            packs=packs.get(row["id"], []),
        )
        for row in rows
    }


P = ParamSpec("P")
R = TypeVar("R", bound="Journaled")
T = TypeVar("T")

_log = logging.getLogger(__name__)


class Journaled(Protocol):
    """An object with a journal: it has a catalog, and the storage of its data."""

    catalog: Catalog

    @property
    def storage(self) -> Storage: ...


def journaled(method: Callable[Concatenate[R, P], T]) -> Callable[Concatenate[R, P], T]:
    """Make a method that changes its repository write the journal before it returns."""

    @wraps(method)
    def run(self: R, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with changing_repository(self.catalog), self.catalog.keep_connection():
            result = method(self, *args, **kwargs)
            write_journal(self.catalog, self.storage)
        return result

    return run


def recorded(repository: Journaled, change: Callable[[], Recorded[T]]) -> T:
    """Make a change that returns what it recorded, write the journal, and return its result."""
    with changing_repository(repository.catalog), repository.catalog.keep_connection():
        made = change()
        write_journal(repository.catalog, repository.storage, made)
        return made.value


def changing_repository(catalog: Catalog) -> AbstractContextManager[None]:
    """Refuse a change of a repository inside another change of it in this thread.

    Raises:
        ConflictError: this is such a change.
    """
    uid = catalog.repository.uid
    return changing(f"repository {uid}", shown=f"the repository {uid}")


def check_owner(catalog: Catalog, storage: Storage) -> None:
    """Refuse a data folder that has the journal of another repository.

    The first operation names the owner. If it is missing or damaged, the next intact operation must
    be the one that the catalog has under that number.

    Raises:
        DcpstoreError: the journal belongs to another repository, or its owner is unknown.
    """
    try:
        owner = decode_operation(storage.get(operation_key(1)))["repository"]["uid"]
    except NotFoundError:
        if _is_own_journal(catalog, storage) is False:
            raise DcpstoreError(_foreign_journal(storage, "missing")) from None
        return  # our journal without its first entry, or no journal yet
    except (CorruptionError, LookupError) as error:
        is_own = _is_own_journal(catalog, storage)
        if is_own is False:
            raise DcpstoreError(_foreign_journal(storage, f"damaged ({error})")) from error
        if is_own is None:
            raise DcpstoreError(
                f"cannot tell which repository the data in {storage.url!r} belongs to: the first "
                f"operation is damaged ({error}), and there is no other one. Restore "
                "operations/000000000001.json from a copy."
            ) from error
        return
    if owner != catalog.repository.uid:
        raise DcpstoreError(
            f"the data in {storage.url!r} belongs to repository {owner}, and this repository is "
            f"{catalog.repository.uid}; nothing was changed. Give each its own data folder, or "
            "restore the catalog of the first with 'dcpstore rebuild'."
        )


def write_journal(catalog: Catalog, storage: Storage, made: Recorded[Any] | None = None) -> bool:
    """Write the operations that the data folder lacks; return whether it has all of them now.

    If `made` were recorded right after those that it has, they are written, and the catalog is not
    asked. A failure is logged, not raised: the change itself is committed, and the next change
    writes the missing operations.
    """
    written: list[int] = []  # the first and last number of each batch
    try:
        if made is not None and made.are_next:
            _write(catalog, storage, made.entries)
            written += _ends(made.entries)
        else:
            is_full = True
            while is_full:
                operations = unjournaled(catalog)
                # Only a new catalog can meet the journal of another repository.
                if operations and operations[0]["kind"] == "init":
                    check_owner(catalog, storage)
                _write(catalog, storage, operations)
                written += _ends(operations)
                is_full = len(operations) == JOURNAL_BATCH
    except DcpstoreError as error:
        _log.warning(
            "an operation is not in the journal of %s yet (%s); the next change writes it",
            storage.url,
            error,
        )
        return False
    if written and written[-1] // SHORTEST > (written[0] - 1) // SHORTEST:
        _compact(catalog, storage, written[-1])
    return True


def _ends(operations: Sequence[Json]) -> list[int]:
    return [operations[i]["operation"] for i in (0, -1)] if operations else []


def _write(catalog: Catalog, storage: Storage, operations: Sequence[Json]) -> None:
    """Write operations: segments where they are many, each alone where they are few."""
    if not operations:
        return
    lines = {one["operation"]: encode_operation(one) for one in operations}
    first, last = min(lines), max(lines)
    # A damaged catalog may lack some: then each is written alone.
    is_run = last - first < len(lines)
    spans = list(spans_within(first, last)) if is_run else []
    in_segments = {number for span in spans for number in range(span.first, span.last + 1)}
    for number, line in lines.items():
        if number == 1 or number not in in_segments:
            storage.put(operation_key(number), line)
    if spans:
        _renew_first(catalog, storage)
    for span in spans:
        held = [lines[number] for number in range(span.first, span.last + 1)]
        storage.put(segment_key(span), encode_segment(span, held))
    mark_journaled(catalog, last)


def _compact(catalog: Catalog, storage: Storage, last: int) -> None:
    """Compact the journal up to an operation; a failure is logged: all operations are durable."""
    try:
        check_owner(catalog, storage)
        _renew_first(catalog, storage)
        compact(storage, last, partial(journal_entries, catalog))
    except DcpstoreError as error:
        _log.warning(
            "the journal of %s was not compacted (%s); a later change does it", storage.url, error
        )


def _renew_first(catalog: Catalog, storage: Storage) -> None:
    """Let the first operation be of the newest format, before there is a segment.

    A dcpstore that cannot read segments refuses it, instead of missing what is in them.
    """
    key = operation_key(1)
    try:
        stored = storage.get(key)
        renewed = encode_operation(decode_operation(stored))
    except (NotFoundError, CorruptionError):
        entries = journal_entries(catalog, [1])
        if not entries:
            raise CorruptionError("the catalog lacks operation 1; run 'dcpstore verify'.") from None
        stored, renewed = b"", encode_operation(entries[0])
    if renewed != stored:
        storage.put(key, renewed)


def _is_own_journal(catalog: Catalog, storage: Storage) -> bool | None:
    """Tell whether the first intact operation after number 1 is the catalog's; None without one.

    Operations are compared by their time too, which is kept to the microsecond.
    """
    entry = first_intact(storage, after=1)
    if entry is None:
        return None
    own = next((one for one in list_operations(catalog) if one.number == entry["operation"]), None)
    found = entry["kind"], entry["target"], datetime.fromisoformat(entry["created_at"])
    return own is not None and (own.kind, own.target, own.created_at) == found


def _foreign_journal(storage: Storage, fault: str) -> str:
    return (
        f"the operations in {storage.url!r} belong to another repository, whose first one is "
        f"{fault}; nothing was changed. Give each its own data folder, or restore "
        "operations/000000000001.json from a copy."
    )
