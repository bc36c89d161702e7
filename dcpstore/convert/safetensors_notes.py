"""What the string metadata of a safetensors file holds for us: values, nested paths and ties.

A file holds only tensors; the values of a version are in its metadata as typed JSON, so that an
import finds them again. A tied tensor is written once, with the note that safetensors itself makes:
the name that was left out, and the one that was kept.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dcpstore.convert.exporting import DEEPEST
from dcpstore.convert.safetensors_header import Header
from dcpstore.encoding.values import decode_value, encode_value
from dcpstore.errors import CorruptionError
from dcpstore.formats import json_fields
from dcpstore.records import ObjectPath, StatePath

__all__ = ["aliases", "notes", "paths_of", "plain_text", "values_of"]

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
