"""Packs and manifests that are replaced while their versions stay readable.

The live chunks of a pack that is mostly garbage are copied to a new pack, and the old one is
condemned: the new pack is durable before one transaction moves the chunks to it, and a reader that
has the old places finds the old pack until its grace time ends. Then the manifests of those
versions are written again from the catalog. Invariant: a pack is not deleted while a manifest names
it, and no manifest names a pack that the journal does not have, so plain Zarr and a rebuild find
every committed version at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.maintenance.condemn import plan_pack, switch_pack, unplan_pack
from dcpstore.catalog.maintenance.export import load_content
from dcpstore.catalog.maintenance.fsck import packed_chunks
from dcpstore.catalog.maintenance.journal import write_journal
from dcpstore.catalog.write.stale import clear_stale, stale_versions
from dcpstore.core.uids import new_uid
from dcpstore.errors import CorruptionError, NotFoundError
from dcpstore.reading.chunk_reads import check_chunk
from dcpstore.records import ChunkPlace, PackRecord
from dcpstore.storage.interface import Storage
from dcpstore.storage.packs import PackReader, PackWriter, pack_key
from dcpstore.zarr.documents import write_manifest

__all__ = ["renew_manifests", "repack"]

_WHOLE = 1 << 62  # bytes: no limit, so that the chunks of one pack go into one pack


def renew_manifests(catalog: Catalog, storage: Storage) -> int:
    """Rewrite the manifests that name packs which their chunks have left; return how many.

    If the journal cannot be written, they stay marked, and the next collection writes them.
    """
    renewed = 0
    tried: set[tuple[int, str]] = set()
    while new := [found for found in stale_versions(catalog).items() if found not in tried]:
        for number, mark in new:
            tried.add((number, mark))
            try:
                draft, content = load_content(catalog, number)
            except (NotFoundError, CorruptionError):  # expired meanwhile; or for verify to report
                continue
            if not write_journal(catalog, storage):  # of what moved until the content was read
                return renewed
            write_manifest(storage, draft, content, content.records())
            # If chunks moved again since, the mark has changed, and the loop finds it again.
            renewed += clear_stale(catalog, number, mark)
    return renewed


def repack(
    catalog: Catalog, storage: Storage, packs: Sequence[PackRecord], *, author: str
) -> list[tuple[PackRecord, PackRecord]]:
    """Copy the live chunks of each pack to a new one; return the pairs, old and new.

    A pack that turns out damaged stays as it is, for verify to report.
    """
    uid = new_uid()
    done = []
    for rank, old in enumerate(packs):
        key = pack_key(uid, rank, 0)
        if not plan_pack(catalog, old.key, key, now=datetime.now(UTC)):
            continue
        # One old pack becomes one new pack, so that one transaction can replace it.
        writer = PackWriter(storage, uid, rank, limit=_WHOLE)
        try:
            moves = _copy(catalog, storage, old, writer)
            made = writer.finish()
        except CorruptionError:
            writer.discard()
            unplan_pack(catalog, key)
            continue
        except BaseException:
            writer.discard()
            raise
        if not made:  # meanwhile another collection moved its last live chunk
            unplan_pack(catalog, key)
            continue
        (new,) = made
        if switch_pack(catalog, old.key, new, moves, now=datetime.now(UTC), author=author):
            done.append((old, new))
    return done


def _copy(
    catalog: Catalog, storage: Storage, old: PackRecord, writer: PackWriter
) -> dict[int, ChunkPlace]:
    """Append every chunk of `old` that is reached; return the new places by the old offsets."""
    moves: dict[int, ChunkPlace] = {}
    with closing(PackReader(storage)) as packs:
        for chunk in packed_chunks(catalog, old.key):
            encoded = packs.read(old.key, chunk.offset, chunk.length)
            check_chunk(chunk, encoded)
            if chunk.offset not in moves:
                moves[chunk.offset] = writer.append(encoded)
    return moves
