"""Ids of rows by their unique keys: those of known rows, and new ones for rows to be inserted.

So rows that refer to each other are sent together, and no insert is waited for. Invariants: one
statement looks up keys of any number of tables, and no other transaction gets an id that was
allocated here. On a server it comes from the table's sequence; a file has one writer at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    LargeBinary,
    Select,
    Table,
    Text,
    case,
    cast,
    column,
    func,
    literal_column,
    null,
    select,
    union_all,
)
from sqlalchemy import table as table_of
from sqlalchemy.dialects.postgresql import REGCLASS

from dcpstore.catalog.db.key_lists import wanted_digests, wanted_names
from dcpstore.catalog.read.dedup import lost_ids
from dcpstore.catalog.schema import tables
from dcpstore.catalog.schema.tables import hex_start

__all__ = ["LIVE", "RowIds", "find_ids"]

LIVE = "live"


@dataclass(frozen=True, slots=True)
class RowIds:
    """Ids of the rows of one table by key: a digest as bytes, or text.

    Attributes:
        known: of rows that the catalog has.
        new: allocated for those that it does not have.
        notes: of known rows. A node or plan has the key of the page that holds it. A pack has
            `LIVE` if it is live and intact, a tensor or run if all of its packs are.
    """

    known: dict[Any, int] = field(default_factory=dict)
    new: dict[Any, int] = field(default_factory=dict)
    notes: dict[Any, str | None] = field(default_factory=dict)

    def __getitem__(self, key: bytes | str) -> int:
        found = self.known.get(key)
        return self.new[key] if found is None else found

    def is_live(self, key: bytes | str) -> bool:
        """Tell whether the row is known, with the note `LIVE`."""
        return self.notes.get(key) == LIVE


def find_ids(
    connection: Connection, wanted: Sequence[tuple[Table, Collection[Any]]]
) -> list[RowIds]:
    """Return the ids of rows of each of these tables, known and new ones.

    The connection is in a transaction that writes, and inserts the new rows itself.
    """
    found = [RowIds() for _ in wanted]
    queries = [
        _query(connection, number, table, sorted(keys))
        for number, (table, keys) in enumerate(wanted)
        if keys
    ]
    if queries:
        for number, digest, name, known, new, note in connection.execute(union_all(*queries)):
            key = name if digest is None else digest
            if known is None:
                found[number].new[key] = new
            else:
                found[number].known[key] = known
                found[number].notes[key] = note
    return found


def _query(connection: Connection, number: int, table: Table, keys: Sequence[Any]) -> Select[Any]:
    """Return a query (number, digest, name, id, new id, note) with a row for each key."""
    label = f"wanted_{table.name}"
    digest: ColumnElement[Any] = cast(null(), LargeBinary)
    name: ColumnElement[Any] = cast(null(), Text)
    if isinstance(keys[0], bytes):
        of_digests = wanted_digests(connection, keys, name=label)
        digest = of_digests.c.digest
        is_same = table.c.digest == digest
        if table is tables.tensor:
            is_same &= hex_start(table.c.digest) == hex_start(digest)
        both = of_digests.outerjoin(table, is_same)
    else:
        of_names = wanted_names(connection, keys).subquery(label)
        name = of_names.c[0]
        both = of_names.outerjoin(table, _key(table) == name)
    is_new = table.c.id.is_(None)
    return select(
        literal_column(str(number), Integer),
        digest,
        name,
        table.c.id,
        case((is_new, _next_id(connection, table))),
        cast(_note(table), Text),
    ).select_from(both)


def _key(table: Table) -> ColumnElement[str]:
    return table.c.digest if table is tables.plan else table.c.key


def _next_id(connection: Connection, table: Table) -> ColumnElement[int]:
    if connection.dialect.name != "sqlite":
        own = select(func.pg_get_serial_sequence(table.name, "id")).scalar_subquery()
        return func.nextval(cast(own, REGCLASS), type_=tables.Key)
    other = table.alias()
    last = select(func.max(other.c.id))
    if table.dialect_options["sqlite"]["autoincrement"]:  # also ids of rows that were deleted
        used = table_of("sqlite_sequence", column("name"), column("seq"))
        last = select(used.c.seq).where(used.c.name == table.name)
    among = func.row_number().over(partition_by=table.c.id)  # new rows have none
    return func.coalesce(last.scalar_subquery(), 0) + among


def _note(table: Table) -> ColumnElement[Any]:
    if table is tables.tensor:
        return case((table.c.id.not_in(lost_ids()), LIVE))
    if table is tables.pack:
        return case(((table.c.status == "live") & table.c.damage.is_(None), LIVE))
    if table in (tables.node, tables.plan):
        page = tables.page
        return select(page.c.key).where(page.c.id == table.c.page).scalar_subquery()
    return null()
