"""The deep check of packs: every chunk is read and compared with its digest, on all cores.

The result of each pack is kept in the catalog at once, so an interrupted check can be resumed.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.maintenance.fsck import (
    PackedChunk,
    PackState,
    begin_verify,
    end_verify,
    find_reached,
    mark_pack,
    packed_chunks,
)
from dcpstore.core.progress import ProgressBar
from dcpstore.errors import CorruptionError, InvalidInputError
from dcpstore.maintenance.damage import ChunkDamage, found_by_quick_check
from dcpstore.reading.chunk_reads import check_chunk
from dcpstore.storage.interface import Storage
from dcpstore.storage.packs import PackReader

__all__ = ["check_packs"]

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

    `found` hears of each pack when it was looked at. With `resume`, packs that the look which is
    gone on with has passed already are left out.
    """
    now = datetime.now(UTC)
    began = begin_verify(catalog, resume=resume, now=now)
    # what was looked at in the future, by a clock that was wrong then, is looked at again
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
                    check_chunk(chunk, reader.read(key, chunk.offset, chunk.length))
                except (CorruptionError, InvalidInputError) as error:  # its key may be none
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
    """Holds threads back so that together they read no more than `limit` bytes a second."""

    def __init__(self, limit: float | None) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._free_at = time.monotonic()

    def take(self, nbytes: int) -> None:
        """Wait for the turn of `nbytes`."""
        if self._limit is None:
            return
        with self._lock:
            at = max(self._free_at, time.monotonic())
            self._free_at = at + nbytes / self._limit
        time.sleep(max(0.0, at - time.monotonic()))
