"""JSON put together as text, where there is a line for each of thousands of tensors.

An encoder that is called once a line costs more than the line. All of it is compact and pure ASCII.
"""

from __future__ import annotations

import json
from functools import lru_cache
from json.encoder import encode_basestring_ascii

from dcpstore.records import ObjectPath, StatePath

__all__ = ["encode", "integers", "path", "quoted"]

encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
quoted = encode_basestring_ascii


@lru_cache(4096)
def integers(values: tuple[int, ...]) -> str:
    """Return offsets, sizes or a shape; few are distinct."""
    return f"[{','.join(map(str, values))}]"


def path(keys: ObjectPath) -> str:
    """Return the names and numbers that lead to an object, as `StatePath.parsed` reads them."""
    text = f"[{','.join([quoted(key) if isinstance(key, str) else str(key) for key in keys])}]"
    if not isinstance(keys, StatePath) or (len(keys) == 1 and not keys.marks):
        return text
    return f"[{text},{quoted(keys.marks)}]" if keys.marks else f"[{text}]"
