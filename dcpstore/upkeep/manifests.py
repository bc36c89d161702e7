"""Manifests written anew from the catalog, where chunks moved.

Invariant: a pack is not deleted while a manifest names it, and none names a pack that the journal
has not heard of, so plain Zarr and a rebuild find every committed version at any time.
"""

from __future__ import annotations

from dcpstore.catalog import Catalog
from dcpstore.errors import CorruptionError, NotFoundError
from dcpstore.journal import write_journal
from dcpstore.storage.interface import Storage
from dcpstore.zarr_view.manifests import write_manifest

__all__ = ["renew_manifests"]


def renew_manifests(catalog: Catalog, storage: Storage) -> int:
    """Write the manifests anew that name places of the past; return how many.

    None while the journal cannot be written: they stay marked, for the next collection.
    """
    upkeep = catalog.upkeep()
    renewed = 0
    tried: set[tuple[int, str]] = set()
    while new := [found for found in upkeep.stale_versions().items() if found not in tried]:
        for number, mark in new:
            tried.add((number, mark))
            try:
                draft, content = upkeep.content(number)
            except (NotFoundError, CorruptionError):  # expired meanwhile; or for verify to report
                continue
            if not write_journal(catalog, storage):  # of what moved until the content was read
                return renewed
            write_manifest(storage, draft, content, content.records())
            # Where chunks moved again since, the mark is another, and the loop comes back to it.
            renewed += upkeep.clear_stale(number, mark)
    return renewed
