"""Packs, pages and manifests that are replaced while their versions stay readable.

The live chunks of a pack that is mostly garbage are copied to a new pack, and the old one is
condemned: the new pack is durable before one transaction moves the chunks to it, and a reader that
has the old places finds the old pack until its grace time ends. Then the pages that name these
chunks are written again from the catalog, under their keys. Invariant: a pack is not deleted while
a page names it, and no page names a pack that the journal does not have, so plain Zarr and a
rebuild find every committed version at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from typing import TypeVar

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.maintenance.condemn import plan_pack, switch_pack, unplan_pack
from dcpstore.catalog.maintenance.export import load_content
from dcpstore.catalog.maintenance.fsck import packed_chunks
from dcpstore.catalog.maintenance.journal import write_journal
from dcpstore.catalog.read.stored_pages import load_page, load_plan_of
from dcpstore.catalog.write.pages import home_objects
from dcpstore.catalog.write.stale import (
    clear_stale,
    clear_stale_page,
    stale_pages,
    stale_versions,
)
from dcpstore.core.uids import new_uid
from dcpstore.errors import ConflictError, CorruptionError, NotFoundError
from dcpstore.formats.plan import encode_plan
from dcpstore.reading.chunk_reads import check_chunk
from dcpstore.records import ChunkPlace, PackRecord
from dcpstore.storage.interface import Storage
from dcpstore.storage.packs import PackReader, PackWriter, pack_key
from dcpstore.zarr.stored_references import write_reference
from dcpstore.zarr.version_objects import write_objects, write_page

__all__ = ["renew_objects", "repack"]

K = TypeVar("K", int, str)

_WHOLE = 1 << 62  # bytes: no limit, so that the chunks of one pack go into one pack


def renew_objects(catalog: Catalog, storage: Storage) -> int:
    """Write again what names places that chunks have left; return how many objects that were.

    A version without pages, as an upgrade leaves it, gets pages and a manifest that names them. If
    the journal cannot be written, what is stale stays marked, for the next collection.
    """
    pages = _renewed(
        lambda: stale_pages(catalog), lambda key, mark: _renew_page(catalog, storage, key, mark)
    )
    return pages + _renewed(
        lambda: stale_versions(catalog),
        lambda number, mark: _renew_version(catalog, storage, number, mark),
    )


def _renewed(find: Callable[[], Mapping[K, str]], renew: Callable[[K, str], bool | None]) -> int:
    """Renew what `find` finds, with its mark, until nothing new is found; return how many."""
    renewed = 0
    tried: set[tuple[K, str]] = set()
    while new := [found for found in find().items() if found not in tried]:
        for key, mark in new:
            tried.add((key, mark))
            done = renew(key, mark)
            if done is None:
                return renewed
            # If chunks moved again since, the mark has changed, and the loop finds it again.
            renewed += done
    return renewed


def _renew_page(catalog: Catalog, storage: Storage, key: str, mark: str) -> bool | None:
    """Write a page or plan again; None if the journal could not be written."""
    runs: dict[bytes, str] = {}
    try:
        if key.startswith("plans/"):
            plan = load_plan_of(catalog, key)
            if plan is None:  # no version has it any more, so gc deletes the object
                return False
            data = encode_plan(plan)
            storage.put(key, data)
            nbytes = len(data)
        else:
            page = load_page(catalog, key)
            if not write_journal(catalog, storage):  # of what moved until the page was read
                return None
            nbytes = write_page(storage, key, page)
            runs = {run.digest: key for run in page.runs}
    except CorruptionError:  # for verify to report
        return False
    return clear_stale_page(catalog, key, mark, nbytes=nbytes, runs=runs)


def _renew_version(catalog: Catalog, storage: Storage, number: int, mark: str) -> bool | None:
    """Write manifest and reference of a version; None if the journal could not be written."""
    try:
        draft, content = load_content(catalog, number)
    except (NotFoundError, CorruptionError):  # expired meanwhile; or for verify to report
        return False
    if not write_journal(catalog, storage):
        return None
    try:
        # Under another uid, for the version may have a page already.
        content = write_objects(catalog, storage, draft, content, uid=new_uid())
        assert content.objects is not None
        home_objects(catalog, number, content.objects)
        if draft.tags:
            write_reference(storage, draft.uid)
    except (ConflictError, NotFoundError):  # a save was faster, or gc: the next one tries again
        return False
    return clear_stale(catalog, number, mark)


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
