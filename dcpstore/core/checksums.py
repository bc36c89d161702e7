"""Fast checksums of stored bytes: XXH3 of 128 bits, of pieces that fit into the cache of a core.

They cover the encoded bytes of a chunk, before anything is decoded, and find damage, not malice: a
content is addressed by its digest (`core.digests`), never by these. A chunk has one checksum in its
record. One of a single piece has the piece's; one of more has the checksum of its pieces' checksums
joined, which lie behind it in its pack.
Source: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
"""

from __future__ import annotations

import xxhash
from typing_extensions import Buffer

from dcpstore.errors import CorruptionError

__all__ = ["CHECKSUM", "PIECE", "check_pieces", "checksum", "joined_checksum", "piece_checksums"]

PIECE = 256 << 10  # bytes; a piece is checked, then copied while it is in the cache
CHECKSUM = 16  # bytes of one checksum
# xxhash lets other threads run where it gets more bytes than this at once. That takes longer than
# the hashing where another thread is busy with Python: it takes 5 ms to get the interpreter back.
_AT_ONCE = 64 << 10


def checksum(data: Buffer) -> bytes:
    """Return the checksum of contiguous bytes: 16 bytes, the most significant one first."""
    view = _as_bytes(data)
    if len(view) <= _AT_ONCE:
        return xxhash.xxh3_128_digest(view)
    hasher = xxhash.xxh3_128()
    for start in range(0, len(view), _AT_ONCE):
        hasher.update(view[start : start + _AT_ONCE])
    return hasher.digest()


def piece_checksums(encoded: Buffer) -> bytes:
    """Return the checksums of the pieces of a chunk's encoded bytes, joined; at least one.

    Copies nothing.
    """
    view = _as_bytes(encoded)
    if len(view) <= PIECE:
        return checksum(view)
    return b"".join(checksum(view[start : start + PIECE]) for start in range(0, len(view), PIECE))


def joined_checksum(pieces: bytes) -> bytes:
    """Return the one checksum of a chunk, by the joined checksums of its pieces."""
    return pieces if len(pieces) == CHECKSUM else checksum(pieces)


def check_pieces(encoded: Buffer, pieces: bytes) -> None:
    """Check the encoded bytes of a chunk against the joined checksums of its pieces.

    Raises:
        CorruptionError: a piece does not match.
    """
    found = piece_checksums(encoded)
    if found == pieces:
        return
    starts = range(0, len(found), CHECKSUM)
    # A record may hold more or fewer than 16 bytes: then none of the pieces needs to differ.
    first = next((i for i in starts if found[i : i + CHECKSUM] != pieces[i : i + CHECKSUM]), 0)
    raise CorruptionError(
        f"its piece at byte {first // CHECKSUM * PIECE} does not match its checksum"
    )


def _as_bytes(data: Buffer) -> memoryview:
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")  # no empty array can be cast
