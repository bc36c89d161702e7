"""Digests of raw bytes for a chunk, and of what a tensor is made of for its content.

Equal digests stand for equal bytes everywhere in a repository: dedupe and verification rest on it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
from typing_extensions import Buffer

from dcpstore.core.digests import ALGORITHM, hasher
from dcpstore.geometry.grids import Grid

__all__ = ["chunk_digest", "content_digest", "text_digest"]


def chunk_digest(raw: Buffer, *, algorithm: str = ALGORITHM) -> bytes:
    """Return the 32-byte digest of the raw bytes of a chunk, which must be contiguous.

    Copies nothing, and lets other threads run meanwhile.
    """
    return hasher(np.frombuffer(memoryview(raw), np.uint8).data, algorithm=algorithm).digest()


def content_digest(
    dtype: str, shape: Sequence[int], parts: Sequence[Grid], chunk_digests: Iterable[bytes]
) -> str:
    """Return the hex digest of a tensor's content: its dtype, shape, grids and chunk digests.

    The codec is left out: it changes the stored bytes, not the content.

    Args:
        dtype: torch's name.
        shape: of the whole tensor, in elements.
        parts: its chunk grids, in their order.
        chunk_digests: in order of (part, ordinal).
    """
    header = _content_header(dtype, tuple(shape), tuple(parts))
    return hasher(header + b"".join(chunk_digests)).hexdigest()


@lru_cache(4096)
def _content_header(dtype: str, shape: tuple[int, ...], parts: tuple[Grid, ...]) -> bytes:
    """Return what stands before the chunk digests: JSON behind its length; few are distinct."""
    header = json.dumps([dtype, shape, [[p.offsets, p.shape, p.chunk_shape] for p in parts]])
    return len(header).to_bytes(8, "little") + header.encode()


def text_digest(text: str) -> str:
    """Return the hex digest of a text's UTF-8 bytes."""
    return hasher(text.encode()).hexdigest()
