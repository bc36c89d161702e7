"""Rebuilds a lost catalog from the data folder alone: from its journal, manifests and pages.

The rebuilt catalog answers like the original one, as of the last operation that was finished.
Damaged or missing objects are reported, and their versions left out; in the data folder only the
journal is repaired. So that numbers have no gaps, each lost operation gets a placeholder, which
undo skips. Its kind is "lost"; that of operation 1, which describes the repository, is "init". If
the operation that made a version is lost, its placeholder describes the version: with the uid that
other operations give, and from its manifest.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.location import absolute_data, check_path, locate
from dcpstore.catalog.maintenance.journal import changed_refs, journal_again, write_journal
from dcpstore.catalog.maintenance.restore import StoredVersion, restore
from dcpstore.catalog.maintenance.stored_journal import read_journal
from dcpstore.catalog.schema.lifecycle import FORMAT_VERSION, restore_repository
from dcpstore.core.digests import hasher
from dcpstore.core.uids import new_uid
from dcpstore.errors import CorruptionError, InvalidInputError, NotFoundError
from dcpstore.formats.entry_tree import grow
from dcpstore.formats.first_manifest import FirstManifest
from dcpstore.formats.journal_entry import operation_key
from dcpstore.formats.journal_segment import segment_key
from dcpstore.formats.manifest import Manifest, decode_manifest, manifest_key
from dcpstore.formats.plan import decode_plan
from dcpstore.formats.version import encode_facts
from dcpstore.maintenance.page_reader import PageReader, StoredTree
from dcpstore.records import (
    ChunkDefaults,
    PlanRecord,
    RepositoryRecord,
    VersionContent,
    VersionInfo,
    VersionStats,
)
from dcpstore.storage.interface import Storage
from dcpstore.storage.local import LocalFolder
from dcpstore.storage.urls import open_storage

__all__ = [
    "RebuildReport",
    "find_lost",
    "placeholders",
    "rebuild",
]

# JSON whose fields `decode_operation` has checked; they are of every kind, hence `Any`.
Json = dict[str, Any]
AnyManifest = Manifest | FirstManifest


@dataclass(frozen=True, slots=True)
class RebuildReport:
    """What was restored, and what was not.

    Attributes:
        versions: numbers of the versions that load again.
        lost: numbers of the versions that do not.
        moved_refs: tags that were dropped and branches that moved back: they named a lost version.
        operations: how many operations of the journal were intact.
        problems: each object that is damaged or missing, and why each version is lost.
        unfinished: uids of manifests that no operation names. Their saves never committed, or did
            so just before the catalog was lost.
    """

    versions: tuple[int, ...]
    lost: tuple[int, ...]
    moved_refs: tuple[str, ...]
    operations: int
    problems: tuple[str, ...]
    unfinished: tuple[str, ...]


def rebuild(data: str | os.PathLike[str], into: str | os.PathLike[str]) -> RebuildReport:
    """Make a new catalog for the data folder of a repository whose catalog is lost.

    Args:
        data: the data folder or its URL.
        into: where the catalog is to be, as `open` takes it: a folder, or a database URL.

    Raises:
        NotFoundError: there is no data folder, or it has no journal.
        AlreadyExistsError: the catalog exists already, or the database is not empty.
    """
    url, folder = locate(into)
    data_url = absolute_data(check_path(data, what="the data folder"))
    if "://" not in data_url and not os.path.exists(data_url):
        raise NotFoundError(
            f"there is no data folder {data_url!r}; give the folder that holds packs/ and "
            "operations/."
        )
    storage = open_storage(data_url)
    problems: list[str] = []
    operations, lost, again = _read_journal(storage, problems)
    if not operations:
        raise NotFoundError(
            f"{storage.url!r} has no operations to rebuild a catalog from; give the data folder "
            "of a repository, which holds 'operations', 'manifests' and 'packs'."
        )
    if folder is not None and Path(os.path.realpath(folder)) == Path(storage.url):
        data_url = "."  # as `open` makes it, so that the folder can move as a whole
    found = _DataScan(storage, problems)
    made, found.unnamed = placeholders(operations, lost, found.manifest)
    whole = sorted([*operations, *made], key=lambda one: int(one["operation"]))
    if folder is not None:
        LocalFolder(folder, create=True)  # for the catalog itself
    done = restore_repository(
        url,
        _repository(operations, data_url),
        lambda connection: restore(connection, whole, found),
    )
    with Catalog.open(url) as catalog:
        if again is not None:
            journal_again(catalog, again)
        write_journal(catalog, storage)
    known = {one["version"]["uid"] for one in whole if "version" in one}
    return RebuildReport(
        versions=tuple(done.versions),
        lost=tuple(done.lost),
        moved_refs=tuple(done.dropped_refs),
        operations=len(operations),
        problems=tuple(problems),
        unfinished=tuple(uid for uid in _described(storage) if uid not in known),
    )


class _DataScan:
    """Reads manifests, pages and sizes of packs from the data folder; reports each problem once.

    Attributes:
        unnamed: the numbers of versions whose uid is lost, by the new uid that each was given.
    """

    def __init__(self, storage: Storage, problems: list[str]) -> None:
        self._storage, self._problems = storage, problems
        self._pages = PageReader(storage)
        self._unsound: set[str] = set()
        self._plans: dict[str, tuple[PlanRecord, int]] = {}
        self.unnamed: dict[str, int] = {}

    def manifest(self, uid: str) -> AnyManifest | None:
        """Return the manifest of a version, or None if it is missing or damaged."""
        if uid in self._unsound:
            return None
        try:
            manifest = decode_manifest(self._storage.get(manifest_key(uid)))
            reason = f"it is of version {manifest.draft.uid}"
            if manifest.draft.uid == uid:
                return manifest
        except NotFoundError:
            reason = "it is missing"
        except CorruptionError as error:
            reason = str(error)
        self._unsound.add(uid)
        self.lose(uid, reason)
        return None

    def version(self, uid: str, known: Collection[bytes]) -> StoredVersion | None:
        """Return what a version holds, or None without an intact manifest and intact pages."""
        if uid in self.unnamed:
            self._problems.append(f"v{self.unnamed[uid]}: no remaining operation names it")
            return None
        manifest = self.manifest(uid)
        if manifest is None:
            return None
        if isinstance(manifest, FirstManifest):
            tree = grow(manifest.content.entries)
            return StoredVersion(content=manifest.content, root=tree.root.digest, tree=tree)
        try:
            return self._version(manifest, known)
        except CorruptionError as error:
            self.lose(uid, str(error))
            return None

    def _version(self, manifest: Manifest, known: Collection[bytes]) -> StoredVersion:
        plan = self._plan(manifest.plan)
        stats = {fact.name: getattr(manifest.stats, fact.name) for fact in fields(VersionStats)}
        held: StoredTree | None = None
        sizes = {} if plan is None else {manifest.plan: plan[1]}
        if manifest.root not in known:
            held = self._pages.tree(manifest.root, manifest.page, known)
            read = {key for digest, key in held.nodes.items() if digest not in known}
            sizes |= {key: self._pages.size(key) for key in read | set(held.runs.values())}
        return StoredVersion(
            content=VersionContent(
                **stats,
                entries=(),
                tensors=() if held is None else held.tensors,
                packs=manifest.packs,
                plan=_lost_plan(manifest) if plan is None else plan[0],
                aliases=manifest.aliases,
                planner_data=manifest.planner_data,
            ),
            root=manifest.root,
            tree=None if held is None else held.tree,
            nodes={} if held is None else held.nodes,
            runs={} if held is None else held.runs,
            plan=None if plan is None else manifest.plan,
            sizes=sizes,
        )

    def _plan(self, key: str) -> tuple[PlanRecord, int] | None:
        """Return a plan and its length in bytes; None if it is missing or damaged."""
        if key not in self._plans and key not in self._unsound:
            try:
                data = self._storage.get(key)
                self._plans = {key: (decode_plan(data), len(data))}  # versions that follow share it
            except (NotFoundError, CorruptionError) as error:
                self._unsound.add(key)
                reason = str(error) if isinstance(error, CorruptionError) else "it is missing"
                self._problems.append(f"{key}: {reason}")
        return self._plans.get(key)

    def pack_size(self, key: str) -> int | None:
        """Return the length of a pack, or None if it is missing."""
        try:
            return self._storage.size(key)
        # CorruptionError: a link leads out of the folder.
        except (NotFoundError, InvalidInputError, CorruptionError):
            return None

    def lose(self, uid: str, reason: str) -> None:
        """Report why a version is lost."""
        self._problems.append(f"{manifest_key(uid)}: {reason}")


def _lost_plan(manifest: Manifest) -> PlanRecord:
    """Return a plan without shards, for a version that loads although its own is lost."""
    return PlanRecord(hasher(manifest.plan.encode()).hexdigest(), manifest.draft.ranks, ())


def _read_journal(
    storage: Storage, problems: list[str]
) -> tuple[list[Json], list[int], int | None]:
    """Return every intact operation, in order, and the numbers of those that are lost.

    The last result is the number from which on the journal must be written again, if any.
    """
    journal = read_journal(storage)
    listing, spans = journal.listing, journal.span_faults
    faults = [
        (number, f"{operation_key(number)}: {fault}")
        for number, fault in journal.single_faults.items()
    ]
    faults += [(span.first, f"{segment_key(span)}: {fault}") for span, fault in spans.items()]
    # A segment stands for its last operation: a false name must not make many lost ones.
    numbers = {*journal.operations, *listing.single, *(span.last for span in listing.spans)}
    before = 0
    for number in sorted(numbers):
        first, last = before + 1, number - 1
        # One line for the whole gap: a file with a false, huge number must not make millions.
        if first <= last and not any(first in span and last in span for span in spans):
            gap = operation_key(first)
            said = "it is missing" if first == last else f"{operation_key(last)}: they are missing"
            faults.append((first, f"{gap}: {said}" if first == last else f"{gap} to {said}"))
        before = number
    problems += [text for _, text in sorted(faults)]
    found = [journal.operations[number] for number in sorted(journal.operations)]
    _check_numbers(found)
    lost = find_lost(numbers, journal.operations)
    again = min([*lost[:1], *journal.single_faults, *(span.first for span in spans)], default=None)
    return found, lost, again


def _check_numbers(operations: list[Json]) -> None:
    """Refuse a journal that gives two versions one number, or one version two numbers."""
    pairs = {(s["version"]["uid"], s["version"]["number"]) for s in operations if "version" in s}
    uids, numbers = {uid for uid, _ in pairs}, {number for _, number in pairs}
    if len(uids) < len(pairs) or len(numbers) < len(pairs) or 0 in numbers:
        raise CorruptionError(
            f"the journal names {len(pairs)} versions by {len(uids)} uids and {len(numbers)} "
            "numbers, so it is not of one repository; restore 'operations' from a copy."
        )


def _repository(operations: list[Json], data_url: str) -> RepositoryRecord:
    """Return the record of the repository in the first operation; if that is lost, a new one."""
    record = operations[0].get("repository")
    if record is None:
        now = datetime.now(UTC)
        return RepositoryRecord(uuid.uuid4().hex, FORMAT_VERSION, data_url, ChunkDefaults(), now)
    return RepositoryRecord(
        uid=record["uid"],
        format_version=record["format_version"],
        data_url=data_url,
        chunk=ChunkDefaults(record["chunk_nbytes"], record["chunk_codec"]),
        created_at=datetime.fromisoformat(record["created_at"]),
    )


def _described(storage: Storage) -> list[str]:
    keys = storage.list("manifests")
    return [Path(key).stem for key in keys if key.endswith(".json")]


# Operations in one gap, more than the largest segment holds. A wider one comes from a file with a
# false number, and is skipped.
_MOST = 150_000


def find_lost(listed: Iterable[int], sound: Collection[int]) -> list[int]:
    """Return the numbers of the operations that are lost, up to the last one that has a file.

    Args:
        listed: the numbers in the names of the files.
        sound: those of them whose file holds an operation.
    """
    lost: list[int] = []
    before = 0
    for number in sorted(listed):
        if number - before <= _MOST:
            lost += range(before + 1, number if number in sound else number + 1)
        before = number
    return lost


def placeholders(
    operations: Sequence[Json], lost: Sequence[int], manifest: Callable[[str], AnyManifest | None]
) -> tuple[list[Json], dict[str, int]]:
    """Return a placeholder for each lost operation, and the versions whose uid is lost.

    Those versions are given new uids; the second result is their numbers by new uid.

    Args:
        operations: all that are intact, in order; at least one.
        lost: the numbers of the lost ones, in order.
        manifest: returns the manifest of a uid, or None if it is missing or damaged.
    """
    uids = _named(operations)
    expired = {u for o in operations if o["kind"] == "expire" for u in o["detail"]["versions"]}
    expired |= {
        u for o in operations if o["kind"] == "gc" for u in (o["detail"] or {}).get("dropped", ())
    }
    made_by = dict(_makers(operations, lost, uids))
    unnamed: dict[str, int] = {}
    made = []
    earlier = iter([*operations, None])
    following = next(earlier)
    at = operations[0]["created_at"]
    tips: dict[str, Mapping[str, Any] | None] = {}
    for number in lost:
        while following is not None and following["operation"] < number:
            at = following["created_at"]
            tips.update((change.name, change.new) for change in changed_refs(following))
            following = next(earlier)
        placeholder = {
            "operation": number,
            "kind": "init" if number == 1 else "lost",
            "target": "",
            "old": None,
            "new": None,
            "author": "",
            "created_at": at,
            "detail": None,
        }
        if (version := made_by.get(number)) is not None:
            uid = uids.get(version)
            if uid is None:
                uid = uids[version] = new_uid()
                unnamed[uid] = version
                found = None
            else:
                found = None if uid in expired else manifest(uid)
            placeholder["new"] = {"uid": uid, "version": version}
            placeholder["version"] = _version_as_json(uid, version, found, at) | _parent(
                version, found, uids, tips
            )
            if found is not None:
                tips[found.draft.branch] = placeholder["new"]
        made.append(placeholder)
    return made, unnamed


def _named(operations: Iterable[Json]) -> dict[int, str]:
    """Return the uids of versions by number: of those that an operation describes or names."""
    operations = list(operations)
    uids = {o["version"]["number"]: o["version"]["uid"] for o in operations if "version" in o}
    known = set(uids.values())
    for operation in operations:
        changed = (end for change in changed_refs(operation) for end in (change.old, change.new))
        for end in (operation["old"], operation["new"], *changed):
            if end is not None and end["version"] and end["uid"] not in known:
                known.add(end["uid"])
                uids.setdefault(end["version"], end["uid"])
    return uids


def _makers(
    operations: Iterable[Json], lost: Sequence[int], uids: Mapping[int, str]
) -> Iterator[tuple[int, int]]:
    """Yield the number of each lost operation that made a version, and the version's number."""
    described: dict[int, int] = {}
    for operation in operations:
        if "version" in operation:
            described.setdefault(operation["version"]["number"], operation["operation"])
    last = max(uids, default=0)
    if last - len(described) > len(lost):
        return  # the numbers are false: more versions than operations are missing
    free = (number for number in lost if number > 1)
    before = 0  # versions are made in the order of their numbers
    for version in range(1, last + 1):
        if version in described:
            before = max(before, described[version])
            continue
        maker = next((number for number in free if number > before), None)
        if maker is None:
            return
        before = maker
        yield maker, version


def _version_as_json(uid: str, number: int, manifest: AnyManifest | None, at: str) -> Json:
    """Return what is known of a version, in the form of the operation that is lost."""
    if manifest is None:
        began = datetime.fromisoformat(at)
        stats = VersionStats(
            created_at=began, nbytes=0, nbytes_written=0, nbytes_reused=0, seconds={}
        )
        facts = encode_facts(VersionInfo(uid=uid, branch="main", ranks=0), stats)
    else:
        facts = encode_facts(manifest.draft, manifest.stats)
    return facts | {
        "uid": uid,
        "number": number,
        "tags": (),
        "started_at": facts["created_at"],
        "packs": [],  # the manifest names them
    }


def _parent(
    number: int,
    manifest: AnyManifest | None,
    uids: Mapping[int, str],
    tips: Mapping[str, Mapping[str, Any] | None],
) -> Json:
    """Return the parent's uid: of the manifest's parent, else of the branch's tip at that time."""
    parent = None
    if manifest is not None:
        tip = tips.get(manifest.draft.branch)
        parent = manifest.draft.parent or (None if tip is None else tip["version"])
    return {"parent": None if parent is None or parent >= number else uids.get(parent)}
