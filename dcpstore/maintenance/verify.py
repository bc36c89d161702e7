"""Is a repository intact: which damage the catalog and the data folder show, and what it touches.

A quick check reads no chunks: the catalog's own rules, that packs exist with the right size, and
that manifests are sound. A deep check reads every chunk that a version reaches, and the journal.
Damage is marked: no save reuses a damaged chunk, so saving the content again heals it; gc writes a
damaged manifest again, and the next change writes a damaged operation again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.maintenance.export import mark_version_stale
from dcpstore.catalog.maintenance.fsck import (
    PackState,
    Reached,
    find_faults,
    find_reached,
    list_packs,
    mark_pack,
    reached_by_tensor,
)
from dcpstore.catalog.maintenance.journal import journal_again, last_journaled
from dcpstore.catalog.maintenance.journal_files import check_owner
from dcpstore.catalog.read.log_filter import list_log
from dcpstore.catalog.read.ref_lookup import resolve
from dcpstore.errors import CorruptionError, DcpstoreError, InvalidInputError, NotFoundError
from dcpstore.formats.journal_entry import decode_operation, operation_key
from dcpstore.formats.manifest import decode_manifest, manifest_key
from dcpstore.maintenance.damage import (
    QUICK,
    ChunkDamage,
    Damage,
    DamagedVersion,
    VerifyReport,
    found_by_quick_check,
)
from dcpstore.records import Version
from dcpstore.storage.interface import Storage

__all__ = [
    "verify",
]


def verify(
    catalog: Catalog,
    storage: Storage,
    *,
    deep: bool,
    resume: bool,
    limit: float | None,
) -> VerifyReport:
    """Look at everything; with `deep`, read every chunk.

    Args:
        catalog: of the repository.
        storage: of the repository.
        deep: check the digest of every chunk that a version reaches.
        resume: go on with a deep look that did not come to its end.
        limit: most bytes a second to read.
    """
    look = _Look(catalog, storage)
    look.at_catalog()
    packs = look.at_packs()
    manifests = look.at_manifests()
    chunks = nbytes = 0
    if deep:
        from dcpstore.maintenance.deep_verify import check_packs  # noqa: PLC0415 (loads torch)

        look.at_journal()
        chunks, nbytes = check_packs(
            catalog, storage, packs, resume=resume, limit=limit, found=look.found_in_pack
        )
    damaged = look.damage()
    hurt = {n for one in damaged if one.kind != "manifest" for n in one.versions}
    return VerifyReport(
        damaged=damaged,
        versions=_with_nearest(list_log(catalog), hurt),
        packs=len(packs),
        manifests=manifests,
        chunks=chunks,
        nbytes_read=nbytes,
        deep=deep,
    )


class _Look:
    """Collects what is found; one entry for each thing that is damaged."""

    def __init__(self, catalog: Catalog, storage: Storage) -> None:
        self._catalog, self._storage = catalog, storage
        self._found: dict[tuple[str, str], Damage] = {}

    def damage(self) -> tuple[Damage, ...]:
        """Return all that was found."""
        return tuple(self._found.values())

    def at_catalog(self) -> None:
        """Look at the catalog's own rules."""
        for i, fault in enumerate(find_faults(self._catalog)):
            held = [] if fault.tensor is None else reached_by_tensor(self._catalog, fault.tensor)
            self._enter("catalog", str(i), fault.text, held)

    def at_packs(self) -> list[PackState]:
        """Look whether every pack is there whole; return them with the damage found so far."""
        packs = []
        for pack in list_packs(self._catalog):
            damage = self._quick_look(pack)
            if damage is None and not found_by_quick_check(pack.damage):
                damage = pack.damage  # for a deep look to find mended
            if damage is not None:
                self._enter_pack(pack, damage)
            if damage != pack.damage:
                mark_pack(self._catalog, pack.key, damage=damage, verified_at=None)
            packs.append(pack._replace(damage=damage))
        return packs

    def at_manifests(self) -> int:
        """Look whether the manifest of every version is sound; return how many there are."""
        versions = list_log(self._catalog)
        for version in versions:
            key = manifest_key(version.uid)
            try:
                uid = decode_manifest(self._storage.get(key)).draft.uid
                reason = None if uid == version.uid else f"it is of version {uid}"
            except NotFoundError:
                reason = "it is missing"
            except (InvalidInputError, CorruptionError) as error:
                reason = str(error)
            if reason is not None and self._is_there(version):
                self._found["manifest", key] = Damage("manifest", key, reason, (version.number,))
                mark_version_stale(self._catalog, version.number)
        return len(versions)

    def at_journal(self) -> None:
        """Look whether every operation that was written is sound; the next change mends others."""
        for number in range(1, last_journaled(self._catalog) + 1):
            key = operation_key(number)
            try:
                said = decode_operation(self._storage.get(key)).get("operation")
                reason = None if said == number else f"it is of operation {said}"
            except NotFoundError:
                reason = "it is missing"
            except (InvalidInputError, CorruptionError) as error:
                reason = str(error)
            if reason is not None:
                self._found["operation", key] = Damage("operation", key, reason)
                if number > 1 or self._is_own():
                    journal_again(self._catalog, number)

    def found_in_pack(self, pack: PackState, bad: Sequence[ChunkDamage]) -> None:
        """Take what a deep look found in one pack; nothing, where all is well."""
        if found_by_quick_check(pack.damage):  # reported already, as a whole
            return
        if not bad:
            self._found.pop(("pack", pack.key), None)
            return
        held = find_reached(self._catalog, pack.key, [chunk.offset for chunk in bad])
        if not held and not self._is_live(pack.key):  # collected while it was looked at
            return
        count = f"{len(bad)} chunk{'s' if len(bad) > 1 else ''}"
        self._enter("pack", pack.key, f"{count} damaged: {bad[0].reason}", held, bad)

    def _quick_look(self, pack: PackState) -> str | None:
        try:
            size = self._storage.size(pack.key)
        except NotFoundError:
            return (
                f"{QUICK[0]}the data folder does not hold it" if self._is_live(pack.key) else None
            )
        except (InvalidInputError, CorruptionError) as error:  # its key, or a link, leads out
            return f"{QUICK[0]}{error}"
        if size != pack.nbytes and self._is_live(pack.key):
            return f"{QUICK[1]}{size} bytes instead of {pack.nbytes}"
        return None

    def _enter_pack(self, pack: PackState, reason: str) -> None:
        self._enter("pack", pack.key, reason, find_reached(self._catalog, pack.key, None))

    def _enter(
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
        """Tell whether the first operation, which says whose data it is, is the catalog's."""
        try:
            check_owner(self._catalog, self._storage)
        except DcpstoreError:
            return False
        return True

    def _is_live(self, key: str) -> bool:
        """Tell whether a pack is one still: a collection may have been faster."""
        return any(pack.key == key for pack in list_packs(self._catalog))

    def _is_there(self, version: Version) -> bool:
        """Tell whether a version is one still: it may have expired."""
        try:
            return resolve(self._catalog, version.number).uid == version.uid
        except NotFoundError:
            return False


def _with_nearest(versions: Sequence[Version], hurt: set[int]) -> tuple[DamagedVersion, ...]:
    parents = {version.number: version.parent for version in versions}
    intact = sorted(parents.keys() - hurt)
    found = []
    for number in sorted(hurt & parents.keys()):
        nearest = parents[number]
        while nearest is not None and nearest not in intact:
            nearest = parents.get(nearest)
        if nearest is None and intact:
            nearest = min(intact, key=_distance_from(number))
        found.append(DamagedVersion(number, nearest))
    return tuple(found)


def _distance_from(number: int) -> Callable[[int], int]:
    return lambda other: abs(other - number)
