"""Checks whether a repository is intact: finds damage, and the versions that it touches.

A quick check reads no chunks. It lists the data folder: each pack, page and plan must exist with
the right size, and each manifest must exist. Of what is new since the last check it also reads the
manifests, and checks the catalog's own rules. So what grows with the number of versions is a
listing of four folders, and a row of the catalog for each object in them: no request and no
statement. A deep check checks the rules in all rows. It reads manifests, pages, plans, the
journal and every chunk that a version reaches, on all cores, and compares digests; the result of
each pack is kept in the catalog at once, so an interrupted check can be resumed. Damage is marked:
no save reuses a damaged chunk, so saving the content again repairs it. gc replaces damaged
manifests, pages and plans by new ones, and the next change of the repository replaces damaged
operations in the journal.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.maintenance.fsck import (
    NOTHING,
    PackedChunk,
    PackState,
    Reached,
    Verified,
    begin_verify,
    end_verify,
    find_faults,
    find_reached,
    held_by_page,
    is_live,
    last_verified,
    list_manifests,
    list_packs,
    list_pages,
    mark_pack,
    note_verified,
    packed_chunks,
    reached_by_page,
    reached_by_tensor,
)
from dcpstore.catalog.maintenance.journal import check_owner, journal_again, last_journaled
from dcpstore.catalog.maintenance.stored_journal import read_journal
from dcpstore.catalog.read.log_filter import list_log
from dcpstore.catalog.write.stale import mark_object_stale, mark_version_stale
from dcpstore.core.checksums import check_pieces
from dcpstore.core.progress import ProgressBar
from dcpstore.errors import CorruptionError, DcpstoreError, InvalidInputError, NotFoundError
from dcpstore.formats.journal_entry import operation_key
from dcpstore.formats.journal_segment import segment_key
from dcpstore.formats.manifest import decode_manifest, manifest_key
from dcpstore.formats.page import decode_page
from dcpstore.formats.plan import decode_plan
from dcpstore.records import PackRecord, Version
from dcpstore.storage.interface import Storage
from dcpstore.storage.packs import PackReader

__all__ = [
    "QUICK",
    "ChunkDamage",
    "Damage",
    "DamagedVersion",
    "VerifyReport",
    "check_packs",
    "found_by_quick_check",
    "verify",
]

_log = logging.getLogger(__name__)

_SPARE = {"manifest", "page", "plan"}  # the catalog has what these hold, so versions load

# Prefixes of the damage texts that the quick check writes.
QUICK = ("missing: ", "size: ")


@dataclass(frozen=True, slots=True)
class ChunkDamage:
    """One chunk that does not match its digest; `fqns` are its names in all versions."""

    pack: str
    offset: int
    length: int
    part: int
    ordinal: int
    reason: str
    fqns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is damaged: the "catalog", or an object of the data folder by its key.

    `kind` is "pack", "manifest", "page", "plan", "operation" or "catalog".

    `versions` and `fqns` are those that it touches.
    """

    kind: str
    key: str
    reason: str
    versions: tuple[int, ...] = ()
    fqns: tuple[str, ...] = ()
    chunks: tuple[ChunkDamage, ...] = ()


