"""The rows of a finished save: packs, plan, the tree of its entries, tensors with their chunks.

Runs inside the transaction that makes a version visible, usually before the repository is locked:
`saves` says why what is found here is still there at the commit. Invariants: only what the catalog
does not have is inserted, and the number of statements does not depend on the number of rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from sqlalchemy import Connection, bindparam, delete, insert, select, update

from dcpstore.catalog.db.bulk_insert import RowsOfTables, insert_new, insert_rows
from dcpstore.catalog.db.key_lists import wanted_ids, wanted_names
from dcpstore.catalog.read.dedup import known_tensors
from dcpstore.catalog.read.entries import chunk_starts
from dcpstore.catalog.schema import tables
from dcpstore.catalog.schema.tables import layout_digest
from dcpstore.catalog.validation import check_key, check_text
from dcpstore.catalog.write.forget import forget_chunks, forget_runs
from dcpstore.catalog.write.nodes import dictionary, known_nodes, write_trees
from dcpstore.catalog.write.operations import lock_repository
from dcpstore.catalog.write.stale import mark_holders_stale
from dcpstore.core.digests import RUN, run_digest
from dcpstore.errors import ConflictError
from dcpstore.formats.entry_tree import EntryTree, grow
from dcpstore.records import NewChunk, NewTensor, PackRecord, PlanRecord, VersionContent

__all__ = ["write_content", "write_nodes", "write_plan"]


class _Unit(NamedTuple):
    """A row of `tensor`: a tensor with its layout, or a run, which has none.

    A tensor of more than `RUN` chunks has none of its own, but `runs`, by their digests.
    """

    digest: str
    layout: bytes | None
    chunks: Sequence[tuple[int, NewChunk]]  # each with its number in the tensor or run
    runs: Sequence[str] = ()


def write_content(connection: Connection, version: int, content: VersionContent) -> int:
    """Write the packs, tensors and entries of the version of id `version`.

    Returns the id of the root of its tree.

    Raises:
        ConflictError: a chunk that the save reuses is condemned or deleted.
        InvalidInputError: an FQN or a value is one that some database cannot store.
    """
    tree = content.tree or grow(content.entries)
    known = known_nodes(connection, [tree])
    return write_nodes(connection, version, content, [tree], known)[tree.root.digest]


def write_nodes(
    connection: Connection,
    version: int,
    content: VersionContent,
    trees: Sequence[EntryTree],
    known: Mapping[bytes, int],
) -> dict[bytes, int]:
    """Write the nodes of trees that are not known, and what they need; as `write_content`.

    Returns the ids of the nodes by digest. The entries of `content` are not looked at; it has the
    tensors of all new nodes that the catalog does not have.

    Raises:
        ConflictError: a chunk that the save reuses is condemned or deleted.
    """
    sets = [one for tree in trees for one in tree.sets if one.digest not in known]
    named = {
        entry.tensor_digest
        for one in sets
        for entry in one.entries
        if entry.tensor_digest is not None
    }
    for entry in (entry for one in sets for entry in one.entries):
        check_key(entry.fqn, what="FQN")
        if entry.value is not None:
            check_text(entry.value, what=f"value of {entry.fqn!r}")
    named |= set(content.aliases.values())
    last = RowsOfTables()
    packs = _write_packs(connection, version, content.packs, last)
    tensors = _write_tensors(connection, content.tensors, named, packs, last)
    _write_aliases(connection, content.aliases, tensors)
    nodes = write_trees(connection, trees, known, tensors, last)
    last.insert(connection)
    return nodes


def write_plan(connection: Connection, plan: PlanRecord) -> int:
    """Return the id of a plan; if its digest is new, write it with its shards."""
    table = tables.plan
    found = connection.scalar(select(table.c.id).where(table.c.digest == plan.digest))
    if found is not None:
        return int(found)
    new = connection.execute(
        insert(table)
        .values(digest=plan.digest, algorithm=plan.algorithm, ranks=plan.ranks)
        .returning(table.c.id)
    ).scalar_one()
    # A rank may hold several boxes of one tensor; the ordinal keeps their order.
    seen: dict[tuple[str, int], int] = {}
    rows = []
    for shard in plan.shards:
        ordinal = seen[shard.fqn, shard.rank] = seen.get((shard.fqn, shard.rank), -1) + 1
        rows.append((new, shard.fqn, shard.rank, ordinal, shard.box.offsets, shard.box.sizes))
    insert_rows(
        connection, tables.shard, ("plan", "fqn", "rank", "ordinal", "offsets", "sizes"), rows
    )
    return int(new)


def _write_packs(
    connection: Connection, version: int, packs: Sequence[PackRecord], last: RowsOfTables
) -> dict[str, int]:
    """Insert the packs that a save wrote; return their ids by key."""
    if not packs:
        return {}
    table = tables.pack
    rows = connection.execute(
        insert(table).returning(table.c.key, table.c.id),
        [
            {"key": pack.key, "nbytes": pack.nbytes, "version": version, "status": "live"}
            for pack in packs
        ],
    )
    ids: dict[str, int] = dict(rows.all())
    # Some of their chunks may be unused, if another save wrote the same ones at the same time.
    last.add(tables.unjudged, ("pack",), [(held,) for held in ids.values()])
    return ids


def _write_tensors(
    connection: Connection,
    tensors: Sequence[NewTensor],
    named: Collection[str],
    packs: Mapping[str, int],
    last: RowsOfTables,
) -> dict[str, int]:
    """Insert the tensors that are new, and move those whose packs are lost.

    Args:
        connection: in the transaction that commits the version.
        tensors: that the save hands over.
        named: the digests of those that new entries name.
        packs: of the save, by key.
        last: takes the rows to which none refer.

    Returns:
        the ids of all these tensors by digest.
    """
    given = {tensor.digest: tensor for tensor in tensors}
    wanted = {*given, *named}
    # Each known tensor with whether it lies in live packs. One that does not is moved, if the save
    # brings its chunks; otherwise it is lost, like one that the save expected and that is not here.
    known = known_tensors(connection, wanted)
    written = [
        tensor
        for digest, tensor in given.items()
        if digest not in known or (not known[digest][1] and tensor.chunks)
    ]
    lost = {digest for digest in wanted if digest not in known or not known[digest][1]}
    lost -= {t.digest for t in written if t.chunks or not chunk_starts(tuple(t.parts))[-1]}
    if lost:
        raise ConflictError(
            f"{len(lost)} tensors that the save found in the repository have been condemned or "
            f"deleted since (content {min(lost)}). Save again."
        )
    layouts = _write_layouts(connection, written)
    units = {unit.digest: unit for tensor in written for unit in _units(tensor)}
    runs = {digest for digest, unit in units.items() if unit.layout is None}
    known |= known_tensors(connection, runs - known.keys())  # that other tensors have
    ids = {digest: found for digest, (found, _) in known.items()}
    moved = {
        ids[digest]: unit
        for digest, unit in units.items()
        if digest in known and not known[digest][1]
    }
    if moved:  # rows that other versions have too are changed under the lock only
        lock_repository(connection)
    old_runs = _forget_places(connection, moved, layouts)
    new = insert_new(
        connection,
        tables.tensor,
        ("digest", "layout"),
        [
            (bytes.fromhex(digest), layout and layouts[layout])
            for digest in sorted(units.keys() - known.keys())
            for layout in [units[digest].layout]
        ],
    )
    ids |= {digest.hex(): found for digest, found in new.items()}
    if raced := units.keys() - ids.keys():  # another transaction has inserted them meanwhile
        ids |= {digest: found for digest, (found, _) in known_tensors(connection, raced).items()}
    # Also for known tensors: the manifest, which was written before, names the places in `chunks`.
    packs = {**packs, **_reused_packs(connection, tensors, packs)}
    placed = moved | {held: units[digest.hex()] for digest, held in new.items()}
    last.add(
        tables.run,
        ("tensor", "ordinal", "run"),
        (
            (held, ordinal, ids[digest])
            for held, unit in placed.items()
            for ordinal, digest in enumerate(unit.runs)
        ),
    )
    last.add(
        tables.chunk,
        ("tensor", "ordinal", "digest", "pack", "offset", "length", "checksum"),
        (
            (held, ordinal, c.digest, packs[c.pack], c.offset, c.length, c.checksum)
            for held, unit in placed.items()
            for ordinal, c in unit.chunks
        ),
    )
    if old_runs:
        last.insert(connection)  # of which the tensors that moved may still have some
        forget_runs(connection, old_runs)
    return ids


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


def _write_layouts(connection: Connection, tensors: Sequence[NewTensor]) -> dict[bytes, int]:
    """Return the ids of the tensors' layouts by digest; insert those that are new."""
    rows = {}
    for t in tensors:
        digest, parts = _layout_of(t), tuple(t.parts)
        rows[digest] = (digest, t.algorithm, t.dtype, t.shape, t.codec, t.nbytes, parts)
    names = ("digest", "algorithm", "dtype", "shape", "codec", "nbytes", "parts")
    return dictionary(connection, tables.layout, names, rows)


