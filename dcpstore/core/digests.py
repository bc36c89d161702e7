"""Digest algorithms by name. The name is stored beside each digest, so that another can come.

A tensor, a plan, a manifest and an operation each name theirs; the digests of the chunks and the
aliases of a tensor are of the tensor's algorithm. To add one: give it a name in `_ALGORITHMS`, with
at least 32 bytes of output; `ALGORITHM` is what new contents get. Old ones keep theirs.
Source of BLAKE3: https://github.com/BLAKE3-team/BLAKE3-specs
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from blake3 import blake3
from typing_extensions import Buffer

from dcpstore.errors import SchemaError

__all__ = ["ALGORITHM", "FIRST_ALGORITHM", "Hasher", "hasher"]


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
_ALGORITHMS: dict[str, Callable[[Buffer], Hasher]] = {"blake3": blake3}


def hasher(data: Buffer = b"", *, algorithm: str = ALGORITHM) -> Hasher:
    """Return a digest that has taken in `data`, and takes more.

    Raises:
        SchemaError: this dcpstore does not know the algorithm.
    """
    make = _ALGORITHMS.get(algorithm)
    if make is None:
        raise SchemaError(
            f"a digest is by {algorithm!r}, and this dcpstore knows {', '.join(_ALGORITHMS)}; "
            "update dcpstore."
        )
    return make(data)
