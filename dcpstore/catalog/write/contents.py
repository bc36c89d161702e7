"""The rows of a finished save: packs, plan, tensors with parts and chunks, entries.

Runs inside the transaction that makes a version visible, after the repository was locked: a tensor
or pack that is found here cannot disappear before the commit. Invariant: the number of statements
does not depend on the number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, delete, insert, select, update

from dcpstore.catalog.db.bulk_insert import insert_rows
from dcpstore.catalog.db.key_lists import wanted_ids, wanted_names
from dcpstore.catalog.read.dedup import known_tensors
from dcpstore.catalog.schema import tables
from dcpstore.catalog.write.stale import mark_holders_stale
from dcpstore.errors import ConflictError
from dcpstore.records import NewEntry, NewTensor, PackRecord, PlanRecord, VersionContent

__all__ = ["write_content", "write_plan"]


def write_content(connection: Connection, version: int, content: VersionContent) -> None:
    """Write the packs, tensors and entries of the version of id `version`.

    Raises:
        ConflictError: a chunk that the save reuses is condemned or deleted.
    """
    packs = _write_packs(connection, version, content.packs)
    tensors = _write_tensors(connection, content.tensors, content.entries, packs)
    _write_aliases(connection, content.aliases, tensors)
    insert_rows(
        connection,
        tables.entry,
        ("version", "fqn", "path", "kind", "tensor", "value"),
        (
            (version, e.fqn, e.path, e.kind, e.tensor_digest and tensors[e.tensor_digest], e.value)
            for e in content.entries
        ),
    )


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
    connection: Connection, version: int, packs: Sequence[PackRecord]
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
    return dict(rows.all())


def _write_tensors(
    connection: Connection,
    tensors: Sequence[NewTensor],
    entries: Sequence[NewEntry],
    packs: Mapping[str, int],
) -> dict[str, int]:
    """Insert the tensors that are new; return the ids of all that the entries name, by digest."""
    given = {tensor.digest: tensor for tensor in tensors}
    named = {entry.tensor_digest for entry in entries if entry.tensor_digest is not None}
    # Each known tensor with whether it lies in live packs. One that does not is moved, if the save
    # brings its chunks; otherwise it is lost, like one that the save expected and that is not here.
    known = known_tensors(connection, given.keys() | named)
    new = [tensor for tensor in given.values() if tensor.digest not in known]
    moved = {
        known[tensor.digest][0]: tensor
        for tensor in given.values()
        if tensor.digest in known and not known[tensor.digest][1] and tensor.chunks
    }
    lost = {digest for digest, (found, live) in known.items() if not live and found not in moved}
    lost |= {t.digest for t in new if not t.chunks and any(part.size for part in t.parts)}
    lost |= named - known.keys() - given.keys()
    if lost:
        raise ConflictError(
            f"{len(lost)} tensors that the save found in the repository have been condemned or "
            f"deleted since (content {min(lost)}). Save again."
        )
    ids = {digest: found for digest, (found, _) in known.items()}
    ids |= _insert_tensors(connection, new)
    _forget_places(connection, moved)
    placed = new + list(moved.values())
    # Also for known tensors: the manifest, which was written before, names the places in `chunks`.
    packs = {**packs, **_reused_packs(connection, list(given.values()), packs)}
    insert_rows(
        connection,
        tables.chunk,
        ("tensor", "part", "ordinal", "digest", "pack", "offset", "length"),
        (
            (ids[tensor.digest], part, ordinal, digest, packs[pack], offset, length)
            for tensor in placed
            for part, ordinal, digest, pack, offset, length, _ in tensor.chunks
        ),
    )
    return ids


def _write_aliases(
    connection: Connection, aliases: Mapping[str, str], tensors: Mapping[str, int]
) -> None:
    if not aliases:
        return
    alias = tables.alias
    known = set(
        connection.scalars(
            select(alias.c.digest).where(
                alias.c.digest.in_(wanted_names(connection, aliases.keys()))
            )
        )
    )
    insert_rows(
        connection,
        alias,
        ("digest", "tensor"),
        ((digest, tensors[stored]) for digest, stored in aliases.items() if digest not in known),
    )


def _insert_tensors(connection: Connection, tensors: Sequence[NewTensor]) -> dict[str, int]:
    """Insert tensors and their parts; return their ids by digest."""
    if not tensors:
        return {}
    table = tables.tensor
    insert_rows(
        connection,
        table,
        ("digest", "algorithm", "dtype", "shape", "codec", "nbytes"),
        ((t.digest, t.algorithm, t.dtype, t.shape, t.codec, t.nbytes) for t in tensors),
    )
    wanted = wanted_names(connection, {tensor.digest for tensor in tensors})
    rows = connection.execute(select(table.c.digest, table.c.id).where(table.c.digest.in_(wanted)))
    ids: dict[str, int] = dict(rows.all())
    insert_rows(
        connection,
        tables.part,
        ("tensor", "part", "offsets", "shape", "chunk_shape"),
        (
            (ids[tensor.digest], number, part.offsets, part.shape, part.chunk_shape)
            for tensor in tensors
            for number, part in enumerate(tensor.parts)
        ),
    )
    return ids


def _forget_places(connection: Connection, moved: Mapping[int, NewTensor]) -> None:
    """Delete the chunks of known tensors whose packs are condemned or damaged.

    The save has written or found these chunks elsewhere, perhaps with another codec.
    """
    if not moved:
        return
    mark_holders_stale(connection, moved.keys())
    chunk, tensor = tables.chunk, tables.tensor
    connection.execute(
        delete(chunk).where(chunk.c.tensor.in_(wanted_ids(connection, moved.keys())))
    )
    codecs: dict[str, list[int]] = {}
    for tensor_id, content in moved.items():
        codecs.setdefault(content.codec, []).append(tensor_id)
    for codec, ids in codecs.items():
        connection.execute(
            update(tensor).where(tensor.c.id.in_(wanted_ids(connection, ids))).values(codec=codec)
        )


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