def _write_aliases(
    connection: Connection, aliases: Mapping[str, str], tensors: Mapping[str, int]
) -> None:
    rows = sorted((bytes.fromhex(digest), tensors[stored]) for digest, stored in aliases.items())
    insert_new(connection, tables.alias, ("digest", "tensor"), rows, returning="tensor")


def _forget_places(
    connection: Connection, moved: Mapping[int, _Unit], layouts: Mapping[bytes, int]
) -> set[int]:
    """Delete the chunks of known tensors and runs whose packs are condemned or damaged.

    The save has written or found these chunks elsewhere, perhaps with another codec. Returns the
    ids of the runs that the tensors had.
    """
    if not moved:
        return set()
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


def _reused_packs(
    connection: Connection, tensors: Sequence[NewTensor], new: Mapping[str, int]
) -> dict[str, int]:
    """Return the ids of the older packs in which chunks of `tensors` lie, by key."""
    keys = {chunk.pack for tensor in tensors for chunk in tensor.chunks} - new.keys()
    if not keys:
        return {}
    pack = tables.pack
    rows = connection.execute(
        select(pack.c.key, pack.c.id).where(
            pack.c.key.in_(wanted_names(connection, keys)),
            pack.c.status == "live",
            pack.c.damage.is_(None),
        )
    )
    ids: dict[str, int] = dict(rows.all())
    if gone := keys - ids.keys():
        raise ConflictError(
            f"{len(gone)} packs from which the save reuses chunks have been condemned or deleted "
            f"since ({min(gone)}). Save again."
        )
    return ids
