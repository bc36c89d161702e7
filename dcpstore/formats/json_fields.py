"""Fields of JSON at rest: what each must be when it is read, and how it is written.

A digest shows damage, not who wrote the data: a program that writes the folder can write the digest
too. So nothing of a manifest or operation is used before msgspec has checked its kind and range;
what does not fit is a ValueError or TypeError, which the reader of the object explains. Text is put
together here where there is a line for each of thousands of tensors: an encoder that is called once
a line costs more than the line. All of it is compact and pure ASCII.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from json.encoder import encode_basestring_ascii
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from dcpstore.errors import CorruptionError
from dcpstore.geometry.boxes import Box
from dcpstore.geometry.grids import Grid
from dcpstore.records import ObjectPath, StatePath

__all__ = [
    "Digest",
    "Natural",
    "Naturals",
    "Number",
    "PackKey",
    "PackKeyOrNone",
    "PageKey",
    "PlanKey",
    "Text",
    "Time",
    "Uid",
    "box",
    "decoded",
    "encode",
    "float_of",
    "grid",
    "grids",
    "integers",
    "number_of",
    "path",
    "quoted",
    "read",
    "value_tree",
]

T = TypeVar("T")

_PACK = r"packs/(?!\.+/)[A-Za-z0-9._-]{1,200}/[0-9]{1,90}-[0-9]{1,90}\.pack"
_DEEPEST = 400  # levels of JSON; a value of as many containers as are stored has fewer

# What every database keeps: text without NUL and lone surrogates, whole numbers up to 2**63 - 1.
Text = Annotated[str, Meta(pattern=r"\A[^\0\ud800-\udfff]*\Z")]
Natural = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Naturals = Annotated[tuple[Natural, ...], Meta(max_length=64)]  # numpy's limit of dimensions
Time = Annotated[datetime, Meta(tz=True)]
Number = float | Literal["nan", "inf", "-inf"]
Uid = Annotated[str, Meta(pattern=r"\A[0-9a-f]{1,64}\Z")]
PackKey = Annotated[str, Meta(pattern=rf"\A{_PACK}\Z")]  # and of nothing else in a data folder
Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
PlanKey = Annotated[str, Meta(pattern=r"\Aplans/[0-9a-f]{1,64}\.json\Z")]
PageKey = Annotated[str, Meta(pattern=r"\Apages/[0-9a-f]{1,64}\.page\Z")]
PackKeyOrNone = Annotated[str, Meta(pattern=rf"\A(?:{_PACK})?\Z")]


def read(document: msgspec.Raw | Mapping[str, Any], kind: type[T]) -> T:
    """Return JSON as the type that it must have.

    Raises:
        ValueError: it does not fit the type.
    """
    if isinstance(document, msgspec.Raw):
        return msgspec.json.decode(document, type=kind)
    return msgspec.convert(document, kind)


def decoded(document: bytes, kind: type[T]) -> T:
    """Return JSON text as the type that it must have.

    Raises:
        ValueError: it is not JSON, or does not fit the type.
    """
    try:
        return msgspec.json.decode(document, type=kind)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:  # a key in a path may have a lone surrogate, which msgspec refuses
        return msgspec.convert(json.loads(document), kind)


def number_of(value: float) -> float | str:
    """Return a float as JSON holds it: "nan" and "inf" as text."""
    return value if math.isfinite(value) else str(value)


def float_of(number: Number) -> float:
    """Return the float that JSON holds."""
    return float(number)


def box(offsets: Sequence[int], sizes: Sequence[int]) -> Box:
    """Return a box, as many offsets as sizes."""
    if len(offsets) != len(sizes):
        raise ValueError(f"{offsets!r:.60} and {sizes!r:.60} are not a box")
    return Box(tuple(offsets), tuple(sizes))


def grid(cut: tuple[Sequence[int], ...], shape: Sequence[int]) -> Grid:
    """Return the grid of a part that lies inside a tensor of `shape`: offsets, shape and chunks."""
    offsets, sizes, cell = map(tuple, cut)
    if (
        not len(offsets) == len(sizes) == len(cell) == len(shape)
        or 0 in cell
        or any(o + n > whole for o, n, whole in zip(offsets, sizes, shape, strict=True))
    ):
        raise ValueError(f"{cut!r:.200} is not a part of a tensor of shape {list(shape)}")
    return Grid(offsets, sizes, cell)


def value_tree(fqn: str, typed: str) -> Any:
    """Return the typed JSON of a value as parsed JSON, without building the value.

    Raises:
        CorruptionError: it is not JSON, or nested deeper than any value.
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
            f"the value of {fqn!r} is not typed JSON ({error}); run 'dcpstore verify' to see which "
            "versions are damaged."
        ) from error
    return tree


encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
quoted = encode_basestring_ascii


@lru_cache(4096)
def integers(values: tuple[int, ...]) -> str:
    """Return offsets, sizes or a shape; few are distinct."""
    return f"[{','.join(map(str, values))}]"


@lru_cache(4096)
def grids(parts: tuple[Grid, ...]) -> str:
    """Return the chunk grids of a tensor, each as offsets, shape and chunk shape."""
    cut = ((part.offsets, part.shape, part.chunk_shape) for part in parts)
    return f"[{','.join('[' + ','.join(map(integers, one)) + ']' for one in cut)}]"


def path(keys: ObjectPath) -> str:
    """Return the names and numbers that lead to an object, as `StatePath.parsed` reads them."""
    text = f"[{','.join([quoted(key) if isinstance(key, str) else str(key) for key in keys])}]"
    if not isinstance(keys, StatePath) or (len(keys) == 1 and not keys.marks):
        return text
    return f"[{text},{quoted(keys.marks)}]" if keys.marks else f"[{text}]"
