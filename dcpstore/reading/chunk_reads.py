"""Chunks: read from their packs, decoded, and checked against their digests.

Invariant: no byte is returned before the digest of its chunk has been checked, unless the caller
turned that off (design, invariant 6).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

from dcpstore.catalog.maintenance.fsck import PackedChunk
from dcpstore.core.digests import chunk_digest
from dcpstore.encoding.codecs import check_held, decode, unencoded
from dcpstore.encoding.dtypes import numpy_dtype
from dcpstore.errors import CorruptionError
from dcpstore.records import EntryRecord, StoredChunk, TensorRecord
from dcpstore.storage.packs import PackReader

__all__ = ["ChunkReader", "Wanted", "check_chunk"]

Wanted = tuple[EntryRecord, StoredChunk]  # a chunk, and an entry whose tensor it belongs to


class ChunkReader:
    """Reads chunks of one version's tensors; many threads may share it."""

    def __init__(self, packs: PackReader, *, version: int, verify: bool) -> None:
        self._packs = packs
        self._version = version
        self._verify = verify
        self._scratch = threading.local()

    def read(self, entry: EntryRecord, chunk: StoredChunk) -> npt.NDArray[np.generic]:
        """Return a chunk of the entry's tensor as an array of its grid's cell, with padding.

        The array is valid until this thread reads the next chunk.

        Raises:
            CorruptionError: naming version, FQN, chunk, pack and offset.
        """
        return self._checked((entry, chunk), self._found((entry, chunk)))

    def read_all(self, wanted: Sequence[Wanted]) -> Iterator[npt.NDArray[np.generic]]:
        """Yield each chunk as `read` returns it; all are in one pack, and are fetched at once.

        After the last one, the memory of their stored bytes is released.

        Raises:
            CorruptionError: as `read`.
        """
        pack = wanted[0][1].pack
        ranges = [(chunk.offset, chunk.length) for _, chunk in wanted]
        try:
            found = self._packs.read_many(pack, ranges)
        except CorruptionError:
            # Read one by one, so that the error names the damaged chunk.
            found = [self._found(one) for one in wanted]
        for one, encoded in zip(wanted, found, strict=True):
            yield self._checked(one, encoded)
        first = min(offset for offset, _ in ranges)
        self._packs.release(pack, first, max(map(sum, ranges)) - first)

    def _found(self, wanted: Wanted) -> memoryview:
        _, chunk = wanted
        try:
            return self._packs.read(chunk.pack, chunk.offset, chunk.length)
        except CorruptionError as error:
            raise self._named(wanted, error) from error

    def _checked(self, wanted: Wanted, encoded: memoryview) -> npt.NDArray[np.generic]:
        entry, chunk = wanted
        assert entry.tensor is not None
        try:
            return self._array(entry.tensor, chunk, encoded)
        except CorruptionError as error:
            raise self._named(wanted, error) from error

    def _named(self, wanted: Wanted, error: CorruptionError) -> CorruptionError:
        entry, chunk = wanted
        return CorruptionError(
            f"v{self._version}: {entry.fqn!r}: chunk {chunk.ordinal} of part {chunk.part} in "
            f"pack {chunk.pack} at offset {chunk.offset}, length {chunk.length}: {error}. "
            "Restore the pack from a backup, or load another version."
        )

    def _array(
        self, tensor: TensorRecord, chunk: StoredChunk, encoded: memoryview
    ) -> npt.NDArray[np.generic]:
        shape = tensor.parts[chunk.part].chunk_shape
        dtype = numpy_dtype(tensor.dtype)
        raw = _decoded(tensor.codec, encoded, dtype.itemsize * math.prod(shape), self._buffer)
        if self._verify:
            _check_digest(raw, chunk.digest, tensor.algorithm)
        return np.frombuffer(raw, dtype).reshape(shape)

    def _buffer(self, nbytes: int) -> memoryview:
        """Return this thread's scratch memory."""
        kept: bytearray | None = getattr(self._scratch, "kept", None)
        if kept is None or len(kept) < nbytes:
            kept = self._scratch.kept = bytearray(nbytes)
        return memoryview(kept)[:nbytes]


def check_chunk(chunk: PackedChunk, encoded: Buffer) -> None:
    """Check that `encoded` has the digest of the chunk.

    Raises:
        CorruptionError: it has not, or cannot be decoded.
    """
    nbytes = numpy_dtype(chunk.dtype).itemsize * math.prod(chunk.chunk_shape)
    raw = _decoded(chunk.codec, memoryview(encoded).cast("B"), nbytes, bytearray)
    _check_digest(raw, chunk.digest, chunk.algorithm)


def _decoded(
    codec: str, encoded: memoryview, nbytes: int, make_buffer: Callable[[int], Buffer]
) -> memoryview:
    """Return the raw bytes of a chunk, without a copy if they are stored as they are."""
    raw = unencoded(codec, encoded, nbytes)
    if raw is None:
        check_held(codec, encoded, nbytes)  # a damaged size must not allocate memory
        raw = memoryview(make_buffer(nbytes))
        decode(codec, encoded, raw)
    return raw


def _check_digest(raw: Buffer, digest: bytes, algorithm: str) -> None:
    if chunk_digest(raw, algorithm=algorithm) != digest:
        raise CorruptionError("its bytes do not match its digest")
