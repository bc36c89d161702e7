"""JSON objects behind their digest, so that damage is known before anything is believed.

A sealed object begins with `{"<kind>": <version>, "digest": "<hex>", "algorithm": "<name>", `. The
digest covers all that follows it, with a brace in front; `algorithm` was left out while it could
only be BLAKE3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dcpstore.core.digests import ALGORITHM, FIRST_ALGORITHM, hasher
from dcpstore.errors import CorruptionError

__all__ = ["check_seal", "seal"]

_HEAD = re.compile(
    rb'\{"([a-z]+)": ([0-9]{1,9}), "digest": "([0-9a-f]{64})", (?="algorithm": "([^"]{1,40})")?'
)


def seal(kind: str, version: int, members: Sequence[bytes]) -> bytes:
    """Return an object; `members` is the rest of it in pieces, up to and with its last brace."""
    named = f'"algorithm": "{ALGORITHM}", '.encode()
    digest = hasher(b"{")
    for piece in (named, *members):  # megabytes: few copies
        digest.update(piece)
    head = f'{{"{kind}": {version}, "digest": "{digest.hexdigest()}", '.encode()
    return b"".join([head, named, *members])


def check_seal(data: bytes, kind: str, *, what: str) -> int:
    """Return the version of an object whose digest is right.

    Raises:
        CorruptionError: it is damaged or is no such object.
        SchemaError: its digest is by an algorithm that this dcpstore does not know.
    """
    head = _HEAD.match(data)
    if head is None or head[1] != kind.encode():
        raise CorruptionError(f"no {what}: it begins with {bytes(data[:40])!r}")
    named = head[4]
    digest = hasher(b"{", algorithm=FIRST_ALGORITHM if named is None else named.decode("latin-1"))
    digest.update(memoryview(data)[head.end() :])
    if digest.hexdigest() != head[3].decode():
        raise CorruptionError(
            f"the {what} is damaged: its digest is {digest.hexdigest()}, not {head[3].decode()}"
        )
    return int(head[2])
