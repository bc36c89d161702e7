"""Digests of chunks and tensors, by algorithms whose names are stored beside them.

Equal digests stand for equal bytes everywhere in a repository: deduplication and verification rely
on it. A tensor, a plan, a manifest and an operation each name their algorithm, so that another one
can be added; the chunks and aliases of a tensor use the tensor's algorithm. To add one, give it a
name in `ALGORITHMS`, with 32 bytes of output. `ALGORITHM` is used for new contents; old ones keep
theirs. Source of BLAKE3: https://github.com/BLAKE3-team/BLAKE3-specs
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
    "RUN",
    "Hasher",
    "chunk_digest",
    "content_digest",
    "hasher",
    "run_digest",
]


class Hasher(Protocol):
    """A digest that is being computed; the methods are those of `hashlib`."""

    def update(self, data: Buffer, /) -> object:
        """Add bytes."""

    def digest(self) -> bytes:
        """Return the digest of all bytes added so far, as 32 bytes."""

    def hexdigest(self) -> str:
        """Return the same digest as 64 hex digits."""


FIRST_ALGORITHM = "blake3"  # of data written before each digest had its algorithm beside it
ALGORITHM = "blake3"
RUN = 16  # chunks in a run: a tensor with more is stored as runs, the last one with what is left
ALGORITHMS: dict[str, Callable[[Buffer], Hasher]] = {"blake3": blake3}


def hasher(data: Buffer = b"", *, algorithm: str = ALGORITHM) -> Hasher:
    """Return a digest of `data`, to which more bytes can be added.

    Raises:
        SchemaError: this dcpstore does not know the algorithm.
    """
    make = ALGORITHMS.get(algorithm)
    if make is None:
        raise SchemaError(
            f"unknown digest algorithm {algorithm!r}; this dcpstore knows {', '.join(ALGORITHMS)}. "
            "Update dcpstore."
        )
    return make(data)


def chunk_digest(raw: Buffer, *, algorithm: str = ALGORITHM) -> bytes:
    """Return the 32-byte digest of the raw bytes of a chunk.

    Copies nothing, and other threads run meanwhile.

    Args:
        raw: contiguous unsigned bytes; pass an array of another dtype as a view of uint8.
        algorithm: its name.

    Raises:
        BufferError: `raw` is not contiguous, or its elements are not bytes.
    """
    return hasher(raw, algorithm=algorithm).digest()


def content_digest(
    dtype: str,
    shape: Sequence[int],
    parts: Sequence[Grid],
    chunk_digests: Iterable[bytes],
    *,
    algorithm: str = ALGORITHM,
) -> str:
    """Return the hex digest of a tensor's content: its dtype, shape, grids and chunk digests.

    The codec is not part of it: it changes the stored bytes, not the content.

    Args:
        dtype: torch's name.
        shape: of the whole tensor, in elements.
        parts: its chunk grids, in their order.
        chunk_digests: in the order of (part, ordinal).
        algorithm: of these digests, and of the result.
    """
    header = _content_header(dtype, tuple(shape), tuple(parts))
    return hasher(header + b"".join(chunk_digests), algorithm=algorithm).hexdigest()


def run_digest(codec: str, chunk_digests: Iterable[bytes], *, algorithm: str = ALGORITHM) -> bytes:
    """Return the 32-byte digest of a run: consecutive chunks that large tensors share.

    The codec is part of it, for a run has one place for each of its chunks, and a chunk is stored
    once a codec.

    Args:
        codec: of the tensors that have the run.
        chunk_digests: at most `RUN`, in order; digests of 32 bytes.
        algorithm: of these digests, and of the result.
    """
    head = f"dcpstore run\n{codec}\n".encode()
    return hasher(head + b"".join(chunk_digests), algorithm=algorithm).digest()


@lru_cache(4096)
def _content_header(dtype: str, shape: tuple[int, ...], parts: tuple[Grid, ...]) -> bytes:
    """Return the bytes before the chunk digests: the length of a JSON text, and the text.

    Cached, for thousands of tensors share a few shapes and grids.
    """
    header = json.dumps([dtype, shape, [[p.offsets, p.shape, p.chunk_shape] for p in parts]])
    return len(header).to_bytes(8, "little") + header.encode()
