"""Garbage collection: bytes that nothing reaches are condemned, and deleted after a grace time.

Everything is decided in catalog transactions, which wait for those of saves. A file is deleted only
after its row was condemned for the grace time, so saves, loads and other collections may run on any
host at the same time. If a collection is killed, the next one finishes its work (design,
invariant 5). Ages are measured by one clock that does not jump while a collection runs. Which saves
have crashed is decided in the first transaction, because a collection may take hours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.maintenance.condemn import condemn, find_doomed, find_leftovers, forget_packs
from dcpstore.catalog.maintenance.journal import check_owner, write_journal
from dcpstore.catalog.maintenance.preview import preview
from dcpstore.catalog.write.pages import find_doomed_pages, forget_pages
from dcpstore.catalog.write.stale import are_stale, tagged_uids
from dcpstore.core.durations import Duration, as_duration
from dcpstore.core.uids import uid_time
from dcpstore.errors import CorruptionError, NotFoundError, SchemaError
from dcpstore.formats.first_manifest import FirstManifest
from dcpstore.formats.manifest import decode_manifest
from dcpstore.maintenance.page_reader import PageReader
from dcpstore.records import PackRecord
from dcpstore.storage.interface import Storage
from dcpstore.zarr.stored_references import keep_reference, reference_key

__all__ = ["GcReport", "collect"]

_LIVE_SHARE = 0.5  # a pack is repacked if a smaller share of its bytes is used
_FOLDERS = {"packs": 2, "pages": 1, "plans": 1, "manifests": 1, "references": 1}  # slashes in keys
_TEMPORARY = ".tmp"
# Where a killed process may have left a temporary file; a pack is written under its own key.
_TEMPORARY_IN = {"manifests", "operations", "pages", "plans", "references"}
_TEMPORARY_OF = ("README.txt.", "references.py.")


@dataclass(frozen=True, slots=True)
class GcReport:
    """What a collection did, or would do with `dry_run`.

    Attributes:
        condemned: packs that nothing reaches; they are deleted after the grace time.
        repacked: sparse packs, which are condemned too, each with the new pack of its used chunks:
            None in a dry run.
        deleted: packs that were deleted.
        cleared: keys of other objects that were deleted: of crashed saves and expired versions.
        unknown: keys that belong to no version in the catalog; they were not touched.
        crashed: uids of the saves that were aborted as crashed.
        nbytes_freed: of `deleted` and `cleared`.
        dry_run: whether nothing was changed.
    """

    condemned: tuple[PackRecord, ...]
    repacked: tuple[tuple[PackRecord, PackRecord | None], ...]
    deleted: tuple[PackRecord, ...]
    cleared: tuple[str, ...]
    unknown: tuple[str, ...]
    crashed: tuple[str, ...]
    nbytes_freed: int
    dry_run: bool

    @property
    def nbytes_condemned(self) -> int:
        """The bytes of the packs that were condemned now: unused ones and repacked ones."""
        return sum(pack.nbytes for pack in (*self.condemned, *(old for old, _ in self.repacked)))


def collect(
    catalog: Catalog,
    storage: Storage,
    *,
    grace: Duration,
    lease: Duration,
    author: str,
    dry_run: bool,
) -> GcReport:
    """Condemn, repack and delete; with `dry_run`, only report what would be done.

    Args:
        catalog: of the repository.
        storage: of the repository.
        grace: how long what is condemned stays readable.
        lease: how long a save may go without a heartbeat before it counts as crashed.
        author: of the operations that are recorded.
        dry_run: change nothing.

    Raises:
        InvalidInputError: a save is running that is older than `grace`.
        DcpstoreError: the data folder is another repository's.
    """
    grace, lease = as_duration(grace, what="grace"), as_duration(lease, what="lease")
    check_owner(catalog, storage)
    if not dry_run:
        write_journal(catalog, storage)
    clock = _steady_clock()
    began = clock()
    found = (
        preview(catalog, now=began, grace=grace, lease=lease, live_share=_LIVE_SHARE)
        if dry_run
        else condemn(
            catalog, now=began, grace=grace, lease=lease, live_share=_LIVE_SHARE, author=author
        )
    )
    repacked: list[tuple[PackRecord, PackRecord | None]] = [(pack, None) for pack in found.sparse]
    if not dry_run:
        if found.sparse:
            from dcpstore.maintenance.rewrite import repack  # noqa: PLC0415 (loads torch)

            repacked = list(repack(catalog, storage, found.sparse, author=author))
        write_journal(catalog, storage)  # before any page names the new packs
        if are_stale(catalog):
            from dcpstore.maintenance.rewrite import renew_objects  # noqa: PLC0415 (loads torch)

            renew_objects(catalog, storage)
        _keep_references(catalog, storage)
    deleted = _delete_packs(
        catalog, storage, before=clock() - grace, author=author, dry_run=dry_run
    )
    pages = _delete_pages(catalog, storage, before=clock() - grace, dry_run=dry_run)
    if dry_run and not grace:  # a real collection would delete at once what it condemns
        deleted += found.condemned + found.sparse
        pages += found.pages
    cleared, unknown, nbytes = _clear_leftovers(
        catalog,
        storage,
        crashed=found.crashed,
        dropped=found.dropped,
        expired_before=began - grace,
        old=began - max(grace, lease),
        dry_run=dry_run,
    )
    return GcReport(
        condemned=tuple(found.condemned),
        repacked=tuple(repacked),
        deleted=tuple(deleted),
        cleared=(*(page.key for page in pages), *cleared),
        unknown=tuple(unknown),
        crashed=tuple(found.crashed),
        nbytes_freed=nbytes + sum(one.nbytes for one in (*deleted, *pages)),
        dry_run=dry_run,
    )


def _keep_references(catalog: Catalog, storage: Storage) -> None:
    """Write the references of tagged versions that lack theirs."""
    there = set(storage.list("references"))
    for uid in tagged_uids(catalog):
        if reference_key(uid) not in there:
            keep_reference(storage, uid)


def _steady_clock() -> Callable[[], datetime]:
    """Return a clock that does not jump when the clock of the machine is changed."""
    wall, steady = datetime.now(UTC), time.monotonic()
    return lambda: wall + timedelta(seconds=time.monotonic() - steady)


def _delete_packs(
    catalog: Catalog, storage: Storage, *, before: datetime, author: str, dry_run: bool
) -> list[PackRecord]:
    doomed = find_doomed(catalog, before=before)
    if doomed and not dry_run:
        for pack in doomed:
            storage.delete(pack.key)
        # Rows last: after a crash in between, the next collection finds them and tries again.
        forget_packs(catalog, [p.key for p in doomed], now=datetime.now(UTC), author=author)
        write_journal(catalog, storage)
    return doomed


def _delete_pages(
    catalog: Catalog, storage: Storage, *, before: datetime, dry_run: bool
) -> list[PackRecord]:
    """Delete the pages and plans that were condemned before a time; return them."""
    doomed = find_doomed_pages(catalog, before=before)
    if doomed and not dry_run:
        for page in doomed:
            storage.delete(page.key)
        forget_pages(
            catalog, [page.key for page in doomed]
        )  # last, for the same reason as rows of packs
    return doomed


def _clear_leftovers(
    catalog: Catalog,
    storage: Storage,
    *,
    crashed: Sequence[str],
    dropped: Sequence[str],
    expired_before: datetime,
    old: datetime,
    dry_run: bool,
) -> tuple[list[str], list[str], int]:
    """Delete the objects that crashed saves and expired versions left.

    Returns their keys, the keys of unknown versions, and the bytes of the deleted objects.
    `old` is older than every save that ran when this collection began.
    """
    # Listed before the query: else a save that begins in between would look unknown.
    stored = list(storage.list())
    keys = [(key, key.split("/")[1].split(".")[0]) for key in stored if _is_of_a_version(key)]
    leftovers, strange = find_leftovers(
        catalog, keys, crashed=crashed, dropped=dropped, expired_before=expired_before
    )
    leftovers += [key for key in stored if _is_half_written(key, old)]
    uids = dict(keys)
    described = {uid for key, uid in keys if key.startswith("manifests/")}
    # Old and without a manifest: a save or repacking was killed before the catalog recorded it.
    strays = {k for k in strange if uids[k] not in described and _is_older(uids[k], old)}
    if strays:  # packs and pages may have another uid than the manifest that names them
        named = _named_by(storage, [key for key in strange if key.startswith("manifests/")])
        strays = set() if named is None else strays - named
    leftovers += sorted(strays)
    unknown = [key for key in strange if key not in strays]
    nbytes = 0
    for key in leftovers:
        try:
            nbytes += storage.size(key)
        except NotFoundError:
            continue  # another collection deleted it first
        if not dry_run:
            storage.delete(key)
    return leftovers, unknown, nbytes


def _named_by(storage: Storage, manifests: Sequence[str]) -> set[str] | None:
    """Return the objects that manifests name; None if one of them cannot be read."""
    named: set[str] = set()
    pages = PageReader(storage)
    for key in manifests:
        try:
            manifest = decode_manifest(storage.get(key))
            if isinstance(manifest, FirstManifest):
                tensors = manifest.content.tensors
            else:
                held = pages.tree(manifest.root, manifest.page)
                tensors = held.tensors
                named |= {manifest.plan, *held.nodes.values(), *held.runs.values()}
        except NotFoundError:
            continue
        except (CorruptionError, SchemaError):
            return None
        named |= {chunk.pack for tensor in tensors for chunk in tensor.chunks}
    return named


def _is_of_a_version(key: str) -> bool:
    slashes = _FOLDERS.get(key.split("/", maxsplit=1)[0])
    return key.count("/") == slashes and not (slashes == 1 and key.endswith(_TEMPORARY))


def _is_half_written(key: str, before: datetime) -> bool:
    """Tell whether a key is of a temporary file that a killed process left before a time.

    Other files that end in ".tmp" may be somebody's own, so only places of ours count.
    """
    folder, _, name = key.rpartition("/")
    is_ours = folder in _TEMPORARY_IN if folder else name.startswith(_TEMPORARY_OF)
    return is_ours and key.endswith(_TEMPORARY) and _is_older(key.split(".")[-2], before)


def _is_older(uid: str, time: datetime) -> bool:
    try:
        return uid_time(uid) <= time
    except (ValueError, OverflowError):
        return False
