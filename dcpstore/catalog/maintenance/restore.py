"""A catalog restored from the data folder, in one transaction.

The operations are replayed in their order: they give the versions with their facts, the refs and
the packs. The entries and tensors of a committed version come from its manifest and pages, and so
do packs that no operation names. A version without an intact manifest keeps its row, as an expired
one does, because parents and operations refer to it. Invariant: a node that versions share is read
and written once, so memory and time follow what changed between versions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

from sqlalchemy import Connection, bindparam, insert, select, update

from dcpstore.catalog.db.key_lists import wanted_names
from dcpstore.catalog.maintenance.journal import ChangedRef, changed_refs
from dcpstore.catalog.read.trees import with_runs
from dcpstore.catalog.read.versions import INFO, STATS
from dcpstore.catalog.schema import tables
from dcpstore.catalog.schema.tables import hex_start
from dcpstore.catalog.write.annotations import insert_labels, insert_metrics
from dcpstore.catalog.write.contents import write_nodes, write_plan
from dcpstore.catalog.write.forget import judge_again
from dcpstore.catalog.write.operations import Change, record
from dcpstore.catalog.write.pages import home
from dcpstore.catalog.write.stale import mark_objects_stale, new_mark
from dcpstore.errors import ConflictError
from dcpstore.formats.entry_tree import EntryTree
from dcpstore.formats.version import decode_info, decode_stats
from dcpstore.records import NewTensor, VersionContent

__all__ = ["Contents", "Restored", "StoredVersion", "restore"]

# JSON as it was read, and checked by `formats`; its values are of every kind, hence `Any`.
Json = Mapping[str, Any]

_version, _pack = tables.version, tables.pack


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredVersion:
    """What the data folder has of a version, without nodes that were restored before.

    Attributes:
        content: without entries; its tensors are those of `tree`, each with all its chunks.
        root: the digest of the root of its tree.
        tree: its nodes; None if its root was restored before.
        nodes, runs: the pages in which nodes and runs lie, by digest; none if the manifest is of
            format 1, which has no pages.
        plan: the key of the object that holds its plan; None if that is lost, or if it has none.
        sizes: the bytes of the pages of what was read, and of the plan, by key.
    """

    content: VersionContent
    root: bytes
    tree: EntryTree | None
    nodes: Mapping[bytes, str] = field(default_factory=dict)
    runs: Mapping[bytes, str] = field(default_factory=dict)
    plan: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)


class Contents(Protocol):
    """What the data folder holds besides its journal."""

    def version(self, uid: str, known: Collection[bytes]) -> StoredVersion | None:
        """Return what a version holds; None (and report why) if its manifest or a page is not
        intact.

        `known` are the digests of the nodes that were restored before.
        """

    def pack_size(self, key: str) -> int | None:
        """Return the length of a pack, or None where there is none."""

    def lose(self, uid: str, reason: str) -> None:
        """Report why a version is lost though its manifest is intact."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What came back, and what is lost; versions by number."""

    versions: list[int]
    lost: list[int]
    dropped_refs: list[str]


@dataclass(slots=True)
class _State:
    """The repository after the last operation that was replayed; versions by uid."""

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    expired: dict[str, datetime] = field(default_factory=dict)  # forgotten ones too
    forgotten: set[str] = field(default_factory=set)  # those that an undo can bring back
    refs: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    packs: dict[str, tuple[int, str]] = field(default_factory=dict)  # nbytes, uid of the writer
    condemned: dict[str, datetime] = field(default_factory=dict)
    nodes: dict[bytes, int] = field(default_factory=dict)  # ids of those that lie in a page
    pages: dict[str, int] = field(default_factory=dict)  # ids of the rows, by key


def restore(connection: Connection, operations: Iterable[Json], contents: Contents) -> Restored:
    """Fill the empty tables of a new catalog, whose repository row exists."""
    operations = list(operations)
    state = _replay(operations)
    ids = _write_versions(connection, state)
    _write_operations(connection, operations, ids)
    _write_packs(connection, state, ids)
    kept = [uid for uid in state.facts if uid not in state.expired]
    forgotten = [uid for uid in state.facts if uid in state.forgotten]
    lost = _fill_all(connection, kept, contents, state, ids)
    _fill_all(connection, forgotten, contents, state, ids)
    refs = _write_refs(connection, state, ids, set(lost))
    numbers = {uid: fact["number"] for uid, fact in state.facts.items()}
    if lost:
        # So that the next rebuild leaves these versions out too.
        by_number = sorted(lost, key=numbers.__getitem__)
        detail = {"versions": by_number, "rules": {"lost": True}}
        target = ",".join(f"v{numbers[uid]}" for uid in by_number)
        record(connection, Change("expire", target, detail=detail), author="")
    _record_undone(connection, operations, state, ids, refs)
    return Restored(
        versions=sorted(n for uid, n in numbers.items() if uid not in {*state.expired, *lost}),
        lost=sorted(numbers[uid] for uid in lost),
        dropped_refs=[name for name, uid in state.refs.items() if refs.get(name) != uid],
    )


