"""The header of a safetensors file: checked when read, written as the format says.

The format (https://github.com/huggingface/safetensors#format): 8 bytes of length, that much JSON,
then the tensors, row-major and without gaps. Invariant: what `read_header` returns is inside the
file, with each byte of the data in exactly one tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from dcpstore.encoding.dtypes import DTYPES, MOST_DIMS
from dcpstore.errors import CorruptionError, DcpstoreError, InvalidInputError

__all__ = [
    "LARGEST_HEADER",
    "NOTES",
    "TAGS",
    "Header",
    "HeaderTensor",
    "encode_header",
    "read_header",
]

TAGS = {row.torch: row.safetensors for row in DTYPES if row.safetensors is not None}
_TAGGED = {tag: dtype for dtype, tag in TAGS.items()}
LARGEST_HEADER = 100_000_000  # bytes, the format's own limit


NOTES = "__metadata__"


_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class HeaderTensor:
    """A tensor of a file; `offset` is from the beginning of the file, in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself: its tensors by name, and its notes."""

    tensors: Mapping[str, HeaderTensor]
    notes: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Return the header of a file, checked against its size.

    Raises:
        CorruptionError: it is truncated, or its header is not what the format says.
        InvalidInputError: a tensor has a dtype that torch lacks.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(LARGEST_HEADER, size - 8):
                _refuse(path, f"its header would have {length} bytes, and the file has {size}")
            text = file.read(length)
    except OSError as error:
        raise DcpstoreError(
            f"cannot read {str(path)!r}: {error.strerror}; check the path and this user's rights."
        ) from error
    try:
        parsed = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"its header is no JSON object of unique names ({error})")
    if not isinstance(parsed, dict):
        _refuse(path, f"its header is a {type(parsed).__name__}")
    notes = parsed.pop(NOTES, {})
    if not isinstance(notes, dict) or not all(isinstance(v, str) for v in notes.values()):
        _refuse(path, f"its {NOTES} is no mapping of texts")
    places = {name: _placed(path, name, entry) for name, entry in parsed.items()}
    end = 0
    for name, (_, (first, last)) in sorted(places.items(), key=lambda item: item[1][1]):
        if first != end:
            _refuse(path, f"tensor {name!r} begins at {first}, where the one before ends at {end}")
        end = last
    if 8 + length + end != size:
        _refuse(path, f"it has {size} bytes, and its tensors end at {8 + length + end}")
    return Header(
        {
            name: HeaderTensor(dtype, shape, 8 + length + first)
            for name, ((dtype, shape), (first, _)) in places.items()
        },
        notes,
    )


def encode_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], notes: Mapping[str, str]
) -> bytes:
    """Return the bytes before the tensors, which follow in the order given.

    Raises:
        InvalidInputError: it would be longer than the format allows.
    """
    header: dict[str, Any] = {NOTES: dict(notes)} if notes else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": TAGS[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > LARGEST_HEADER:
        raise InvalidInputError(
            f"the header of a safetensors file would have {len(text)} bytes, past the format's "
            f"{LARGEST_HEADER}; leave the values out (--tensors-only), or export as torch or dcp."
        )
    return len(text).to_bytes(8, "little") + text


def _placed(
    path: Path, name: str, entry: object
) -> tuple[tuple[torch.dtype, tuple[int, ...]], tuple[int, int]]:
    """Return a tensor's dtype, shape and place in the data."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"tensor {name!r} is described as {type(entry).__name__} {str(entry)[:80]}")
    try:
        name.encode()
    except UnicodeEncodeError:
        _refuse(path, f"the name {name!r} is no text")
    shape, place = entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or not _naturals(place) or len(place) != 2:
        _refuse(path, f"tensor {name!r} has shape {str(shape)[:80]} at {str(place)[:80]}")
    dtype = _TAGGED.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise InvalidInputError(
            f"{str(path)!r}: tensor {name!r} has dtype {str(entry['dtype'])[:80]!r}, which is none "
            f"of {', '.join(_TAGGED)}; convert it first."
        )
    if place[1] - place[0] != math.prod(shape) * dtype.itemsize:
        _refuse(path, f"tensor {name!r}, {entry['dtype']} {shape}, lies at {place}")
    return (dtype, tuple(shape)), (place[0], place[1])


def _naturals(value: object) -> bool:
    """Tell whether a value is offsets or a shape; its bytes, zeros aside, fit in 63 bits."""
    return (
        isinstance(value, list)
        and len(value) <= MOST_DIMS
        and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
        and math.prod(n or 1 for n in value) < 1 << 63
    )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, item in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        found[name] = item
    return found


def _refuse(path: Path, problem: str) -> NoReturn:
    raise CorruptionError(
        f"{str(path)!r} is a damaged, truncated or no safetensors file: {problem}; copy it again "
        "from its source."
    )
