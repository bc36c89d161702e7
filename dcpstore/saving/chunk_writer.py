"""Writes one rank's packs: encodes new chunks on all cores, and appends them in order.

The first chunks may be written while others are still being digested. Invariant: when
`ChunkWriter.finish` returns, all chunks are durable (design, invariant 2).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter
from types import TracebackType

import torch
from typing_extensions import Buffer

from dcpstore.core.parallel import in_batches, run_ahead
from dcpstore.encoding.codecs import encode
from dcpstore.records import ChunkPlace, PackRecord
from dcpstore.saving.rank_chunks import RawChunk, total_nbytes
from dcpstore.storage.interface import Storage
from dcpstore.storage.packs import PackWriter

__all__ = ["ChunkWriter", "Written"]


@dataclass(frozen=True, slots=True)
class Written:
    """What a rank wrote.

    Attributes:
        places: where each chunk is, in the order in which they were given.
        packs: the packs that hold them.
        nbytes: the raw bytes of the chunks, without padding.
    """

    places: Sequence[ChunkPlace]
    packs: Sequence[PackRecord]
    nbytes: int


class ChunkWriter:
    """Writes one rank's chunks; a context manager: without `finish`, the packs are discarded.

    Args:
        storage: where to write.
        uid: of the version being saved.
        rank: of this process in the save.

    Attributes:
        pool: threads that encode; until the block ends, they also digest and compare.
    """

    def __init__(self, storage: Storage, *, uid: str, rank: int) -> None:
        self._packs = PackWriter(storage, uid, rank)
        self.pool = ThreadPoolExecutor(torch.get_num_threads(), "dcpstore-save")
        # One thread appends, so that a pack is written from its beginning to its end.
        self._appender = ThreadPoolExecutor(1, "dcpstore-write")
        self._first: Sequence[RawChunk] = ()
        self._first_places: Future[list[ChunkPlace]] | None = None
        self._is_cancelled = threading.Event()
        self._is_finished = False

    def begin(self, first: Sequence[RawChunk]) -> None:
        """Begin to write the first chunks, and return at once; `finish` raises the errors."""
        self._first = first
        self._first_places = self._appender.submit(self._write, first)

    def finish(
        self, chunks: Sequence[RawChunk], advance: Callable[[int], None] = lambda nbytes: None
    ) -> Written:
        """Write `chunks` after the first ones; return once all are durable.

        `advance` gets the number of raw bytes that were written since its last call; those of the
        first chunks count too.

        Raises:
            DcpstoreError: the storage cannot write.
        """
        places: list[ChunkPlace] = []
        if self._first_places is not None:
            places += self._first_places.result()
            advance(total_nbytes(self._first))
        places += self._write(chunks, advance)
        written = Written(
            places, self._packs.finish(), total_nbytes(self._first) + total_nbytes(chunks)
        )
        self._is_finished = True
        return written

    def __enter__(self) -> ChunkWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_cancelled.set()
        # Both threads end before the packs are discarded, so nothing is appended afterwards.
        self._appender.shutdown()
        self.pool.shutdown()
        if not self._is_finished:
            self._packs.discard()

    def _write(
        self, chunks: Sequence[RawChunk], advance: Callable[[int], None] = lambda nbytes: None
    ) -> list[ChunkPlace]:
        places: list[ChunkPlace] = []
        batches = in_batches(chunks, attrgetter("nbytes"))
        for batch, encoded in run_ahead(self.pool, _encode_all, batches):
            if self._is_cancelled.is_set():
                raise CancelledError
            places += map(self._packs.append, encoded)
            advance(total_nbytes(batch))
        return places


def _encode_all(chunks: Sequence[RawChunk]) -> list[Buffer]:
    return [encode(chunk.codec, chunk.raw().data, chunk.itemsize) for chunk in chunks]