def _replay(operations: Iterable[Json]) -> _State:
    state = _State()
    for entry in operations:
        at = datetime.fromisoformat(entry["created_at"])
        detail = entry["detail"] or {}
        if fact := entry.get("version"):
            _replay_fact(state, fact, detail.get("removed", {}))
        if entry["kind"] in ("expire", "forget"):
            state.expired.update(dict.fromkeys(detail["versions"], at))
            if entry["kind"] == "forget":
                state.forgotten.update(detail["versions"])
        elif entry["kind"] == "undo":
            for uid in detail.get("versions", ()):
                state.expired.pop(uid, None)
                state.forgotten.discard(uid)
        elif entry["kind"] == "gc":
            _replay_gc(state, detail, at)
        for change in changed_refs(entry):
            _replay_ref(state, change)
    state.refs = dict(sorted(state.refs.items()))
    state.packs = {key: pack for key, pack in state.packs.items() if pack[1] in state.facts}
    return state


def _replay_fact(state: _State, fact: Json, removed: Json) -> None:
    """Take over the facts of a version, without the metrics and labels that an undo removed."""
    if fact["uid"] not in state.facts:  # only its save has added packs of its own; later gc did
        for key, nbytes in fact["packs"]:
            state.packs.setdefault(key, (nbytes, fact["uid"]))
    kept = {
        what: {name: value for name, value in fact[what].items() if name not in names}
        for what, names in removed.items()
    }
    state.facts[fact["uid"]] = {**fact, **kept}


def _replay_gc(state: _State, detail: Json, at: datetime) -> None:
    for key, nbytes, uid in detail.get("added", ()):
        state.packs[key] = nbytes, uid
    state.condemned.update((key, at) for key in detail.get("condemned", ()) if key in state.packs)
    for key in detail.get("deleted", ()):
        state.packs.pop(key, None)
        state.condemned.pop(key, None)
    state.forgotten.difference_update(detail.get("dropped", ()))


def _replay_ref(state: _State, change: ChangedRef) -> None:
    if change.kind is not None:
        state.kinds[change.name] = change.kind
    if change.new is None:
        state.refs.pop(change.name, None)
    else:
        state.refs[change.name] = change.new["uid"]


def _write_versions(connection: Connection, state: _State) -> dict[str, int]:
    """Insert the rows of all versions, as expired until their entries are inserted; return ids."""
    facts = sorted(state.facts.values(), key=lambda fact: int(fact["number"]))
    now = datetime.now(UTC)
    rows = []
    metrics = []
    for fact in facts:
        info, stats = decode_info(fact), decode_stats(fact)
        metrics.append(info.metrics)
        rows.append(
            {
                **{name: getattr(info, name) for name in INFO},
                **{name: getattr(stats, name) for name in STATS},
                "number": fact["number"],
                "status": "expired",
                "wanted_tags": [],
                "started_at": datetime.fromisoformat(fact["started_at"]),
                "touched_at": stats.created_at,
                "expired_at": state.expired.get(info.uid, now),
            }
        )
    ids: dict[str, int] = {}
    if rows:
        new = insert(_version).returning(_version.c.uid, _version.c.id)
        ids = dict(connection.execute(new, rows).all())
        connection.execute(
            update(_version)
            .where(_version.c.id == bindparam("of"))
            .values({name: bindparam(f"new_{name}") for name in ("parent", "depth", "jump")}),
            list(_lineages(facts, ids)),
        )
    insert_labels(connection, {ids[row["uid"]]: row["labels"] for row in rows})
    for row, held in zip(rows, metrics, strict=True):
        insert_metrics(connection, ids[row["uid"]], held)
    last = max((int(fact["number"]) for fact in facts), default=0)
    connection.execute(update(tables.repository).values(last_version=last))
    return ids


