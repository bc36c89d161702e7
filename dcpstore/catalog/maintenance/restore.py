"""A catalog restored from what the data folder says, in one transaction.

The operations are replayed in order: versions and what is known of them, refs, packs. What a
committed version holds comes from its manifest, and so do packs that no operation tells of. A
version without a sound manifest keeps its row, as an expired one does, so that parents and
operations still resolve.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Protocol

from sqlalchemy import Connection, insert, select, update

from dcpstore.catalog.db.key_lists import wanted_names
from dcpstore.catalog.maintenance.journal import ChangedRef, changed_refs
from dcpstore.catalog.read.versions import INFO, STATS, lineage_below
from dcpstore.catalog.schema import tables
from dcpstore.catalog.write.contents import write_content, write_plan
from dcpstore.catalog.write.operations import Change, append_operations, take_operations
from dcpstore.catalog.write.stale import new_mark
from dcpstore.errors import ConflictError
from dcpstore.formats.version import decode_info, decode_stats
from dcpstore.records import VersionContent

__all__ = ["Contents", "Restored", "restore"]

# JSON as read: what it holds is checked by use, so `Any`.
Json = Mapping[str, Any]

_version, _pack = tables.version, tables.pack


class Contents(Protocol):
    """What the data folder holds beside its journal."""

    def content(self, uid: str) -> VersionContent | None:
        """Return what a version holds, or None (and report why) without a sound manifest."""

    def pack_size(self, key: str) -> int | None:
        """Return the length of a pack, or None where there is none."""

    def lose(self, uid: str, reason: str) -> None:
        """Hear why a version is lost whose manifest is sound."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What came back, and what did not; versions by number."""

    versions: list[int]
    lost: list[int]
    dropped_refs: list[str]


@dataclass(slots=True)
class _State:
    """The repository after the last operation that was replayed."""

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    expired: dict[str, datetime] = field(default_factory=dict)  # and forgotten
    forgotten: set[str] = field(default_factory=set)  # those that an undo may bring back
    refs: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    packs: dict[str, tuple[int, str]] = field(default_factory=dict)
    condemned: dict[str, datetime] = field(default_factory=dict)


def restore(connection: Connection, operations: Iterable[Json], contents: Contents) -> Restored:
    """Fill the empty tables of a new catalog, whose repository row is there."""
    operations = list(operations)
    state = _replay(operations)
    ids = _write_versions(connection, state)
    _write_operations(connection, operations, ids)
    _write_packs(connection, state, ids)
    lost = [
        uid
        for uid in state.facts
        if uid not in state.expired and not _fill(connection, uid, contents, state, ids)
    ]
    for uid in state.facts.keys() & state.forgotten:
        _fill(connection, uid, contents, state, ids)
    refs = _write_refs(connection, state, ids, lost)
    numbers = {uid: state.facts[uid]["number"] for uid in state.facts}
    if lost:
        _record_loss(connection, [ids[uid] for uid in lost], [numbers[uid] for uid in lost])
    _record_undone(connection, operations, state, ids, refs)
    return Restored(
        versions=sorted(n for uid, n in numbers.items() if uid not in {*state.expired, *lost}),
        lost=sorted(numbers[uid] for uid in lost),
        dropped_refs=[name for name, uid in state.refs.items() if refs.get(name) != uid],
    )


def _replay(operations: Iterable[Json]) -> _State:
    state = _State()
    for said in operations:
        at = datetime.fromisoformat(said["created_at"])
        if fact := said.get("version"):
            _learn(state, fact)
            _unlearn(state, fact["uid"], (said["detail"] or {}).get("removed", {}))
        detail = said["detail"] or {}
        if said["kind"] in ("expire", "forget"):
            state.expired.update(dict.fromkeys(detail["versions"], at))
            if said["kind"] == "forget":
                state.forgotten.update(detail["versions"])
        elif said["kind"] == "undo":
            for uid in detail.get("versions", ()):
                state.expired.pop(uid, None)
                state.forgotten.discard(uid)
        elif said["kind"] == "gc":
            _replay_gc(state, detail, at)
        for change in changed_refs(said):
            _replay_ref(state, change)
    state.refs = dict(sorted(state.refs.items()))
    state.packs = {key: pack for key, pack in state.packs.items() if pack[1] in state.facts}
    return state


