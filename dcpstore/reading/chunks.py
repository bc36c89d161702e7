"""One chunk at a time, out of its pack: raw bytes whose digest has been checked.

Invariant: no byte leaves here before the digest of its chunk has been checked, unless the caller
asked for none (design, invariant 6).
"""

from __future__ import annotations

import math
import threading

import numpy as np
import numpy.typing as npt

from dcpstore.encoding.codecs import decode
from dcpstore.encoding.digests import chunk_digest
from dcpstore.encoding.dtypes import numpy_dtype
from dcpstore.errors import CorruptionError
from dcpstore.records import EntryRecord, StoredChunk, TensorRecord
from dcpstore.storage.packs import PackReader

__all__ = ["ChunkReader"]


class ChunkReader:
    """Reads chunks of one version's tensors; many threads may share it."""

    def __init__(self, packs: PackReader, *, version: int, verify: bool) -> None:
        self._packs = packs
        self._version = version
        self._verify = verify
        self._scratch = threading.local()

    def read(self, entry: EntryRecord, chunk: StoredChunk) -> npt.NDArray[np.generic]:
        """Return a chunk of the entry's tensor as an array of its grid's cell, padding included.

        It is good until this thread reads the next one.

        Raises:
            CorruptionError: naming version, FQN, chunk, pack and offset.
        """
        tensor = entry.tensor
        assert tensor is not None
        try:
            return self._array(tensor, chunk)
        except CorruptionError as error:
            raise CorruptionError(
                f"v{self._version}: {entry.fqn!r}: chunk {chunk.ordinal} of part {chunk.part} in "
                f"pack {chunk.pack} at offset {chunk.offset}, length {chunk.length}: {error}. "
                "Restore the pack from a backup, or load another version."
            ) from error

    def _array(self, tensor: TensorRecord, chunk: StoredChunk) -> npt.NDArray[np.generic]:
        shape = tensor.parts[chunk.part].chunk_shape
        dtype = numpy_dtype(tensor.dtype)
        nbytes = dtype.itemsize * math.prod(shape)
        encoded = self._packs.read(chunk.pack, chunk.offset, chunk.length)
        if tensor.codec == "none":
            if len(encoded) != nbytes:
                raise CorruptionError(f"{len(encoded)} bytes are stored and {nbytes} are needed")
            raw = encoded
        else:
            raw = self._buffer(nbytes)
            decode(tensor.codec, encoded, raw)
        if self._verify and chunk_digest(raw) != chunk.digest:
            raise CorruptionError("its bytes are not what its digest says")
        return np.frombuffer(raw, dtype).reshape(shape)

    def _buffer(self, nbytes: int) -> memoryview:
        """Return this thread's scratch memory."""
        kept: bytearray | None = getattr(self._scratch, "kept", None)
        if kept is None or len(kept) < nbytes:
            kept = self._scratch.kept = bytearray(nbytes)
        return memoryview(kept)[:nbytes]
