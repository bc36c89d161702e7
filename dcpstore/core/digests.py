"""Digests of chunks, tensors and texts, by algorithms whose names are stored beside them.

Equal digests stand for equal bytes everywhere in a repository: dedupe and verification rest on it.
A tensor, a plan, a manifest and an operation each name their algorithm, so that another can come;
the digests of the chunks and the aliases of a tensor are of the tensor's algorithm. To add one:
give it a name in `ALGORITHMS`, with 32 bytes of output; `ALGORITHM` is what new contents get. Old
ones keep theirs. Source of BLAKE3: https://github.com/BLAKE3-team/BLAKE3-specs
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Protocol

from blake3 import blake3
from typing_extensions import Buffer

from dcpstore.errors import SchemaError
from dcpstore.geometry.grids import Grid

__all__ = [
    "ALGORITHM",
    "ALGORITHMS",
    "FIRST_ALGORITHM",
    "Hasher",
    "chunk_digest",
    "content_digest",
    "hasher",
    "text_digest",
]


class Hasher(Protocol):
    """A digest in the making, as `hashlib` has them."""

    def update(self, data: Buffer, /) -> object:
        """Take in more bytes."""

    def digest(self) -> bytes:
        """Return the digest of all bytes until now: 32 bytes."""

    def hexdigest(self) -> str:
        """Return the digest as 64 hex digits."""


FIRST_ALGORITHM = "blake3"  # of what was written before the name stood beside each digest
ALGORITHM = "blake3"
ALGORITHMS: dict[str, Callable[[Buffer], Hasher]] = {"blake3": blake3}


def hasher(data: Buffer = b"", *, algorithm: str = ALGORITHM) -> Hasher:
    """Return a digest that has taken in `data`, and takes more.

    Raises:
        SchemaError: this dcpstore does not know the algorithm.
    """
    make = ALGORITHMS.get(algorithm)
    if make is None:
        raise SchemaError(
            f"a digest is by {algorithm!r}, and this dcpstore knows {', '.join(ALGORITHMS)}; "
            "update dcpstore."
        )
    return make(data)


def chunk_digest(raw: Buffer, *, algorithm: str = ALGORITHM) -> bytes:
    """Return the 32-byte digest of the raw bytes of a chunk, which must be contiguous.

    Copies nothing, and lets other threads run meanwhile.
    """
    import numpy as np  # noqa: PLC0415 (the command line starts without it)

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
