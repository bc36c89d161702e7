"""The journal in the data folder: one object for each operation, "operations/<number>.json".

A digest over the rest comes first, as in a manifest, so that a rebuild believes nothing damaged.
What an operation says is the catalog's affair; here it is JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from blake3 import blake3

from dcpstore.errors import CorruptionError, SchemaError

__all__ = ["decode_operation", "encode_operation", "operation_key", "operation_number"]

_FORMAT = 1
_HEAD = '{{"format": 1, "digest": "{}", '
_HEAD_PATTERN = re.compile(rb'\{"format": ([0-9]+), "digest": "([0-9a-f]{64})", ')
_KEY_PATTERN = re.compile(r"operations/([0-9]{12,})\.json")

# JSON as read: what it holds is checked by use, so `Any`.
Json = dict[str, Any]


def operation_key(number: int) -> str:
    """Return the key of an operation."""
    return f"operations/{number:012}.json"


def operation_number(key: str) -> int | None:
    """Return the number of the operation that lies under `key`, or None."""
    match = _KEY_PATTERN.fullmatch(key)
    return None if match is None else int(match[1])


def encode_operation(said: Mapping[str, Any]) -> bytes:
    """Return an operation as it is stored."""
    text = json.dumps(dict(said), separators=(",", ":"), allow_nan=False)
    return (_HEAD.format(blake3(text.encode()).hexdigest()) + text[1:]).encode()


def decode_operation(data: bytes) -> Json:
    """Return what a stored operation says.

    Raises:
        CorruptionError: it is damaged or is no operation.
        SchemaError: a newer dcpstore wrote it.
    """
    head = _HEAD_PATTERN.match(data)
    if head is None:
        raise CorruptionError(f"no operation: it begins with {data[:40]!r}")
    if int(head[1]) > _FORMAT:
        raise SchemaError(
            f"an operation has format {int(head[1])}, newer than {_FORMAT}; update dcpstore."
        )
    body = b"{" + data[head.end() :]
    if blake3(body).hexdigest() != head[2].decode():
        raise CorruptionError("its digest is not that of its text")
    said: Json = json.loads(body)
    return said
