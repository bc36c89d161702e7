"""Fields of JSON at rest: each is read as what it must be or refused, and written as compact text.

A digest shows damage, not who wrote the data: a program that writes the folder can write the digest
too. So nothing of a manifest or operation is used before its kind and range are known; what does
not fit is a ValueError or TypeError, which the reader of the object explains. Text is put together
here where there is a line for each of thousands of tensors: an encoder that is called once a line
costs more than the line. All of it is compact and pure ASCII.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from json.encoder import encode_basestring_ascii
from typing import Any, TypeVar

from dcpstore.errors import CorruptionError
from dcpstore.geometry.boxes import Box
from dcpstore.geometry.grids import Grid
from dcpstore.records import ObjectPath, StatePath
from dcpstore.storage.interface import check_key

__all__ = [
    "box",
    "encode",
    "entries",
    "grid",
    "integers",
    "items",
    "mapping",
    "natural",
    "naturals",
    "number",
    "optional",
    "pack",
    "path",
    "quoted",
    "text",
    "time",
    "uid",
    "value_tree",
]

T = TypeVar("T")

# JSON as read: of any kind until it is checked here, hence `Any`.

_MOST = 2**63 - 1  # what the databases count to
_DEEPEST = 400  # levels of JSON; a value of as many containers as are stored has fewer
_MOST_DIMS = 64  # numpy's limit, and so that of every tensor that can be stored
_PACK = re.compile(r"packs/[A-Za-z0-9._-]+/[0-9]+-[0-9]+\.pack")
_UID = re.compile(r"[0-9a-f]{1,64}")


def text(found: Any) -> str:
    """Return a text that every database keeps: without NUL and lone surrogates."""
    if not isinstance(found, str):
        raise TypeError(f"{_short(found)} is no text")
    if "\0" in found:
        raise ValueError(f"{_short(found)} has a NUL")
    found.encode()  # a UnicodeEncodeError is a ValueError
    return found


def natural(found: Any) -> int:
    """Return a whole number from 0 to 2**63 - 1."""
    if type(found) is not int or not 0 <= found <= _MOST:
        raise ValueError(f"{_short(found)} is no number from 0 to {_MOST}")
    return found


def number(found: Any) -> float:
    """Return a float; "nan" and "inf" are texts in JSON."""
    if not isinstance(found, int | float) and found not in ("nan", "inf", "-inf"):
        raise TypeError(f"{_short(found)} is no number")
    try:
        return float(found)
    except OverflowError as error:  # JSON has integers of any length
        raise ValueError(f"{_short(found)} is past every float") from error


def optional(take: Callable[[Any], T]) -> Callable[[Any], T | None]:
    """Return what takes null for None, and everything else as `take` does."""
    return lambda found: None if found is None else take(found)


def items(found: Any, take: Callable[[Any], T]) -> list[T]:
    """Return a list, each item as `take` takes it."""
    if not isinstance(found, list):
        raise TypeError(f"{_short(found)} is no list")
    return [take(item) for item in found]


def entries(found: Any, *takes: Callable[[Any], Any]) -> tuple[Any, ...]:
    """Return a list of fixed length, each place as its own function takes it."""
    if not isinstance(found, list) or len(found) != len(takes):
        raise TypeError(f"{_short(found)} is no list of {len(takes)}")
    return tuple(take(item) for take, item in zip(takes, found, strict=True))


def mapping(found: Any, take: Callable[[Any], T]) -> dict[str, T]:
    """Return an object, each member as `take` takes it."""
    if not isinstance(found, Mapping):
        raise TypeError(f"{_short(found)} is no object")
    return {name: take(item) for name, item in found.items()}


def naturals(found: Any) -> tuple[int, ...]:
    """Return offsets, sizes or a shape."""
    if isinstance(found, list) and len(found) > _MOST_DIMS:
        raise ValueError(f"{len(found)} dimensions are more than {_MOST_DIMS}")
    return tuple(items(found, natural))


def box(offsets: Any, sizes: Any) -> Box:
    """Return a box, as many offsets as sizes."""
    found = Box(naturals(offsets), naturals(sizes))
    if len(found.offsets) != len(found.sizes):
        raise ValueError(f"{_short(offsets)} and {_short(sizes)} are no box")
    return found


def grid(found: Any, shape: Sequence[int]) -> Grid:
    """Return the grid of a part that lies inside a tensor of `shape`."""
    offsets, sizes, cell = entries(found, naturals, naturals, naturals)
    if (
        not len(offsets) == len(sizes) == len(cell) == len(shape)
        or 0 in cell
        or any(o + n > whole for o, n, whole in zip(offsets, sizes, shape, strict=True))
    ):
        raise ValueError(f"{found!r:.200} is no part of a tensor of shape {list(shape)}")
    return Grid(offsets, sizes, cell)


def pack(found: Any) -> str:
    """Return the key of a pack, and of nothing else that a data folder holds."""
    key = check_key(text(found))
    if not _PACK.fullmatch(key):
        raise ValueError(f"{_short(key)} is the key of no pack")
    return key


def uid(found: Any) -> str:
    """Return the uid of a version or repository."""
    if not _UID.fullmatch(text(found)):
        raise ValueError(f"{_short(found)} is no uid")
    return text(found)


def time(found: Any) -> datetime:
    """Return an aware time."""
    when = datetime.fromisoformat(text(found))
    if when.tzinfo is None:
        raise ValueError(f"{_short(found)} is a time without its zone")
    return when


def value_tree(fqn: str, typed: str) -> Any:
    """Return the typed JSON of a value as the tree that it is, nothing of it built.

    Raises:
        CorruptionError: it is no JSON, or nested deeper than any value.
    """
    try:
        tree = json.loads(typed)
        level = [tree]
        depth = 0
        while level := [
            item
            for node in level
            if isinstance(node, dict | list)
            for item in (node.values() if isinstance(node, dict) else node)
        ]:
            depth += 1
            if depth == _DEEPEST:
                raise ValueError(f"nested deeper than {_DEEPEST}")
    except (ValueError, RecursionError) as error:
        raise CorruptionError(
            f"the value of {fqn!r} is no typed JSON ({error}); run 'dcpstore verify' to see which "
            "versions are hurt."
        ) from error
    return tree


def _short(found: object) -> str:
    """Return the beginning of what was found, however deep it is nested or long it is."""
    return repr(found)[:60] if isinstance(found, str | int | float | None) else type(found).__name__


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