def _lineages(facts: Iterable[Json], ids: Mapping[str, int]) -> Iterator[dict[str, int | None]]:
    """Yield parent, depth and jump of each version, as `read.versions` defines them."""
    depths: dict[int, int] = {}
    jumps: dict[int, int | None] = {}
    for fact in facts:  # by number, so that parents come first
        held, parent = ids[fact["uid"]], ids.get(fact["parent"])
        if parent not in depths:  # a damaged journal may name a later version
            parent = None
        depths[held] = 0 if parent is None else depths[parent] + 1
        jumps[held] = parent
        above = None if parent is None else jumps[parent]
        further = None if above is None else jumps[above]
        if (
            parent is not None
            and above is not None
            and further is not None
            and depths[parent] - depths[above] == depths[above] - depths[further]
        ):
            jumps[held] = further
        yield {
            "of": held,
            "new_parent": parent,
            "new_depth": depths[held],
            "new_jump": jumps[held],
        }


def _write_operations(
    connection: Connection, operations: list[Json], ids: Mapping[str, int]
) -> None:
    rows = [
        {
            "number": entry["operation"],
            **{name: entry[name] for name in ("kind", "target", "author", "detail")},
            **{name: entry[name] and ids.get(entry[name]["uid"]) for name in ("old", "new")},
            "created_at": datetime.fromisoformat(entry["created_at"]),
        }
        for entry in operations
    ]
    if rows:
        connection.execute(insert(tables.operation), rows)
    last = max((int(row["number"]) for row in rows), default=0)
    connection.execute(update(tables.repository).values(last_operation=last, last_journaled=last))


def _write_packs(connection: Connection, state: _State, ids: Mapping[str, int]) -> None:
    """Insert the packs that the journal names."""
    rows = [
        {
            "key": key,
            "nbytes": nbytes,
            "version": ids[uid],
            "status": "condemned" if key in state.condemned else "live",
            "condemned_at": state.condemned.get(key),
        }
        for key, (nbytes, uid) in state.packs.items()
    ]
    if rows:
        packs = connection.scalars(insert(_pack).returning(_pack.c.id), rows)
        judge_again(connection, packs.all())


_BATCH = 200  # versions that are written at once, unless they have more than `_TENSORS` new tensors
_TENSORS = 5_000


def _fill_all(
    connection: Connection,
    uids: Sequence[str],
    contents: Contents,
    state: _State,
    ids: Mapping[str, int],
) -> list[str]:
    """Write what versions hold; return those for which that was not possible.

    A forgotten version stays expired: an undo may bring it back.
    """
    lost: list[str] = []
    batch: dict[str, StoredVersion] = {}
    seen = set(state.nodes)
    size = 0
    for uid in uids:
        stored = contents.version(uid, seen)
        if stored is None:
            lost.append(uid)
            continue
        batch[uid] = stored
        seen |= stored.nodes.keys()
        size += len(stored.content.tensors)
        if len(batch) == _BATCH or size > _TENSORS:
            lost += _fill(connection, batch, contents, state, ids)
            batch, seen, size = {}, set(state.nodes), 0
    return lost + _fill(connection, batch, contents, state, ids)


def _fill(
    connection: Connection,
    batch: Mapping[str, StoredVersion],
    contents: Contents,
    state: _State,
    ids: Mapping[str, int],
) -> list[str]:
    """Write a batch of versions, by uid; return those for which that was not possible."""
    try:
        # A savepoint, so that versions that cannot be restored leave no rows.
        with connection.begin_nested():
            changed = _write_batch(connection, batch, contents, state, ids)
    except ConflictError as error:
        if len(batch) > 1:  # one by one, and read again: they may share nodes of the lost one
            return [
                lost
                for uid in batch
                if (again := contents.version(uid, state.nodes.keys())) is not None
                for lost in _fill(connection, {uid: again}, contents, state, ids)
            ]
        (uid,) = batch
        contents.lose(uid, str(error))
        return [uid]
    state.packs |= changed.packs
    state.pages |= changed.pages
    state.nodes |= changed.nodes
    return []


class _Changed(NamedTuple):
    """What a batch adds to the state."""

    packs: dict[str, tuple[int, str]]
    pages: dict[str, int]
    nodes: dict[bytes, int]


