"""The header of a safetensors file: checked when read, written as the format says, with our notes.

The format (https://github.com/huggingface/safetensors#format): 8 bytes of length, that much JSON,
then the tensors, row-major and without gaps. The library safetensors checks a header against its
file; the checks here are for what it misses. Invariant: what `read_header` returns is inside the
file, with each byte of the data in exactly one tensor.

A file holds only tensors; the values of a version are in its string metadata as typed JSON, so that
an import finds them again, with nested paths. A tied tensor is written once, with the note that
safetensors itself makes: the name that is left out, and the one that is kept.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dcpstore.convert.exporting import DEEPEST
from dcpstore.encoding.dtypes import DTYPES, MOST_DIMS
from dcpstore.encoding.values import decode_value, encode_value
from dcpstore.errors import CorruptionError, DcpstoreError, InvalidInputError
from dcpstore.formats import json_fields
from dcpstore.records import ObjectPath, StatePath

__all__ = [
    "NOTES",
    "TAGS",
    "Header",
    "HeaderTensor",
    "aliases",
    "encode_header",
    "notes",
    "paths_of",
    "plain_text",
    "read_header",
    "values_of",
]

TAGS = {row.torch: row.safetensors for row in DTYPES if row.safetensors is not None}
_TAGGED = {tag: dtype for dtype, tag in TAGS.items()}
_LARGEST_HEADER = 100_000_000  # bytes, the format's own limit
_ALIGNMENT = 8

NOTES = "__metadata__"
_VALUES, _PATHS = "dcpstore.values", "dcpstore.paths"


@dataclass(frozen=True, slots=True)
class HeaderTensor:
    """A tensor of a file; `offset` is from the beginning of the file, in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of a file by name, and its notes."""

    tensors: Mapping[str, HeaderTensor]
    notes: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Return the header of a file, checked against its size.

    Raises:
        CorruptionError: it is truncated, or its header is not what the format says.
        InvalidInputError: a tensor has a dtype that torch lacks.
    """
    try:
        with safe_open(path, "np") as file, path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            # The library keeps the last of two equal names, so the JSON is parsed here, too.
            json.loads(raw.read(length), object_pairs_hook=_once)
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            described = {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()}
            notes_of_file = file.metadata() or {}
    except (SafetensorError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    except OSError as error:
        raise DcpstoreError(
            f"cannot read {str(path)!r}: {error.strerror or error}; check the path and this user's "
            "rights."
        ) from error
    tensors = {}
    offset = 8 + length
    for name, (tag, shape) in described.items():  # as they follow one another in the file
        if tag not in _TAGGED:
            raise InvalidInputError(
                f"{str(path)!r}: tensor {name!r} has dtype {tag!r}, which is not one "
                f"of {', '.join(_TAGGED)}; convert it first."
            )
        if len(shape) > MOST_DIMS or math.prod(n or 1 for n in shape) >= 1 << 63:
            raise _damaged(path, f"tensor {name!r} has the shape {str(shape)[:80]}")
        tensors[name] = HeaderTensor(_TAGGED[tag], tuple(shape), offset)
        offset += math.prod(shape) * _TAGGED[tag].itemsize
    return Header(tensors, notes_of_file)


def _damaged(path: Path, problem: str) -> CorruptionError:
    return CorruptionError(
        f"{str(path)!r} is damaged, truncated or not a safetensors file ({problem}); copy it again "
        "from its source."
    )


def _once(pairs: list[tuple[str, Any]]) -> None:
    """Raise `ValueError` if an object has a name twice, where safetensors keeps the last one."""
    names: set[str] = set()
    for name, _ in pairs:
        if name in names:
            raise ValueError(f"its header has the name {name!r} twice")
        names.add(name)


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
    if len(text) > _LARGEST_HEADER:
        raise InvalidInputError(
            f"the header of a safetensors file would have {len(text)} bytes, past the format's "
            f"{_LARGEST_HEADER}; leave the values out (--tensors-only), or export as torch or dcp."
        )
    return len(text).to_bytes(8, "little") + text


def notes(
    values: Mapping[str, str], paths: Mapping[str, ObjectPath], ties: Mapping[str, str]
) -> dict[str, str]:
    """Return the notes of a file.

    Args:
        values: typed JSON by FQN.
        paths: of the file's FQNs; a path that is only the FQN is left out.
        ties: for each name that is left out, the one that is kept.
    """
    nested = {
        fqn: json.loads(json_fields.path(path))
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
            f"{str(file)!r} has a note {_VALUES!r} that is not an object; copy it again."
        )
    return {fqn: _decoded(file, node) for fqn, node in found.items()}


def paths_of(header: Header) -> dict[str, ObjectPath]:
    """Return the nested paths in a file's notes, without invalid ones, which lose no data."""
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
    except RecursionError as error:  # parsing had less stack in use
        raise CorruptionError(
            f"{str(file)!r} has a value that is nested too deeply; copy it again."
        ) from error
    return decode_value(text, allow_pickle=False)


def _parsed(header: Header, name: str) -> Any:
    try:
        return json.loads(header.notes.get(name, "{}"))
    except (ValueError, RecursionError):
        return None
