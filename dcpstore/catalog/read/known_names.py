"""The names that a catalog knows: the distinct ones of a column, and those like a misspelt name.

Neither reads all rows, so an error about a name costs the same however many versions there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sqlalchemy import CTE, ColumnElement, Connection, Select, select, union_all

from dcpstore.catalog.db.key_lists import wanted_names
from dcpstore.catalog.schema import tables

if TYPE_CHECKING:
    from dcpstore.catalog.read.ref_lookup import RefKind

__all__ = ["distinct_names", "refs_like"]

_ALL = 200  # names that are compared one by one
_BESIDE = 20  # names on each side of a place in their order
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789-_./"  # that a slip of the finger adds


def distinct_names(
    column: ColumnElement[Any], *conditions: ColumnElement[bool], most: int | None = None
) -> CTE:
    """Return a table (name) of the distinct values of an indexed column, in their order.

    One search in the index finds the next value, so thousands of rows with the same value cost as
    much as one. `most` is how many are returned at most.
    """
    first = select(column).where(*conditions).order_by(column).limit(1).scalar_subquery()
    found = select(first.label("name")).cte("distinct_name", recursive=True)
    later = select(column).where(column > found.c.name, *conditions).order_by(column).limit(1)
    found = found.union_all(
        select(later.scalar_subquery().label("name")).where(found.c.name.is_not(None))
    )
    named = select(found.c.name).where(found.c.name.is_not(None))
    return named.limit(most).cte("known_name")


def refs_like(connection: Connection, name: str, kind: RefKind | None = None) -> list[str]:
    """Return the names of refs that may be meant by `name`, branches first.

    While they are few, these are all names. Of many, they are branches, those that differ from
    `name` by one letter, and the neighbours of `name`, and of its first half, in their order.
    """
    ref = tables.ref
    is_kind = [] if kind is None else [ref.c.kind == kind]
    query = select(ref.c.name).where(*is_kind)
    known = list(connection.scalars(query.order_by(ref.c.name).limit(_ALL + 1)))
    if len(known) <= _ALL:
        return known
    parts: list[Select[Any]] = []
    if kind is None:
        parts.append(select(ref.c.name).where(ref.c.kind == "branch").limit(_BESIDE))
    for place in dict.fromkeys((name, name[: (len(name) + 1) // 2])):
        parts.append(query.where(ref.c.name < place).order_by(ref.c.name.desc()).limit(_BESIDE))
        parts.append(query.where(ref.c.name >= place).order_by(ref.c.name).limit(_BESIDE))
    slips = wanted_names(connection, sorted(set(_slips(name))))
    parts.append(query.where(ref.c.name.in_(slips)))
    names = union_all(*(select(part.subquery().c.name) for part in parts))
    return list(dict.fromkeys(connection.scalars(names)))


def _slips(name: str) -> Iterator[str]:
    """Yield the texts of which `name` is a misspelling in one place, or in its case."""
    yield name.lower()
    for i in range(len(name) + 1):
        before, after = name[:i], name[i:]
        yield from (before + letter + after for letter in _LETTERS)
        if after:
            yield before + after[1:]
            yield from (before + letter + after[1:] for letter in _LETTERS)
            yield before + after[1:2] + after[:1] + after[2:]