@dataclass(frozen=True, slots=True)
class DamagedVersion:
    """A version that does not load whole, and the nearest one that does.

    `nearest_intact` is the nearest intact ancestor; if there is none, the intact version with the
    nearest number; None if no version is intact.
    """

    version: int
    nearest_intact: int | None


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was checked, and everything that was found damaged."""

    damaged: tuple[Damage, ...]
    versions: tuple[DamagedVersion, ...]
    packs: int
    manifests: int
    chunks: int
    nbytes_read: int
    deep: bool


def found_by_quick_check(damage: str | None) -> bool:
    """Tell whether the quick check wrote this text: a pack is missing, or its size is wrong.

    Such damage remains even if a deep check finds every digest right.
    """
    return damage is not None and damage.startswith(QUICK)


def verify(
    catalog: Catalog,
    storage: Storage,
    *,
    deep: bool,
    resume: bool,
    limit: float | None,
) -> VerifyReport:
    """Check what exists and what is new; with `deep`, check everything and read every chunk.

    Args:
        catalog: of the repository.
        storage: of the repository.
        deep: check the digest of every chunk that a version reaches.
        resume: continue a deep check that was interrupted.
        limit: most bytes a second to read.
    """
    inspection = _Inspection(catalog, storage)
    seen, now = last_verified(catalog)
    after = NOTHING if deep else seen
    inspection.check_catalog(after)
    packs = inspection.check_all_packs()
    manifests = inspection.check_manifests(after)
    inspection.check_pages(deep=deep)
    chunks = nbytes = 0
    if deep:
        inspection.check_journal()
        chunks, nbytes = check_packs(
            catalog, storage, packs, resume=resume, limit=limit, found=inspection.found_in_pack
        )
    damaged = inspection.damage()
    if now != seen and not any(one.kind == "catalog" for one in damaged):
        _note(catalog, now)
    damaged_numbers = {n for one in damaged if one.kind not in _SPARE for n in one.versions}
    return VerifyReport(
        damaged=damaged,
        versions=_with_nearest(list_log(catalog), damaged_numbers) if damaged_numbers else (),
        packs=len(packs),
        manifests=manifests,
        chunks=chunks,
        nbytes_read=nbytes,
        deep=deep,
    )


def _note(catalog: Catalog, seen: Verified) -> None:
    """Note how far the check came, if that can be written: a catalog may be open to reads only."""
    try:
        note_verified(catalog, seen)
    except DcpstoreError as error:
        _log.info("the next quick check begins where this one did: %s", error)


class _Inspection:
    """Collects damage: one record for each object that is damaged."""

    def __init__(self, catalog: Catalog, storage: Storage) -> None:
        self._catalog, self._storage = catalog, storage
        self._found: dict[tuple[str, str], Damage] = {}

    def damage(self) -> tuple[Damage, ...]:
        """Return all damage that was found."""
        return tuple(self._found.values())

    def check_catalog(self, after: Verified) -> None:
        """Check the catalog's own rules in what is newer than `after`."""
        for i, fault in enumerate(find_faults(self._catalog, after)):
            held = [] if fault.tensor is None else reached_by_tensor(self._catalog, fault.tensor)
            self._record("catalog", str(i), fault.text, held)

    def check_all_packs(self) -> list[PackState]:
        """Check that every pack exists with its size; return the packs with their damage so far."""
        packs = []
        listed = list_packs(self._catalog)
        sizes = self._storage.sizes("packs")
        for pack in listed:
            # What the listing does not show as it must be is asked for by itself.
            damage = None if sizes.get(pack.key) == pack.nbytes else self._quick_check(pack)
            if damage is None and not found_by_quick_check(pack.damage):
                damage = pack.damage  # keep the mark: only a deep check can clear it
            if damage is not None:
                self._record_pack(pack, damage)
            if damage != pack.damage:
                # Marked at once: no save reuses a chunk of a damaged pack.
                mark_pack(self._catalog, pack.key, damage=damage, verified_at=None)
            packs.append(pack._replace(damage=damage))
        return packs

    def check_manifests(self, after: Verified) -> int:
        """Check that every version has a manifest; return how many there are.

        Those of versions newer than `after` are read, and those that are to be written again.
        """
        listed = list_manifests(self._catalog)
        sizes = self._storage.sizes("manifests")
        faults: dict[int, tuple[str, str]] = {}
        for number, uid, is_stale in listed:
            key = manifest_key(uid)
            if number > after.version or is_stale or not sizes.get(key):
                reason = self._manifest_fault(key, uid)
                if reason is not None:
                    faults[number] = key, reason
        # Not those of versions that have expired meanwhile.
        there = {one.number for one in list_manifests(self._catalog)} if faults else set()
        for number in sorted(faults.keys() & there, reverse=True):
            key, reason = faults[number]
            self._found["manifest", key] = Damage("manifest", key, reason, (number,))
            mark_version_stale(self._catalog, number)
        return len(listed)

    def _manifest_fault(self, key: str, uid: str) -> str | None:
        try:
            found = decode_manifest(self._storage.get(key)).draft.uid
        except NotFoundError:
            return "it is missing"
        except (InvalidInputError, CorruptionError) as error:
            return str(error)
        return None if found == uid else f"it is of version {found}"

    def check_pages(self, *, deep: bool) -> None:
        """Check that every page and plan exists with its size, and with `deep` what it holds."""
        listed = list_pages(self._catalog)
        sizes = self._storage.sizes("pages") | self._storage.sizes("plans")
        faults: dict[PackRecord, str] = {}
        for page in listed:
            if deep or sizes.get(page.key) != page.nbytes:
                reason = self._page_fault(page, deep=deep)
                if reason is not None:
                    faults[page] = reason
        # Not one that a collection has deleted, or written again, meanwhile.
        there = set(list_pages(self._catalog)) if faults else set()
        for page, reason in faults.items():
            if page not in there:
                continue
            kind = "plan" if page.key.startswith("plans/") else "page"
            versions = tuple(reached_by_page(self._catalog, page.key))
            self._found[kind, page.key] = Damage(kind, page.key, reason, versions)
            mark_object_stale(self._catalog, page.key)

    def _page_fault(self, page: PackRecord, *, deep: bool) -> str | None:
        try:
            size = self._storage.size(page.key)
            if size != page.nbytes:
                return f"it has {size} bytes instead of {page.nbytes}"
            if not deep:
                return None
            data = self._storage.get(page.key)
            if page.key.startswith("plans/"):
                held = {bytes.fromhex(decode_plan(data).digest)}
            else:
                found = decode_page(data, page.key)
                held = {*found.sets, *found.groups, *found.runs}
        except NotFoundError:
            return "it is missing"
        except (InvalidInputError, CorruptionError) as error:
            return str(error)
        if lacking := held_by_page(self._catalog, page.key) - held:
            return f"it lacks {min(lacking).hex()} and {len(lacking) - 1} more of what it must hold"
        return None

    def check_journal(self) -> None:
        """Check every operation in the journal; the next change replaces damaged ones."""
        last = last_journaled(self._catalog)
        journal = read_journal(self._storage)
        spans = {s: fault for s, fault in journal.span_faults.items() if s.first <= last}
        single = {n: fault for n, fault in journal.single_faults.items() if n <= last}
        expected = set(range(1, last + 1)) - journal.operations.keys()
        if last and 1 not in journal.listing.single:  # it is never in a segment alone
            expected.add(1)
        for number in expected - single.keys():
            if not any(number in span for span in spans):
                single[number] = "it is missing"
        faults = [(number, operation_key(number), fault) for number, fault in single.items()]
        faults += [(span.first, segment_key(span), fault) for span, fault in spans.items()]
        for number, key, reason in sorted(faults):
            self._found["operation", key] = Damage("operation", key, reason)
            if number > 1 or self._is_own():
                journal_again(self._catalog, number)

    def found_in_pack(self, pack: PackState, bad: Sequence[ChunkDamage]) -> None:
        """Record the damaged chunks that a deep check found in one pack, if any."""
        if found_by_quick_check(pack.damage):  # the whole pack is reported already
            return
        if not bad:
            self._found.pop(("pack", pack.key), None)
            return
        held = find_reached(self._catalog, pack.key, [chunk.offset for chunk in bad])
        if not held and not self._is_live(pack.key):  # collected while it was checked
            return
        count = f"{len(bad)} chunk{'s' if len(bad) > 1 else ''}"
        self._record("pack", pack.key, f"{count} damaged: {bad[0].reason}", held, bad)

    def _quick_check(self, pack: PackState) -> str | None:
        try:
            size = self._storage.size(pack.key)
        except NotFoundError:
            return (
                f"{QUICK[0]}the data folder does not hold it" if self._is_live(pack.key) else None
            )
        except (
            InvalidInputError,
            CorruptionError,
        ) as error:  # its key is invalid, or a link leaves the folder
            return f"{QUICK[0]}{error}"
        if size != pack.nbytes and self._is_live(pack.key):
            return f"{QUICK[1]}{size} bytes instead of {pack.nbytes}"
        return None

    def _record_pack(self, pack: PackState, reason: str) -> None:
        self._record("pack", pack.key, reason, find_reached(self._catalog, pack.key, None))

    def _record(
        self,
        kind: str,
        key: str,
        reason: str,
        held: Iterable[Reached],
        chunks: Sequence[ChunkDamage] = (),
    ) -> None:
        held = list(held)
        self._found[kind, key] = Damage(
            kind,
            key,
            reason,
            versions=tuple(sorted({one.version for one in held})),
            fqns=tuple(sorted({one.fqn for one in held})),
            chunks=tuple(chunks),
        )

    def _is_own(self) -> bool:
        """Tell whether the journal in the data folder is this repository's."""
        try:
            check_owner(self._catalog, self._storage)
        except DcpstoreError:
            return False
        return True

    def _is_live(self, key: str) -> bool:
        """Tell whether a pack still exists: a collection may have removed it meanwhile."""
        return is_live(self._catalog, key)


