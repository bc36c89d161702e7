"""Stored chunks checked one by one, out of the context of any version."""

from __future__ import annotations

import math

from typing_extensions import Buffer

from dcpstore.catalog.checking import PackedChunk
from dcpstore.encoding.codecs import check_held, decode
from dcpstore.encoding.digests import chunk_digest
from dcpstore.encoding.dtypes import numpy_dtype
from dcpstore.errors import CorruptionError

__all__ = ["check_chunk"]


def check_chunk(chunk: PackedChunk, encoded: Buffer) -> None:
    """Raise CorruptionError unless `encoded` holds what the digest of the chunk says."""
    nbytes = numpy_dtype(chunk.dtype).itemsize * math.prod(chunk.chunk_shape)
    raw: Buffer = encoded
    if chunk.codec == "none":
        if memoryview(encoded).nbytes != nbytes:
            raise CorruptionError(
                f"{memoryview(encoded).nbytes} bytes are stored and {nbytes} are needed"
            )
    else:
        check_held(chunk.codec, encoded, nbytes)
        raw = bytearray(nbytes)
        decode(chunk.codec, encoded, raw)
    if chunk_digest(raw) != chunk.digest:
        raise CorruptionError("its bytes are not what its digest says")
