"""The rows of a finished save: packs, plan, the tree of its entries, tensors with their chunks.

Runs inside the transaction that makes a version visible, usually before the repository is locked:
`saves` says why what is found here is still there at the commit. Invariants: only what the catalog
does not have is inserted, and the number of statements does not depend on the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from types import MappingProxyType
from typing import NamedTuple

from sqlalchemy import Connection, bindparam, delete, update

from dcpstore.catalog.db.bulk_insert import RowsOfTables, insert_unknown
from dcpstore.catalog.db.key_lists import wanted_ids
from dcpstore.catalog.read.entries import chunk_starts
from dcpstore.catalog.schema import tables
from dcpstore.catalog.schema.tables import fqn_digest, layout_digest
from dcpstore.catalog.validation import check_key, check_text
from dcpstore.catalog.write.forget import forget_chunks, forget_runs
from dcpstore.catalog.write.nodes import add_nodes, levels_of
from dcpstore.catalog.write.operations import lock_repository
from dcpstore.catalog.write.pages import add_pages, objects_error, place_objects
from dcpstore.catalog.write.row_ids import RowIds, find_ids
from dcpstore.catalog.write.stale import mark_holders_stale
from dcpstore.core.digests import RUN, run_digest
from dcpstore.errors import ConflictError
from dcpstore.formats.entry_tree import EntryTree, grow
from dcpstore.records import (
    NewChunk,
    NewTensor,
    PackRecord,
    PlanRecord,
    VersionContent,
    VersionObjects,
)

__all__ = ["Written", "write_content", "write_nodes", "write_plan"]


class _Unit(NamedTuple):
    """A row of `tensor`: a tensor with its layout, or a run, which has none.

    A tensor of more than `RUN` chunks has none of its own, but `runs`, by their digests.
    """

    digest: str
    layout: bytes | None
    chunks: Sequence[tuple[int, NewChunk]]  # each with its number in the tensor or run
    runs: Sequence[str] = ()


class Written(NamedTuple):
    """What the row of a version refers to, by id: its plan, and the root of its tree."""

    plan: int
    root: int


class _Ids(NamedTuple):
    """The ids of the rows that a version has or names, of each table."""

    page: RowIds
    plan: RowIds
    pack: RowIds
    layout: RowIds
    tensor: RowIds  # runs too
    fqn: RowIds
    node: RowIds


def write_content(connection: Connection, version: int, content: VersionContent) -> Written:
    """Write the plan, packs, pages, tensors and entries of the version of id `version`.

    Raises:
        ConflictError: a chunk that the save reuses is condemned or deleted, or what its manifest
            names is gone, or lies in the page of another save.
        InvalidInputError: an FQN or a value is one that some database cannot store.
    """
    tree = content.tree or grow(content.entries)
    ids = _write(connection, version, content, [tree], plan=content.plan)
    return Written(ids.plan[content.plan.digest], ids.node[tree.root.digest])


def write_nodes(
    connection: Connection,
    content: VersionContent,
    trees: Sequence[EntryTree],
    known: Mapping[bytes, int],
) -> dict[bytes, int]:
    """Write the nodes of trees that are not known, and what they need; as `write_content`.

    Returns the ids of the nodes by digest. The entries, plan and objects of `content` are not
    looked at; it has the tensors of all new nodes that the catalog does not have, and no packs.

    Raises:
        ConflictError: a chunk that the save reuses is condemned or deleted.
    """
    ids = _write(connection, 0, replace(content, objects=None), trees, known=known)
    return {**ids.node.known, **ids.node.new}


def write_plan(connection: Connection, plan: PlanRecord) -> int:
    """Return the id of a plan; if its digest is new, write it with its shards."""
    (plans,) = find_ids(connection, [(tables.plan, [plan.digest])])
    last = RowsOfTables()
    _add_plan(last, plan, plans, page=None)
    last.insert(connection)
    return plans[plan.digest]


def _write(
    connection: Connection,
    version: int,
    content: VersionContent,
    trees: Sequence[EntryTree],
    *,
    plan: PlanRecord | None = None,
    known: Mapping[bytes, int] = MappingProxyType({}),
) -> _Ids:
    """Write what is new of trees and of a plan, with all that they need.

    One statement looks everything up, and the rows that are new are sent together.
    """
    objects = content.objects
    levels = {held: level for held, level in levels_of(trees).items() if held not in known}
    of_others: set[bytes] = set()
    if objects is not None:  # it has each node that is new, and those that these name
        own = {page.key for page in objects.written}
        levels = {held: level for held, level in levels.items() if objects.nodes.get(held) in own}
        of_others = objects.nodes.keys() - levels.keys()
    sets = {one.digest: one for tree in trees for one in tree.sets if one.digest in levels}
    entries = [entry for one in sets.values() for entry in one.entries]
    for entry in entries:
        check_key(entry.fqn, what="FQN")
        if entry.value is not None:
            check_text(entry.value, what=f"value of {entry.fqn!r}")
    units = {tensor.digest: [*_units(tensor)] for tensor in content.tensors}
    named = {entry.tensor_digest for entry in entries if entry.tensor_digest is not None}
    named |= units.keys() | set(content.aliases.values())
    of_runs = {unit.digest for some in units.values() for unit in some}
    new_packs = {pack.key for pack in content.packs}
    old_packs = {c.pack for tensor in content.tensors for c in tensor.chunks} - new_packs
    ids = _Ids(
        *find_ids(
            connection,
            [
                (tables.page, [] if objects is None else [page.key for page in objects.written]),
                (tables.plan, [] if plan is None else [plan.digest]),
                (tables.pack, new_packs | old_packs),
                (tables.layout, {_layout_of(tensor) for tensor in content.tensors}),
                (tables.tensor, {bytes.fromhex(digest) for digest in named | of_runs}),
                (tables.fqn, {fqn_digest(entry.fqn, entry.path) for entry in entries}),
                (tables.node, levels.keys() | of_others),
            ],
        )
    )
    ids.node.known.update(known)
    # Each known tensor has whether it lies in live packs. One that does not is moved, if the save
    # brings its chunks; otherwise it is lost, like one that the save expected and that is not here.
    lost = {digest for digest in named if not ids.tensor.is_live(bytes.fromhex(digest))}
    written = [tensor for tensor in content.tensors if _is_written(tensor, ids.tensor)]
    lost -= {t.digest for t in written if t.chunks or not chunk_starts(tuple(t.parts))[-1]}
    if lost:
        raise ConflictError(
            f"{len(lost)} tensors that the save found in the repository have been condemned or "
            f"deleted since (content {min(lost)}). Save again."
        )
    # Also for known tensors: the manifest, which was written before, names the places in `chunks`.
    if gone := {key for key in old_packs if not ids.pack.is_live(key)}:
        raise ConflictError(
            f"{len(gone)} packs from which the save reuses chunks have been condemned or deleted "
            f"since ({min(gone)}). Save again."
        )
    if of_others & ids.node.new.keys():
        raise objects_error()
    last = RowsOfTables()
    _add_packs(last, version, content.packs, ids.pack)
    if objects is not None:
        add_pages(last, version, objects.written, ids.page)
    if plan is not None:
        page = None if objects is None else ids.page.new.get(objects.plan)
        _add_plan(last, plan, ids.plan, page=page)
    pages = {} if objects is None else {**objects.nodes, **objects.runs}
    homes = {held: ids.page.new.get(key) for held, key in pages.items()}
    placed = {unit.digest: unit for tensor in written for unit in units[tensor.digest]}
    _add_tensors(last, written, placed, ids, homes)
    old_runs = _move(connection, placed, ids, last)
    _add_chunks(last, placed, ids)
    add_nodes(last, trees, levels, ids.node, fqns=ids.fqn, tensors=ids.tensor, homes=homes)
    last.insert(connection)
    forget_runs(connection, old_runs)  # of which the tensors that moved may still have some
    _write_aliases(connection, content.aliases, ids.tensor)
    if objects is not None and plan is not None and not _are_placed(objects, plan, ids):
        place_objects(connection, ids.page.new, objects, plan=ids.plan[plan.digest])
    return ids


def _is_written(tensor: NewTensor, ids: RowIds) -> bool:
    """Tell whether rows of a tensor are to be written: it is new, or its chunks have moved."""
    digest = bytes.fromhex(tensor.digest)
    return digest in ids.new or (not ids.is_live(digest) and bool(tensor.chunks))


def _are_placed(objects: VersionObjects, plan: PlanRecord, ids: _Ids) -> bool:
    """Tell whether all lies in the objects in which the manifest looks for it, by what was found.

    New rows were inserted with their pages. Of known runs nothing was found.
    """
    new = ids.page.new
    places: list[tuple[RowIds, bytes | str, str]] = [
        (ids.plan, plan.digest, objects.plan),
        *((ids.node, held, key) for held, key in objects.nodes.items()),
        *((ids.tensor, held, key) for held, key in objects.runs.items()),
    ]
    return all(
        key in new if held in found.new else found.notes.get(held) == key
        for found, held, key in places
    )


def _add_plan(last: RowsOfTables, plan: PlanRecord, ids: RowIds, *, page: int | None) -> None:
    held = ids.new.get(plan.digest)
    if held is None:
        return
    row = (held, plan.digest, plan.algorithm, plan.ranks, page)
    last.add(tables.plan, ("id", "digest", "algorithm", "ranks", "page"), [row])
    # A rank may hold several boxes of one tensor; the ordinal keeps their order.
    seen: dict[tuple[str, int], int] = {}
    rows = []
    for shard in plan.shards:
        ordinal = seen[shard.fqn, shard.rank] = seen.get((shard.fqn, shard.rank), -1) + 1
        rows.append((held, shard.fqn, shard.rank, ordinal, shard.box.offsets, shard.box.sizes))
    last.add(tables.shard, ("plan", "fqn", "rank", "ordinal", "offsets", "sizes"), rows)


def _add_packs(last: RowsOfTables, version: int, packs: Sequence[PackRecord], ids: RowIds) -> None:
    """Add the packs that a save wrote."""
    last.add(
        tables.pack,
        ("id", "key", "nbytes", "version", "status"),
        [(ids.new[pack.key], pack.key, pack.nbytes, version, "live") for pack in packs],
    )
    # Some of their chunks may be unused, if another save wrote the same ones at the same time.
    last.add(tables.unjudged, ("pack",), [(ids.new[pack.key],) for pack in packs])


def _add_tensors(
    last: RowsOfTables,
    written: Sequence[NewTensor],
    placed: Mapping[str, _Unit],
    ids: _Ids,
    homes: Mapping[bytes, int | None],
) -> None:
    """Add new tensors and runs with their layouts; `homes` are the pages of runs, by id."""
    layouts = {_layout_of(t): t for t in written}
    last.add(
        tables.layout,
        ("id", "digest", "algorithm", "dtype", "shape", "codec", "nbytes", "parts"),
        [
            (held, digest, t.algorithm, t.dtype, t.shape, t.codec, t.nbytes, tuple(t.parts))
            for digest, held in ids.layout.new.items()
            if (t := layouts.get(digest)) is not None
        ],
    )
    last.add(
        tables.tensor,
        ("id", "digest", "layout", "page"),
        [
            (held, digest, unit.layout and ids.layout[unit.layout], homes.get(digest))
            for digest, held in ids.tensor.new.items()
            if (unit := placed.get(digest.hex())) is not None
        ],
    )


def _move(
    connection: Connection, placed: Mapping[str, _Unit], ids: _Ids, last: RowsOfTables
) -> set[int]:
    """Forget where known tensors and runs lie whose packs are lost; return the runs they had."""
    found = ((bytes.fromhex(unit.digest), unit) for unit in placed.values())
    moved = {
        ids.tensor.known[digest]: unit
        for digest, unit in found
        if digest in ids.tensor.known and not ids.tensor.is_live(digest)
    }
    if not moved:
        return set()
    lock_repository(connection)  # rows that other versions have too are changed under the lock only
    last.insert(connection)  # layouts
    return _forget_places(connection, moved, ids.layout)


def _add_chunks(last: RowsOfTables, placed: Mapping[str, _Unit], ids: _Ids) -> None:
    """Add the runs and chunks of all units but those that are known and live."""
    own = [
        (ids.tensor[digest], unit)
        for unit in placed.values()
        for digest in [bytes.fromhex(unit.digest)]
        if not ids.tensor.is_live(digest)
    ]
    last.add(
        tables.run,
        ("tensor", "ordinal", "run"),
        (
            (held, ordinal, ids.tensor[bytes.fromhex(run)])
            for held, unit in own
            for ordinal, run in enumerate(unit.runs)
        ),
    )
    last.add(
        tables.chunk,
        ("tensor", "ordinal", "digest", "pack", "offset", "length", "checksum"),
        (
            (held, ordinal, c.digest, ids.pack[c.pack], c.offset, c.length, c.checksum)
            for held, unit in own
            for ordinal, c in unit.chunks
        ),
    )


def _units(tensor: NewTensor) -> Iterator[_Unit]:
    """Yield the rows of a tensor: its own, and those of its runs."""
    layout = _layout_of(tensor)
    starts = chunk_starts(tuple(tensor.parts))
    placed = [(starts[chunk.part] + chunk.ordinal, chunk) for chunk in tensor.chunks]
    if starts[-1] <= RUN:
        yield _Unit(tensor.digest, layout, placed)
        return
    runs = []
    left = iter(sorted(placed, key=lambda one: one[0]))
    while some := list(islice(left, RUN)):
        chunks = [(ordinal % RUN, chunk) for ordinal, chunk in some]
        digests = [chunk.digest for _, chunk in chunks]
        runs.append(run_digest(tensor.codec, digests, algorithm=tensor.algorithm).hex())
        yield _Unit(runs[-1], None, chunks)
    yield _Unit(tensor.digest, layout, (), runs)


def _layout_of(tensor: NewTensor) -> bytes:
    shape, parts = tuple(tensor.shape), tuple(tensor.parts)
    return layout_digest(tensor.algorithm, tensor.dtype, shape, tensor.codec, parts)


def _write_aliases(connection: Connection, aliases: Mapping[str, str], ids: RowIds) -> None:
    rows = sorted(
        (bytes.fromhex(digest), ids[bytes.fromhex(held)]) for digest, held in aliases.items()
    )
    insert_unknown(connection, tables.alias, ("digest", "tensor"), rows)


def _forget_places(connection: Connection, moved: Mapping[int, _Unit], layouts: RowIds) -> set[int]:
    """Delete the chunks of known tensors and runs whose packs are condemned or damaged.

    The save has written or found these chunks elsewhere, perhaps with another codec. Returns the
    ids of the runs that the tensors had.
    """
    mark_holders_stale(connection, moved.keys())
    forget_chunks(connection, moved.keys())
    run, tensor = tables.run, tables.tensor
    runs = connection.scalars(
        delete(run)
        .where(run.c.tensor.in_(wanted_ids(connection, moved.keys())))
        .returning(run.c.run)
    )
    old_runs = set(runs)
    if changed := [
        {"held": held, "new": layouts[unit.layout]} for held, unit in moved.items() if unit.layout
    ]:
        connection.execute(
            update(tensor).where(tensor.c.id == bindparam("held")).values(layout=bindparam("new")),
            changed,
        )
    return old_runs