def _with_nearest(
    versions: Sequence[Version], damaged_numbers: set[int]
) -> tuple[DamagedVersion, ...]:
    parents = {version.number: version.parent for version in versions}
    in_order = sorted(parents.keys() - damaged_numbers)
    intact = set(in_order)
    found = []
    for number in sorted(damaged_numbers & parents.keys()):
        nearest = parents[number]
        while nearest is not None and nearest not in intact:
            nearest = parents.get(nearest)
        if nearest is None and intact:
            nearest = min(in_order, key=_distance_from(number))
        found.append(DamagedVersion(number, nearest))
    return tuple(found)


def _distance_from(number: int) -> Callable[[int], int]:
    return lambda other: abs(other - number)


Found = Callable[[PackState, Sequence[ChunkDamage]], None]


def check_packs(
    catalog: Catalog,
    storage: Storage,
    packs: Sequence[PackState],
    *,
    resume: bool,
    limit: float | None,
    found: Found,
) -> tuple[int, int]:
    """Check every chunk in `packs`; return how many there were, and their encoded bytes.

    `found` is called with each pack when it was checked. With `resume`, packs that the interrupted
    check has already read, intact or damaged, are left out.
    """
    from dcpstore.reading.chunk_reads import check_chunk  # noqa: PLC0415 (loads torch)

    now = datetime.now(UTC)
    began = begin_verify(catalog, resume=resume, now=now)
    # Ignore a `verified_at` in the future (a wrong clock): such a pack is checked again.
    waiting = [p for p in packs if p.verified_at is None or not began <= p.verified_at < now]
    throttle = _Throttle(limit)
    count = nbytes = 0
    with (
        ThreadPoolExecutor(os.cpu_count(), "dcpstore-verify") as pool,
        ProgressBar("verify", shown=True) as bar,
        closing(PackReader(storage)) as reader,
    ):
        bar.begin("digests", sum(pack.nbytes for pack in waiting))
        for pack in waiting:
            chunks = packed_chunks(catalog, pack.key)

            def check(chunk: PackedChunk, key: str = pack.key) -> str | None:
                throttle.take(chunk.length)
                try:
                    if chunk.checksum is None:
                        check_chunk(chunk, reader.read(key, chunk.offset, chunk.length))
                    else:
                        encoded, pieces = reader.read_with_checksums(
                            key, chunk.offset, chunk.length, chunk.checksum
                        )
                        check_chunk(chunk, encoded)
                        check_pieces(encoded, pieces)
                except (CorruptionError, InvalidInputError) as error:  # its key may be invalid
                    return str(error)
                return None

            bad = []
            for chunk, reason in zip(chunks, pool.map(check, chunks), strict=True):
                bar.advance(chunk.length)
                if reason is not None:
                    bad.append(_damage(catalog, pack.key, chunk, reason))
            damage = f"{len(bad)} damaged chunks: {bad[0].reason}" if bad else None
            if found_by_quick_check(pack.damage):
                damage = pack.damage
            mark_pack(catalog, pack.key, damage=damage, verified_at=datetime.now(UTC))
            found(pack, bad)
            count += len(chunks)
            nbytes += sum(chunk.length for chunk in chunks)
    end_verify(catalog)
    return count, nbytes


def _damage(catalog: Catalog, pack: str, chunk: PackedChunk, reason: str) -> ChunkDamage:
    held = find_reached(catalog, pack, [chunk.offset])
    return ChunkDamage(
        pack=pack,
        offset=chunk.offset,
        length=chunk.length,
        part=chunk.part,
        ordinal=chunk.ordinal,
        reason=reason,
        fqns=tuple(sorted({one.fqn for one in held})),
    )


class _Throttle:
    """Delays threads so that together they read at most `limit` bytes a second."""

    def __init__(self, limit: float | None) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._free_at = time.monotonic()

    def take(self, nbytes: int) -> None:
        """Wait until `nbytes` more may be read."""
        if self._limit is None:
            return
        with self._lock:
            at = max(self._free_at, time.monotonic())
            self._free_at = at + nbytes / self._limit
        time.sleep(max(0.0, at - time.monotonic()))
