"""A lost catalog comes back from the data folder alone: its journal and its manifests.

Rebuilt and original answer alike, as of the last operation that was finished. What is damaged or
missing is reported, and its versions left out; nothing in the data folder is changed by that.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dcpstore.catalog import Catalog
from dcpstore.catalog.lifecycle import FORMAT_VERSION
from dcpstore.errors import CorruptionError, NotFoundError
from dcpstore.journal import write_journal
from dcpstore.places import absolute_data, locate
from dcpstore.records import ChunkDefaults, RepositoryRecord, VersionContent
from dcpstore.storage.folder import LocalFolder
from dcpstore.storage.interface import Storage
from dcpstore.storage.manifests import decode_manifest, manifest_key
from dcpstore.storage.operations import decode_operation, operation_key, operation_number
from dcpstore.storage.urls import open_storage

__all__ = ["RebuildReport", "rebuild"]

# JSON whose fields `decode_operation` has checked; they are of every kind, hence `Any`.
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RebuildReport:
    """What came back, and what did not.

    `versions` are those that load again, `lost` those that do not, by number; `moved_refs` are tags
    that are gone and branches that went back, for they named one of the lost. `problems` say what
    is damaged or missing, object by object. `unfinished` are the uids of manifests that no
    operation names: of saves that never committed, or did so just before the catalog was lost.
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
        AlreadyExistsError: the catalog is there already, or the database is not empty.
    """
    url, folder = locate(os.fspath(into))
    data_url = absolute_data(os.fspath(data))
    storage = open_storage(data_url)
    problems: list[str] = []
    operations = _read_journal(storage, problems)
    if not operations:
        raise NotFoundError(
            f"{storage.url!r} has no operations to rebuild a catalog from; give the data folder "
            "of a repository, which holds 'operations', 'manifests' and 'packs'."
        )
    if folder is not None and Path(os.path.realpath(folder)) == Path(storage.url):
        data_url = "."  # as `open` makes it, so that the folder can move as a whole

    def content(uid: str) -> VersionContent | None:
        return _read_content(storage, uid, problems)

    if folder is not None:
        LocalFolder(folder, create=True)  # for the catalog itself
    done = Catalog.rebuild(url, _repository(operations, data_url), operations, content)
    with Catalog.open(url) as catalog:
        write_journal(catalog, storage)
    told = {said["version"]["uid"] for said in operations if "version" in said}
    return RebuildReport(
        versions=tuple(done.versions),
        lost=tuple(done.lost),
        moved_refs=tuple(done.dropped_refs),
        operations=len(operations),
        problems=tuple(problems),
        unfinished=tuple(uid for uid in _described(storage) if uid not in told),
    )


def _read_journal(storage: Storage, problems: list[str]) -> list[Json]:
    """Return every sound operation, in order."""
    numbers = [n for n in map(operation_number, storage.list("operations")) if n]
    found = []
    before = 0
    for number in sorted(numbers):
        key = operation_key(number)
        # Told as one, for the name of a single file can claim that any number of them is missing.
        if number == before + 2:
            problems.append(f"{operation_key(before + 1)}: it is missing")
        elif number > before + 2:
            first, last = operation_key(before + 1), operation_key(number - 1)
            problems.append(f"{first} to {last}: they are missing")
        before = number
        try:
            said = decode_operation(storage.get(key))
        except NotFoundError:
            problems.append(f"{key}: it is missing")
            continue
        except CorruptionError as error:
            problems.append(f"{key}: {error}")
            continue
        if said.get("operation") != number:
            problems.append(f"{key}: it holds operation {said.get('operation')}")
            continue
        found.append(said)
    _check_numbers(found)
    return found


def _check_numbers(operations: list[Json]) -> None:
    """Refuse a journal that gives two versions one number, or one version two."""
    told = {(s["version"]["uid"], s["version"]["number"]) for s in operations if "version" in s}
    uids, numbers = {uid for uid, _ in told}, {number for _, number in told}
    if len(uids) < len(told) or len(numbers) < len(told) or 0 in numbers:
        raise CorruptionError(
            f"the journal names {len(told)} versions by {len(uids)} uids and {len(numbers)} "
            "numbers, so it is not of one repository; restore 'operations' from a copy."
        )


def _read_content(storage: Storage, uid: str, problems: list[str]) -> VersionContent | None:
    key = manifest_key(uid)
    try:
        manifest = decode_manifest(storage.get(key))
    except NotFoundError:
        problems.append(f"{key}: it is missing")
        return None
    except CorruptionError as error:
        problems.append(f"{key}: {error}")
        return None
    if manifest.draft.uid != uid:
        problems.append(f"{key}: it is of version {manifest.draft.uid}")
        return None
    return manifest.content


def _repository(operations: list[Json], data_url: str) -> RepositoryRecord:
    """Return what the first operation says of the repository; without it, a new one's."""
    said = operations[0].get("repository")
    if said is None:
        now = datetime.now(UTC)
        return RepositoryRecord(uuid.uuid4().hex, FORMAT_VERSION, data_url, ChunkDefaults(), now)
    return RepositoryRecord(
        uid=said["uid"],
        format_version=said["format_version"],
        data_url=data_url,
        chunk=ChunkDefaults(said["chunk_nbytes"], said["chunk_codec"]),
        created_at=datetime.fromisoformat(said["created_at"]),
    )


def _described(storage: Storage) -> list[str]:
    keys = storage.list("manifests")
    return [Path(key).stem for key in keys if key.endswith(".json")]