def _learn(state: _State, fact: Json) -> None:
    """Take what is said of a version; later words win."""
    if fact["uid"] not in state.facts:  # later on, packs come and go by gc
        for key, nbytes in fact["packs"]:
            state.packs.setdefault(key, (nbytes, fact["uid"]))
    state.facts[fact["uid"]] = dict(fact)


def _unlearn(state: _State, uid: str, removed: Json) -> None:
    """Take back the metrics and labels that an undo removed."""
    for what, names in removed.items():
        for name in names:
            state.facts[uid][what].pop(name, None)


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
    """Insert the rows of all versions, as expired until their entries are there; return the ids."""
    facts = sorted(state.facts.values(), key=lambda fact: int(fact["number"]))
    now = datetime.now(UTC)
    ids: dict[str, int] = {}
    for fact in facts:
        info, stats = decode_info(fact), decode_stats(fact)
        parent = ids.get(fact["parent"])
        ids[info.uid] = connection.execute(
            insert(_version)
            .values(
                **{name: getattr(info, name) for name in INFO},
                **{name: getattr(stats, name) for name in STATS},
                **lineage_below(connection, parent),
                number=fact["number"],
                status="expired",
                parent=parent,
                wanted_tags=[],
                started_at=datetime.fromisoformat(fact["started_at"]),
                touched_at=stats.created_at,
                expired_at=state.expired.get(info.uid, now),
            )
            .returning(_version.c.id)
        ).scalar_one()
        if info.metrics:
            connection.execute(
                insert(tables.metric),
                [
                    {"version": ids[info.uid], "name": name, "value": value}
                    for name, value in info.metrics.items()
                ],
            )
    last = max((int(fact["number"]) for fact in facts), default=0)
    connection.execute(update(tables.repository).values(last_version=last))
    return ids


def _write_operations(
    connection: Connection, operations: list[Json], ids: Mapping[str, int]
) -> None:
    def named(version: Json | None) -> int | None:
        return None if version is None else ids.get(version["uid"])

    rows = [
        {
            "number": said["operation"],
            "kind": said["kind"],
            "target": said["target"],
            "old": named(said["old"]),
            "new": named(said["new"]),
            "author": said["author"],
            "created_at": datetime.fromisoformat(said["created_at"]),
            "detail": said["detail"],
        }
        for said in operations
    ]
    if rows:
        connection.execute(insert(tables.operation), rows)
    last = max((int(row["number"]) for row in rows), default=0)
    connection.execute(update(tables.repository).values(last_operation=last, last_journaled=last))


def _write_packs(connection: Connection, state: _State, ids: Mapping[str, int]) -> None:
    """Insert the packs that the journal tells of."""
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
        connection.execute(insert(_pack), rows)


def _fill(
    connection: Connection, uid: str, contents: Contents, state: _State, ids: Mapping[str, int]
) -> bool:
    """Give a version its entries and chunks, and tell whether that was possible.

    One that was forgotten stays unseen: an undo may bring it back.
    """
    content, version = contents.content(uid), ids[uid]
    if content is None:
        return False
    needed: dict[str, int] = {}
    for chunk in (chunk for tensor in content.tensors for chunk in tensor.chunks):
        needed[chunk.pack] = max(needed.get(chunk.pack, 0), chunk.offset + chunk.length)
    moved = needed.keys() & state.condemned.keys()
    try:
        with connection.begin_nested():
            if moved:  # the chunks did, and the crash came before the manifest
                connection.execute(
                    update(_pack)
                    .where(_pack.c.key.in_(wanted_names(connection, moved)))
                    .values(status="live", condemned_at=None)
                )
            # What a sound manifest names is the version's, whatever became of the operation that
            # aware of it. The rows of all other packs are there, those of expired versions too.
            untold = {key: needed[key] for key in needed if key not in state.packs}
            _write_untold(connection, untold, version, contents, ids)
            write_content(connection, version, replace(content, packs=()))
            connection.execute(
                update(_version)
                .where(_version.c.id == version)
                .values(
                    **({} if uid in state.expired else {"status": "committed", "expired_at": None}),
                    plan=write_plan(connection, content.plan),
                    planner_data=content.planner_data,
                    # Another manifest may know of a place that chunks moved to since.
                    stale=None if needed.keys() <= _packs_of(connection, version) else new_mark(),
                )
            )
    except ConflictError as error:
        contents.lose(uid, str(error))
        return False
    state.packs |= {key: (nbytes, uid) for key, nbytes in untold.items()}
    return True


