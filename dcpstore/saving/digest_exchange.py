"""How ranks send digests: all of them the first time, and from then on those that changed.

While a process has a repository open, each rank caches what it sent with its last version of each
global plan, and the coordinator what all ranks sent. If both have the same version, the rank sends
the difference to it. Invariant: a difference names the version that it is to, and has a digest over
all digests of its rank. So one that was made from anything else is never used: the coordinator then
asks for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dcpstore.core.digests import hasher

__all__ = [
    "CHUNK_DIGEST",
    "Difference",
    "Sent",
    "SentBefore",
    "received",
    "split",
    "to_send",
]

CHUNK_DIGEST = 32  # bytes of the digest of one chunk
_PLACE = 4  # bytes


@dataclass(frozen=True, slots=True)
class SentBefore:
    """What one rank sent with the version of this uid, each joined.

    `chunks` are the digests of its chunks, `replicas` the fingerprints of its replicas.
    """

    uid: str
    chunks: bytes
    replicas: bytes


@dataclass(frozen=True, slots=True)
class Difference:
    """The digests of one rank as a difference to those that it sent with an earlier version.

    Attributes:
        base: the uid of that version.
        count: the number of all digests.
        places: of those that changed or are new, ascending; 4 bytes each, little-endian.
        digests: of these places, joined.
        check: the digest of all digests of the rank, joined.
    """

    base: str
    count: int
    places: bytes
    digests: bytes
    check: bytes


Sent = bytes | Difference  # digests as they are sent: all of them joined, or a difference


def to_send(now: bytes, before: bytes, *, base: str, width: int) -> Sent:
    """Return what a rank sends of its digests `now`, each of `width` bytes, a multiple of 8.

    `before` are those that it sent with the version of uid `base`. All are sent if the difference
    is not shorter.
    """
    rows, known = _rows(now, width), _rows(before, width)
    shared = min(len(rows), len(known))
    changed = np.ones(len(rows), np.bool_)
    changed[:shared] = (rows[:shared] != known[:shared]).any(axis=1)
    places = np.flatnonzero(changed)
    if len(places) * (_PLACE + width) >= len(now):
        return now
    return Difference(
        base,
        len(rows),
        places.astype("<u4").tobytes(),
        rows[places].tobytes(),
        hasher(now).digest(),
    )


def received(
    sent: Sequence[Sent], before: Sequence[tuple[str, bytes]], *, width: int
) -> list[bytes] | None:
    """Return all digests of each rank, from what they sent; None if only they can give them.

    `before` are, by rank, a version's uid and the digests sent with it, as the coordinator has
    them; empty if it has none.
    """
    if not before:
        before = [("", b"")] * len(sent)
    found = []
    for one, (base, digests) in zip(sent, before, strict=True):
        if isinstance(one, Difference):
            applied = _applied(one, digests, width) if one.base == base else None
            if applied is None:
                return None
            found.append(applied)
        else:
            found.append(one)
    return found


def _applied(difference: Difference, before: bytes, width: int) -> bytes | None:
    """Return all digests, or None if the difference was not made from those `before`."""
    rows = np.zeros((difference.count, width // 8), np.uint64)
    known = _rows(before, width)[: difference.count]
    rows[: len(known)] = known
    rows[np.frombuffer(difference.places, "<u4")] = _rows(difference.digests, width)
    digests = rows.tobytes()
    return digests if hasher(digests).digest() == difference.check else None


def split(digests: bytes, width: int) -> list[bytes]:
    """Return joined digests one by one."""
    return [digests[i : i + width] for i in range(0, len(digests), width)]


def _rows(digests: bytes, width: int) -> npt.NDArray[np.uint64]:
    return np.frombuffer(digests, np.uint64).reshape(-1, width // 8)