def _write_batch(
    connection: Connection,
    batch: Mapping[str, StoredVersion],
    contents: Contents,
    state: _State,
    ids: Mapping[str, int],
) -> _Changed:
    needs = {uid: _needed(stored) for uid, stored in batch.items()}
    needed: dict[str, tuple[int, str]] = {}  # bytes, and a version that needs them, by pack
    for uid, packs in needs.items():
        for key, nbytes in packs.items():
            needed[key] = max(needed.get(key, (0, uid)), (nbytes, uid))
    moved = needed.keys() & state.condemned.keys()
    if moved:  # a crash came after the chunks moved, and before the page was written
        connection.execute(
            update(_pack)
            .where(_pack.c.key.in_(wanted_names(connection, moved)))
            .values(status="live", condemned_at=None)
        )
    # An intact page is right about the packs of its version, even if the operation that added them
    # is lost. All other packs have a row, those of expired versions too.
    unnamed = {key: needed[key] for key in needed if key not in state.packs}
    _write_unnamed(connection, unnamed, contents, ids)
    of_nodes = {digest: key for one in batch.values() for digest, key in one.nodes.items()}
    of_runs = {digest: key for one in batch.values() for digest, key in one.runs.items()}
    nodes = _write_nodes(connection, list(batch.values()), state)
    pages = _write_pages(connection, batch, state, ids)
    home(connection, state.pages | pages, nodes=of_nodes, runs=of_runs)
    plans = _write_plans(connection, list(batch.values()), pages)
    tensors = [tensor for one in batch.values() for tensor in one.content.tensors]
    # Chunks may lie in packs that only another, newer page names.
    are_there = needed.keys() <= _packs_of(connection, tensors)
    stale = {
        uid
        for uid, stored in batch.items()
        if not are_there and not needs[uid].keys() <= _packs_of(connection, stored.content.tensors)
    }
    mark_objects_stale(connection, {key for uid in stale for key in batch[uid].sizes})
    if batch:
        connection.execute(
            update(_version)
            .where(_version.c.id == bindparam("of"))
            .values({name: bindparam(f"new_{name}") for name in _FILLED}),
            [
                {
                    "of": ids[uid],
                    "new_status": "expired" if uid in state.expired else "committed",
                    "new_expired_at": state.expired.get(uid),
                    "new_plan": plans[stored.content.plan.digest],
                    "new_root": nodes[stored.root],
                    "new_planner_data": stored.content.planner_data,
                    # A manifest of format 1 is to be written again, with pages.
                    "new_stale": new_mark() if uid in stale or stored.plan is None else None,
                }
                for uid, stored in batch.items()
            ],
        )
    new = {digest: nodes[digest] for digest in of_nodes.keys() - state.nodes.keys()}
    return _Changed(unnamed, pages, new)


_FILLED = ("status", "expired_at", "plan", "root", "planner_data", "stale")


def _needed(stored: StoredVersion) -> dict[str, int]:
    """Return how many bytes of which packs a version needs, for its new tensors."""
    needed: dict[str, int] = {}
    for chunk in (chunk for tensor in stored.content.tensors for chunk in tensor.chunks):
        needed[chunk.pack] = max(needed.get(chunk.pack, 0), chunk.offset + chunk.length)
    return needed


def _write_nodes(
    connection: Connection, batch: Sequence[StoredVersion], state: _State
) -> dict[bytes, int]:
    """Write the new nodes of versions; return the ids of the nodes that they have or name."""
    named = {digest for stored in batch for digest in (stored.root, *stored.nodes)}
    known = {digest: state.nodes[digest] for digest in named if digest in state.nodes}
    trees = [stored.tree for stored in batch if stored.tree is not None]
    if not trees:
        return known
    tensors = {tensor.digest: tensor for one in batch for tensor in one.content.tensors}
    aliases = {alias: held for one in batch for alias, held in one.content.aliases.items()}
    content = replace(batch[0].content, packs=(), tensors=list(tensors.values()), aliases=aliases)
    return write_nodes(connection, content, trees, known)


def _write_pages(
    connection: Connection,
    batch: Mapping[str, StoredVersion],
    state: _State,
    ids: Mapping[str, int],
) -> dict[str, int]:
    """Insert the pages and plans that are new; return their ids by key."""
    new = {
        key: (nbytes, uid)
        for uid, stored in batch.items()
        for key, nbytes in stored.sizes.items()
        if key not in state.pages
    }
    if not new:
        return {}
    rows = [
        {"key": key, "nbytes": nbytes, "version": _owner(key, ids, uid), "status": "live"}
        for key, (nbytes, uid) in sorted(new.items())
    ]
    page = tables.page
    pages = connection.execute(insert(page).returning(page.c.key, page.c.id), rows)
    return dict(pages.all())


def _owner(key: str, ids: Mapping[str, int], uid: str) -> int:
    """Return the id of the version whose save wrote an object; that of `uid` if it is unknown."""
    return ids.get(key.split("/")[1].split(".", maxsplit=1)[0], ids[uid])