def _write_untold(
    connection: Connection,
    needed: Mapping[str, int],
    version: int,
    contents: Contents,
    ids: Mapping[str, int],
) -> None:
    """Insert packs that no operation tells of, of which so many bytes are needed.

    Raises:
        ConflictError: the data folder does not hold so much of one.
    """
    rows = []
    for key, nbytes in needed.items():
        size = contents.pack_size(key)
        if size is None or size < nbytes:
            held = "nothing" if size is None else f"{size} bytes"
            raise ConflictError(
                f"it names {nbytes} bytes of {key}, of which no operation tells, and the data "
                f"folder holds {held} of it; restore it from a copy and rebuild again"
            )
        owner = ids.get(key.split("/")[1], version)
        rows.append({"key": key, "nbytes": size, "version": owner, "status": "live"})
    if rows:
        connection.execute(insert(_pack), rows)


def _packs_of(connection: Connection, version: int) -> set[str]:
    """Return the keys of the packs in which chunks of a version lie."""
    chunk, entry = tables.chunk, tables.entry
    return set(
        connection.scalars(
            select(_pack.c.key)
            .join(chunk, chunk.c.pack == _pack.c.id)
            .join(entry, entry.c.tensor == chunk.c.tensor)
            .where(entry.c.version == version)
            .distinct()
        )
    )


def _write_refs(
    connection: Connection, state: _State, ids: Mapping[str, int], lost: list[str]
) -> dict[str, str]:
    """Insert the refs and return them; a branch whose tip is lost goes back to what is left."""
    there: dict[str, str] = {}
    for name, uid in state.refs.items():
        kind = state.kinds.get(name, "branch")
        found: str | None = uid
        while found is not None and (found in lost or found in state.expired):
            found = _parent(state, found) if kind == "branch" else None
        if found is None or found not in ids:
            continue
        there[name] = found
        connection.execute(insert(tables.ref).values(name=name, kind=kind, version=ids[found]))
    return there


def _parent(state: _State, uid: str) -> str | None:
    """Return the parent, an earlier version: a journal might say anything, and lead in a circle."""
    fact = state.facts.get(uid)
    parent = None if fact is None else state.facts.get(fact["parent"])
    if fact is None or parent is None or parent["number"] >= fact["number"]:
        return None
    return str(parent["uid"])


def _record_loss(connection: Connection, ids: list[int], numbers: list[int]) -> None:
    """Record that versions were left out, so that the next rebuild leaves them out too."""
    uids = connection.scalars(
        select(_version.c.uid).where(_version.c.id.in_(ids)).order_by(_version.c.number)
    ).all()
    target = ",".join(f"v{number}" for number in sorted(numbers))
    change = Change("expire", target, None, None, {"versions": list(uids), "rules": {"lost": True}})
    append_operations(
        connection, take_operations(connection), [change], author="", at=datetime.now(UTC)
    )


def _record_undone(
    connection: Connection,
    operations: Iterable[Json],
    state: _State,
    ids: Mapping[str, int],
    refs: Mapping[str, str],
) -> None:
    """Record what did not leave its ref where the next operation, or the rebuild, has it: undone.

    So an undo, which takes back one operation after another, goes on from where each ref is.
    """
    ref_changes = [(said, change) for said in operations for change in changed_refs(said)]
    undone = {said["detail"]["undoes"] for said in operations if said["kind"] == "undo"}
    wanted: dict[str, str | None] = {
        change.name: refs.get(change.name) for _, change in ref_changes
    }
    here: dict[str, str | None] = dict(state.refs)
    changes = []
    for said, (name, _, *ends) in reversed(ref_changes):
        if said["kind"] == "undo" or said["operation"] in undone:
            continue
        old, new = (None if end is None else end["uid"] for end in ends)
        if new == wanted[name]:
            wanted[name] = old
            continue
        from_, to = (None if u is None else ids.get(u) for u in (here.get(name), refs.get(name)))
        changes.append(Change("undo", name, from_, to, {"undoes": said["operation"]}))
        here[name] = refs.get(name)
    if changes:
        first = take_operations(connection, len(changes))
        append_operations(connection, first, changes, author="", at=datetime.now(UTC))
