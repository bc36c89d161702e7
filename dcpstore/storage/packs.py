"""Packs: stored objects that hold many encoded chunks, appended one after another.

Each rank writes its own packs, "packs/<uid>/<rank>-<n>.pack", in one sequential stream, so many
small tensors cost one file and one fsync. A pack never changes after `finish`.

Behind a chunk of more than one piece lie the checksums of its pieces (`core.checksums`), outside of
the place of the chunk. Invariant: they lie behind each chunk whose record has a checksum.
"""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import Buffer

from dcpstore.core.checksums import CHECKSUM, PIECE, joined_checksum, piece_checksums
from dcpstore.core.lru import LruCache
from dcpstore.errors import CorruptionError, NotFoundError
from dcpstore.records import ChunkPlace, PackRecord
from dcpstore.storage.interface import Range, Sink, Source, Storage

__all__ = ["PackReader", "PackWriter", "pack_key", "trailer_nbytes"]


def pack_key(uid: str, rank: int, number: int) -> str:
    """Return the key of the `number`th pack that a rank writes for version `uid`."""
    return f"packs/{uid}/{rank}-{number}.pack"


def trailer_nbytes(length: int) -> int:
    """Return how many bytes of checksums lie behind a chunk of `length` encoded bytes."""
    return 0 if length <= PIECE else -(-length // PIECE) * CHECKSUM


class PackWriter:
    """The packs of one rank in one save; used by one thread at a time.

    Args:
        storage: where to write.
        uid: of the version being saved.
        rank: of this process in the save.
        limit: bytes past which the next chunk begins a new pack.
    """

    def __init__(self, storage: Storage, uid: str, rank: int, *, limit: int = 4 << 30) -> None:
        self._storage, self._uid, self._rank, self._limit = storage, uid, rank, limit
        self._sink: Sink | None = None
        self._key = ""
        self._size = 0
        self._done: list[PackRecord] = []

    def append(self, encoded: Buffer) -> ChunkPlace:
        """Append the encoded bytes of a chunk; their place may be named once `finish` returns."""
        length = memoryview(encoded).nbytes
        trailer = trailer_nbytes(length)
        # A chunk is never split: one that is larger than the limit has a pack to itself.
        if self._sink is not None and self._size + length + trailer > self._limit:
            self._complete(self._sink)
        if self._sink is None:
            self._key = pack_key(self._uid, self._rank, len(self._done))
            self._sink = self._storage.create(self._key)
        pieces = piece_checksums(encoded)
        self._sink.write(encoded)
        if trailer:
            self._sink.write(pieces)
        place = ChunkPlace(self._key, self._size, length, joined_checksum(pieces))
        self._size += length + trailer
        return place

    def finish(self) -> list[PackRecord]:
        """Make every pack durable and return them; none if nothing was appended."""
        if self._sink is not None:
            self._complete(self._sink)
        return list(self._done)

    def discard(self) -> None:
        """Drop every pack of this writer, the finished ones too."""
        if self._sink is not None:
            self._sink.discard()
            self._sink = None
        while self._done:
            self._storage.delete(self._done.pop().key)

    def _complete(self, sink: Sink) -> None:
        sink.commit()
        self._done.append(PackRecord(self._key, self._size))
        self._sink, self._size = None, 0


class PackReader:
    """Reads chunks out of packs; safe to share between threads.

    Args:
        storage: where the packs are.
        most_open: packs kept open; the least recently used one is closed.
    """

    def __init__(self, storage: Storage, *, most_open: int = 64) -> None:
        self._storage = storage
        self._open: LruCache[str, Source] = LruCache(most_open)

    def read(self, pack: str, offset: int, length: int) -> memoryview:
        """Return the encoded bytes of one chunk: in a folder a view of the mapped pack, no copy.

        Raises:
            CorruptionError: the pack is missing or too short.
        """
        return self.read_many(pack, [(offset, length)])[0]

    def read_many(self, pack: str, ranges: Sequence[Range]) -> list[memoryview]:
        """Return the encoded bytes of many chunks of one pack; near ranges are fetched as one.

        Raises:
            CorruptionError: the pack is missing or too short.
        """
        if not ranges:
            return []
        try:
            return self._source(pack).read(ranges)
        except NotFoundError as error:
            offset, length = ranges[0]
            raise CorruptionError(
                f"pack {pack!r} is missing in {self._storage.url!r} (wanted {length} bytes at "
                f"offset {offset}); restore it from a copy, or run 'dcpstore verify' to see what "
                "is damaged."
            ) from error
        except CorruptionError as error:
            offset, length = max(ranges, key=sum)
            raise CorruptionError(
                f"pack {pack!r} is too short for {length} bytes at offset {offset}: {error}"
            ) from error

    def read_with_checksums(
        self, pack: str, offset: int, length: int, checksum: bytes
    ) -> tuple[memoryview, bytes]:
        """Return the encoded bytes of one chunk, and the joined checksums of its pieces.

        The bytes are not checked against them, but they against `checksum`, that of the chunk.

        Raises:
            CorruptionError: the pack is missing or too short, or the checksums are damaged.
        """
        places = [(offset, length), (offset + length, trailer_nbytes(length))]
        encoded, trailer = self.read_many(pack, places)
        pieces = bytes(trailer) or checksum
        if joined_checksum(pieces) != checksum:
            raise CorruptionError("the checksums behind it are damaged")
        return encoded, pieces

    def release(self, pack: str, offset: int, length: int) -> None:
        """Give back the memory of what was read there; bytes that were handed out stay valid."""
        source = self._open.get(pack)
        if source is not None:
            source.release(offset, length)

    def close(self) -> None:
        """Close every pack; bytes that were handed out stay valid."""
        self._open.clear()

    def _source(self, pack: str) -> Source:
        source = self._open.get(pack)
        if source is None:  # two threads may both open it: the one that is not kept is dropped
            source = self._storage.open(pack)
            self._open.put(pack, source)
        return source
