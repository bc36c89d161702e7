"""JSON objects behind their digest, so that damage is found before anything is used.

A sealed object begins with `{"<kind>": <version>, "digest": "<hex>", "algorithm": "<name>", `. The
digest covers everything after it, with a brace in front; `algorithm` was left out while it could
only be BLAKE3. The digest does not cover the version, so the code that decodes an object must
refuse each version that it does not know.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dcpstore.core.digests import ALGORITHM, ALGORITHMS, FIRST_ALGORITHM, hasher
from dcpstore.errors import CorruptionError

__all__ = ["check_seal", "kind_of", "seal"]

_HEAD = re.compile(
    rb'\{"([a-z]+)": ([0-9]{1,9}), "digest": "([0-9a-f]{64})", '
    rb'(?="algorithm": "([A-Za-z0-9_.-]{1,40})", )?'  # a damaged quote leaves no name
)


def seal(kind: str, version: int, members: Sequence[bytes]) -> bytes:
    """Return a sealed object; `members` is what follows the head, in pieces, to its last brace."""
    named = f'"algorithm": "{ALGORITHM}", '.encode()
    head = f'{{"{kind}": {version}, "digest": "{_digest(ALGORITHM, named, *members)}", '.encode()
    return b"".join([head, named, *members])


def kind_of(data: bytes) -> str | None:
    """Return the kind of a sealed object, or None if it is not one; nothing of it is checked."""
    head = _HEAD.match(data)
    return None if head is None else head[1].decode()


def check_seal(data: bytes, kind: str, *, what: str) -> int:
    """Return the version of an object whose digest is right.

    Raises:
        CorruptionError: it is damaged or is not such an object.
        SchemaError: its digest is by an algorithm that this dcpstore does not know.
    """
    head = _HEAD.match(data)
    if head is None or head[1] != kind.encode():
        raise CorruptionError(f"not a {what}: it begins with {bytes(data[:40])!r}")
    named = FIRST_ALGORITHM if head[4] is None else head[4].decode("latin-1")
    rest = memoryview(data)[head.end() :]
    if named not in ALGORITHMS:
        mended = f'"algorithm": "{ALGORITHM}"'.encode(), rest[len('"algorithm": ""' + named) :]
        if _digest(ALGORITHM, *mended) == head[3].decode():
            raise CorruptionError(f"the {what} is damaged: it names the algorithm {named!r}")
    found = _digest(named, rest)
    if found != head[3].decode():
        raise CorruptionError(
            f"the {what} is damaged: its digest is {found}, not {head[3].decode()}"
        )
    return int(head[2])


def _digest(algorithm: str, *pieces: bytes | memoryview) -> str:
    digest = hasher(b"{", algorithm=algorithm)
    for piece in pieces:  # megabytes: few copies
        digest.update(piece)
    return digest.hexdigest()
