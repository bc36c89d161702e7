"""What a ref means: a name is a branch or a tag, never both, and a ref names one version."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection, ScalarSelect, Select, case, exists, select, union_all

from dcpstore.catalog.db.key_lists import wanted_names
from dcpstore.catalog.db.transactions import OpenCatalog, reads, reads_once
from dcpstore.catalog.read.known_names import refs_like
from dcpstore.catalog.read.versions import (
    ancestor_at,
    ancestors_at,
    depth_of,
    expired_error,
    find_version,
    id_of_number,
    is_visible,
    load_version,
)
from dcpstore.catalog.schema import tables
from dcpstore.core.display import counted
from dcpstore.core.syntax import Ref, parse_ref
from dcpstore.errors import InvalidInputError, NotFoundError
from dcpstore.records import RefLike, RefRecord, SentRef, Version, VersionRef

__all__ = [
    "DEFAULT_BRANCH",
    "RefKind",
    "RefRow",
    "find_ref",
    "find_refs",
    "id_of_ref",
    "list_refs",
    "refs_of",
    "resolve",
]

DEFAULT_BRANCH = "main"
_SHOWN = 10  # versions that one message names
_BESIDE = 20  # versions on each side of an absent step among which the nearest is looked for
_NEWEST = {"current", "head", "last", "latest", "newest", "tip"}  # what other tools call a tip
RefKind = Literal["branch", "tag"]


class RefRow(NamedTuple):
    """A ref with the id and the number of its version."""

    name: str
    kind: RefKind
    id: int
    number: int


def resolve(on: Connection | OpenCatalog, ref: RefLike | SentRef | None) -> Version:
    """Return the version that `ref` means; None is the tip of the default branch.

    A `Version` is found by its uid, because its number is that of another version elsewhere. A ref
    that is the name or number of a version, or a `Version`, is found by one query.

    Raises:
        InvalidInputError: `ref` breaks the grammar.
        NotFoundError: there is no such version, name or uid, or it has too few ancestors; or `ref`
            is a `Version` of another repository.
    """
    key = id_of_ref(ref)
    found = None if key is None else find_version(on, key)
    return _search(on, ref) if found is None else found


def id_of_ref(ref: RefLike | SentRef | None) -> ScalarSelect[int] | None:
    """Return a query of the id of the version that a ref means; None if it takes several queries.

    It finds nothing for a name or number that may be the first digits of a uid, and finds expired
    versions too: then `resolve` says what the ref means, or what is wrong with it.

    Raises:
        InvalidInputError: `ref` breaks the grammar.
    """
    version, names = tables.version, tables.ref
    if isinstance(ref, Version | VersionRef):
        by_uid = version.c.uid == ref.uid, version.c.number.is_not(None)
        return select(version.c.id).where(*by_uid).scalar_subquery()
    parsed = _parsed(ref)
    if parsed.up or parsed.step is not None:
        return None
    if parsed.name is not None:
        return select(names.c.version).where(names.c.name == parsed.name).scalar_subquery()
    if parsed.number is not None:
        return select(version.c.id).where(version.c.number == parsed.number).scalar_subquery()
    return None


def _parsed(ref: RefLike | None) -> Ref:
    return Ref(name=DEFAULT_BRANCH) if ref is None else parse_ref(ref)


@reads
def _search(connection: Connection, ref: RefLike | SentRef | None) -> Version:
    """Return the version that a ref means, or raise the error that says why there is none."""
    if isinstance(ref, Version | VersionRef):
        return load_version(connection, _id_of_version(connection, ref))
    parsed = _parsed(ref)
    found = _start(connection, parsed)
    if parsed.up:
        found = _up(connection, found, parsed)
    if parsed.step is not None:
        found = _at_step(connection, found, parsed)
    version = tables.version
    number, expired_at, plan = connection.execute(
        select(version.c.number, version.c.expired_at, version.c.plan).where(version.c.id == found)
    ).one()
    if expired_at is not None:  # `~n` led to an ancestor of which only the row is kept
        raise expired_error(number, expired_at, plan)
    return load_version(connection, found)


@reads_once
def find_refs(connection: Connection, names: Collection[str]) -> dict[str, RefRow]:
    """Return the branches and tags of these names, by name.

    Raises:
        InvalidInputError: a name is not text.
    """
    for name in names:
        if not isinstance(name, str):
            raise InvalidInputError(f"{name!r} is not the name of a branch or tag; give a string.")
    wanted = wanted_names(connection, names)
    rows = connection.execute(_rows().where(tables.ref.c.name.in_(wanted)))
    return {row.name: RefRow(*row) for row in rows}


def find_ref(connection: Connection, name: str, kind: RefKind) -> RefRow:
    """Return a ref of one kind.

    Raises:
        NotFoundError: there is none; the message has the nearest names.
    """
    found = find_refs(connection, [name]).get(name)
    if found is not None and found.kind == kind:
        return found
    if found is not None:
        raise NotFoundError(f"no {kind} {name!r}: it is a {found.kind}. See 'dcpstore {kind}'.")
    known = refs_like(connection, name, kind)
    raise NotFoundError.near(kind, name, known, f"See 'dcpstore {kind}' for all of them.")


@reads_once
def list_refs(connection: Connection, kind: RefKind | None = None) -> list[RefRecord]:
    """Return all branches and tags, or those of one kind, sorted by name."""
    query = _rows().order_by(tables.ref.c.name)
    if kind is not None:
        query = query.where(tables.ref.c.kind == kind)
    rows = connection.execute(query)
    return [RefRecord(row.name, row.kind, row.number) for row in rows]


def refs_of(connection: Connection, versions: Select[Any]) -> list[RefRow]:
    """Return the refs of the versions whose ids a query returns, sorted by name."""
    query = _rows().where(tables.ref.c.version.in_(versions)).order_by(tables.ref.c.name)
    return [RefRow(*row) for row in connection.execute(query)]


def _find_uid(connection: Connection, prefix: str) -> int | None:
    """Return the id of the version whose uid begins with these lower-case hex digits, or None.

    Raises:
        InvalidInputError: several do; the message lists them.
        NotFoundError: it was expired.
    """
    version = tables.version
    rows = connection.execute(
        select(version.c.id, version.c.uid, version.c.number, version.c.expired_at, version.c.plan)
        # "g" sorts after every hex digit; a range uses the index, which LIKE does not.
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
        raise expired_error(rows[0].number, rows[0].expired_at, rows[0].plan)
    return rows[0].id if rows else None


def _id_of_version(connection: Connection, ref: Version | VersionRef) -> int:
    """Return the id of the version that a `Version` is.

    Raises:
        NotFoundError: it is of another repository, or it was expired.
    """
    version = tables.version
    found = connection.execute(
        select(version.c.id, version.c.number, version.c.expired_at, version.c.plan).where(
            version.c.uid == ref.uid, version.c.number.is_not(None)
        )
    ).one_or_none()
    if found is None:
        raise NotFoundError(
            f"{ref} with the uid {ref.uid} is a version of another repository; this one has none "
            "with that uid. Pass a version of this repository, or copy that one here with "
            "'dcpstore copy'."
        )
    if found.expired_at is not None:
        raise expired_error(found.number, found.expired_at, found.plan)
    return int(found.id)


def _rows() -> Select[Any]:
    ref, version = tables.ref, tables.version
    return select(ref.c.name, ref.c.kind, version.c.id, version.c.number).join(
        version, version.c.id == ref.c.version
    )


def _start(connection: Connection, ref: Ref) -> int:
    """Return the id of the version where a ref begins."""
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
    known = refs_like(connection, ref.name)
    if not known and connection.scalar(select(exists().where(is_visible()))):
        raise NotFoundError(
            f"no branch or tag {ref.name!r}: the repository has versions, but none has a name. See "
            "'dcpstore log' for their numbers, and create a branch with 'dcpstore branch --at'."
        )
    if not known:
        raise NotFoundError(
            f"no branch or tag {ref.name!r}: the repository is empty. Save a version first."
        )
    branch = _likely_branch(connection) if ref.name.lower() in _NEWEST else None
    if branch is not None:
        raise NotFoundError(
            f"no branch or tag {ref.name!r}: the newest version of a branch is the branch's name: "
            f"{branch!r}. See 'dcpstore branch' for all branches."
        )
    raise NotFoundError.near(
        "branch or tag", ref.name, known, "See 'dcpstore tag' and 'dcpstore branch' for all names."
    )


def _likely_branch(connection: Connection) -> str | None:
    """Return the default branch if it is there, else the first branch, or None without any."""
    ref = tables.ref
    found: str | None = connection.scalar(
        select(ref.c.name)
        .where(ref.c.kind == "branch")
        .order_by(case((ref.c.name == DEFAULT_BRANCH, 0), else_=1), ref.c.name)
        .limit(1)
    )
    return found


def _is_number(connection: Connection, number: int | None) -> bool:
    """Tell whether a version has or had this number, which then comes before a uid."""
    version = tables.version
    return number is not None and bool(
        connection.scalar(select(exists().where(version.c.number == number)))
    )


def _up(connection: Connection, start: int, ref: Ref) -> int:
    """Return the id of the ancestor that `~n` means."""
    depth = depth_of(connection, start)
    if depth < ref.up:
        start_name = str(replace(ref, up=0, step=None))
        raise NotFoundError(
            f"no version {str(ref)!r}: {start_name} has {counted(depth, 'ancestor')}. "
            "See 'dcpstore log' for the history."
        )
    return ancestor_at(connection, start, depth - ref.up)


def _at_step(connection: Connection, start: int, ref: Ref) -> int:
    """Return the id of the newest version with the wanted step among `start` and its ancestors."""
    version = tables.version
    lineage = select(version.c.id, version.c.depth, version.c.step).where(is_visible())
    # The newest of one line of history has the greatest number. Most steps occur once.
    same = connection.execute(
        lineage.where(version.c.step == ref.step).order_by(version.c.number.desc())
    ).all()
    line = ancestors_at(connection, start, {row.depth for row in same}) if same else set()
    for row in same:
        if row.id in line:
            return int(row.id)
    below = lineage.where(version.c.step < ref.step).order_by(version.c.step.desc())
    above = lineage.where(version.c.step > ref.step).order_by(version.c.step)
    near = connection.execute(
        union_all(*(select(side.limit(_BESIDE).subquery()) for side in (below, above)))
    ).all()
    line = ancestors_at(connection, start, {row.depth for row in near})
    steps = sorted(
        {row.step for row in near if row.id in line}, key=lambda step: abs(step - (ref.step or 0))
    )
    nearest = ", ".join(map(str, sorted(steps[:3])))
    hint = f"The nearest steps are {nearest}. " if nearest else ""
    raise NotFoundError(
        f"no version {str(ref)!r}: neither the start nor an ancestor has step {ref.step}. {hint}"
        "See 'dcpstore log' for the history."
    )
