"""One rank's packs: the chunks that nobody holds yet, encoded on all cores, appended in order.

Invariant: what `write_chunks` returns is durable (design, invariant 2).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from operator import attrgetter

from typing_extensions import Buffer

from dcpstore.batches import in_batches
from dcpstore.encoding.codecs import encode
from dcpstore.records import ChunkPlace, PackRecord
from dcpstore.saving.chunking import RawChunk, total_nbytes
from dcpstore.storage.interface import Storage
from dcpstore.storage.packs import PackWriter

__all__ = ["Written", "write_chunks"]

_AHEAD = 4  # encoded batches that may wait for the disk, which bounds their memory


@dataclass(frozen=True, slots=True)
class Written:
    """Where the chunks that a rank was asked to write lie, in that order, and its packs.

    `nbytes` are the raw bytes of the chunks, without padding.
    """

    places: Sequence[ChunkPlace]
    packs: Sequence[PackRecord]
    nbytes: int


def write_chunks(
    chunks: Sequence[RawChunk],
    storage: Storage,
    *,
    uid: str,
    rank: int,
    pool: Executor,
    advance: Callable[[int], None],
) -> Written:
    """Encode and write `chunks`; return their places once all is durable.

    Raises:
        DcpstoreError: the storage refuses; what was written of it is discarded.
    """
    writer = PackWriter(storage, uid, rank)
    places: list[ChunkPlace] = []
    try:
        for batch, encoded in _encoded(chunks, pool):
            places += map(writer.append, encoded)
            advance(total_nbytes(batch))
        return Written(places, writer.finish(), total_nbytes(chunks))
    except BaseException:
        writer.discard()
        raise


def _encoded(
    chunks: Sequence[RawChunk], pool: Executor
) -> Iterator[tuple[Sequence[RawChunk], list[Buffer]]]:
    """Yield batches of chunks with their encoded bytes, in order, a few ahead of the writer."""
    waiting: deque[tuple[Sequence[RawChunk], Future[list[Buffer]]]] = deque()
    for batch in in_batches(chunks, attrgetter("nbytes")):
        waiting.append((batch, pool.submit(_encode_all, batch)))
        if len(waiting) > _AHEAD:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()


def _encode_all(chunks: Sequence[RawChunk]) -> list[Buffer]:
    return [encode(chunk.codec, chunk.raw().data, chunk.itemsize) for chunk in chunks]