def _write_plans(
    connection: Connection, batch: Sequence[StoredVersion], pages: Mapping[str, int]
) -> dict[str, int]:
    """Write the plans that are new; return the ids of all by digest."""
    ids: dict[str, int] = {}
    for stored in batch:
        digest = stored.content.plan.digest
        if digest not in ids:
            ids[digest] = write_plan(connection, stored.content.plan)
        if stored.plan is not None and stored.plan in pages:
            connection.execute(
                update(tables.plan)
                .where(tables.plan.c.id == ids[digest], tables.plan.c.page.is_(None))
                .values(page=pages[stored.plan])
            )
    return ids


def _write_unnamed(
    connection: Connection,
    needed: Mapping[str, tuple[int, str]],
    contents: Contents,
    ids: Mapping[str, int],
) -> None:
    """Insert packs that no operation names, of which so many bytes are `needed` by a version.

    Raises:
        ConflictError: the data folder does not hold so many bytes of one.
    """
    rows = []
    for key, (nbytes, uid) in needed.items():
        size = contents.pack_size(key)
        if size is None or size < nbytes:
            held = "nothing" if size is None else f"{size} bytes"
            raise ConflictError(
                f"it needs {nbytes} bytes of {key}, which no operation names, and the data folder "
                f"holds {held} of it; restore it from a copy and rebuild again"
            )
        owner = _owner(key, ids, uid)
        rows.append({"key": key, "nbytes": size, "version": owner, "status": "live"})
    if rows:
        packs = connection.scalars(insert(_pack).returning(_pack.c.id), rows)
        judge_again(connection, packs.all())


def _packs_of(connection: Connection, tensors: Collection[NewTensor]) -> set[str]:
    """Return the keys of the packs in which the catalog has chunks of these tensors."""
    if not tensors:
        return set()
    chunk, tensor = tables.chunk, tables.tensor
    starts = wanted_names(connection, {one.digest[:20] for one in tensors})
    held = select(tensor.c.id).where(hex_start(tensor.c.digest).in_(starts))
    packs = select(chunk.c.pack).where(chunk.c.tensor.in_(with_runs(held)))
    return set(connection.scalars(select(_pack.c.key).where(_pack.c.id.in_(packs))))


def _write_refs(
    connection: Connection, state: _State, ids: Mapping[str, int], lost: Collection[str]
) -> dict[str, str]:
    """Insert the refs and return them; a branch whose tip is lost goes back to an ancestor."""
    written: dict[str, str] = {}
    for name, uid in state.refs.items():
        kind = state.kinds.get(name, "branch")
        found: str | None = uid
        while found is not None and (found in lost or found in state.expired):
            found = _parent(state, found) if kind == "branch" else None
        if found is None or found not in ids:
            continue
        written[name] = found
        connection.execute(insert(tables.ref).values(name=name, kind=kind, version=ids[found]))
    return written


def _parent(state: _State, uid: str) -> str | None:
    """Return the parent if it is an earlier version: a damaged journal could lead in a circle."""
    fact = state.facts.get(uid)
    parent = None if fact is None else state.facts.get(fact["parent"])
    if fact is None or parent is None or parent["number"] >= fact["number"]:
        return None
    return str(parent["uid"])


def _record_undone(
    connection: Connection,
    operations: Iterable[Json],
    state: _State,
    ids: Mapping[str, int],
    refs: Mapping[str, str],
) -> None:
    """Record as undone the operations that did not leave a ref where it is, or was next.

    An undo reverts one operation after another, and so goes on from where each ref is now.
    """
    ref_changes = [(entry, change) for entry in operations for change in changed_refs(entry)]
    undone = {entry["detail"]["undoes"] for entry in operations if entry["kind"] == "undo"}
    # Read backwards: where each ref must be after an operation, for the next one to follow from it.
    wanted: dict[str, str | None] = {
        change.name: refs.get(change.name) for _, change in ref_changes
    }
    here: dict[str, str | None] = dict(state.refs)
    changes = []
    for entry, (name, _, *ends) in reversed(ref_changes):
        if entry["kind"] == "undo" or entry["operation"] in undone:
            continue
        old, new = (None if end is None else end["uid"] for end in ends)
        if new == wanted[name]:
            wanted[name] = old
            continue
        from_, to = (None if u is None else ids.get(u) for u in (here.get(name), refs.get(name)))
        changes.append(Change("undo", name, from_, to, {"undoes": entry["operation"]}))
        here[name] = refs.get(name)
    if changes:
        record(connection, *changes, author="")
