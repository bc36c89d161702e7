"""What the string notes of a safetensors file carry for us: values, nested paths and ties.

A file holds tensors alone; the values of a version stand in its notes as typed JSON, so that an
import finds them again. A tied tensor is written once, with the note that safetensors itself makes:
the name that was left out, and the one that was kept.

The header of a safetensors file: read with distrust, written as the format says.

The format (https://github.com/huggingface/safetensors#format): 8 bytes of length, that much JSON,
then the tensors, row-major and without gaps. Invariant: what `read_header` returns lies inside the
file, each byte of its data in exactly one tensor.

How a version is cut into safetensors files, and what each of them is called.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from dcpstore.convert.exporting import DEEPEST, ExportedTensor
from dcpstore.encoding.dtypes import DTYPES, MOST_DIMS
from dcpstore.encoding.values import decode_value, encode_value
from dcpstore.errors import CorruptionError, DcpstoreError, InvalidInputError
from dcpstore.formats import json_text
from dcpstore.records import ObjectPath, StatePath

__all__ = [
    "LARGEST_HEADER",
    "NOTES",
    "TAGS",
    "Header",
    "HeaderTensor",
    "aliases",
    "encode_header",
    "notes",
    "parse_size",
    "paths_of",
    "plain_text",
    "read_header",
    "shard_names",
    "shards_of",
    "values_of",
]

LARGEST_HEADER = 100_000_000  # bytes, the format's own limit
TAGS = {row.torch: row.safetensors for row in DTYPES if row.safetensors is not None}
_TAGGED = {tag: dtype for dtype, tag in TAGS.items()}
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


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}


def parse_size(size: int | str) -> int:
    """Return a size in bytes: a number, or a text such as "5GB" (powers of 1000) or "5GiB".

    Raises:
        InvalidInputError: it is neither, or not positive.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", str(size).strip().upper())
    unit = (_UNITS | _BINARY).get(found[2]) if found else None
    nbytes = int(float(found[1]) * unit) if found and unit else 0
    if nbytes <= 0:
        raise InvalidInputError(f"size {size!r} is none; give bytes, or such as '5GB' or '512MiB'.")
    return nbytes


def shards_of(tensors: Sequence[ExportedTensor], most: int) -> list[list[ExportedTensor]]:
    """Return the tensors of each file: in the order of their names, up to `most` bytes a file.

    Inside a file wide dtypes come first, so that each tensor begins at a multiple of its own width,
    as whoever maps the file wants it. A tensor larger than `most` has a file to itself.
    """
    shards: list[list[ExportedTensor]] = [[]]
    held = 0
    for tensor in tensors:
        if shards[-1] and held + tensor.nbytes > most:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.nbytes
    return [sorted(shard, key=lambda t: (-t.dtype.itemsize, t.fqn)) for shard in shards]


def shard_names(count: int) -> list[str]:
    """Return the names of so many files, as Hugging Face's libraries look for them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


_VALUES, _PATHS = "dcpstore.values", "dcpstore.paths"


def notes(
    values: Mapping[str, str], paths: Mapping[str, ObjectPath], ties: Mapping[str, str]
) -> dict[str, str]:
    """Return the notes of a file.

    Args:
        values: typed JSON by FQN.
        paths: of the file's FQNs; those that are the FQN alone are not said.
        ties: for each name that is left out, the one that is kept.
    """
    nested = {
        fqn: json.loads(json_text.path(path))
        for fqn, path in paths.items()
        if path != (fqn,) or (isinstance(path, StatePath) and path.marks)
    }
    found = {"format": "pt", **ties}
    if values:
        found[_VALUES] = json.dumps({fqn: json.loads(text) for fqn, text in values.items()})
    if nested:
        found[_PATHS] = json.dumps(nested)
    return found


def plain_text(value: object) -> str:
    """Return the typed JSON of a value, however long it is."""
    encoded = encode_value(value, allow_pickle=False)
    return encoded.text if encoded.data is None else encoded.data.decode()


def aliases(header: Header) -> dict[str, str]:
    """Return the names that a file leaves out, each with the name of its tensor."""
    return {
        name: kept
        for name, kept in header.notes.items()
        if kept in header.tensors and name not in header.tensors
    }


def values_of(file: Path, header: Header) -> dict[str, object]:
    """Return the values in a file's notes.

    Raises:
        CorruptionError: they are not what `notes` makes.
    """
    found = _parsed(header, _VALUES)
    if not isinstance(found, dict):
        raise CorruptionError(
            f"{str(file)!r} has a note {_VALUES!r} that is no object; copy it again."
        )
    return {fqn: _decoded(file, node) for fqn, node in found.items()}


def paths_of(header: Header) -> dict[str, ObjectPath]:
    """Return the nested paths in a file's notes; what is none is passed over, for it is no data."""
    found = _parsed(header, _PATHS)
    if not isinstance(found, dict):
        return {}
    paths = {}
    for fqn, given in found.items():
        with contextlib.suppress(ValueError):
            path = StatePath.parsed(given)
            if 0 < len(path) <= DEEPEST and isinstance(path[0], str):
                paths[fqn] = path
    return paths


def _decoded(file: Path, node: object) -> object:
    try:
        text = json.dumps(node, ensure_ascii=False)
    except RecursionError as error:  # which parsed, from a place less deep
        raise CorruptionError(
            f"{str(file)!r} has a value nested too deep; copy it again."
        ) from error
    return decode_value(text, allow_pickle=False)


def _parsed(header: Header, name: str) -> Any:
    try:
        return json.loads(header.notes.get(name, "{}"))
    except (ValueError, RecursionError):
        return None
