"""The journal in the data folder: one object for each operation, "operations/<number>.json".

A digest over the rest comes first, as in a manifest, so that a rebuild believes nothing damaged.
What an operation means is the catalog's affair; here each of its fields is of the right kind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from blake3 import blake3

from dcpstore.core.ref_syntax import check_name
from dcpstore.errors import CorruptionError, SchemaError
from dcpstore.formats import json_fields

__all__ = ["decode_operation", "encode_operation", "operation_key", "operation_number"]

_FORMAT = 1
_HEAD = '{{"format": 1, "digest": "{}", '
_HEAD_PATTERN = re.compile(rb'\{"format": ([0-9]{1,9}), "digest": "([0-9a-f]{64})", ')
_KEY_PATTERN = re.compile(r"operations/([0-9]{12,18})\.json")
_WITHOUT_REF = ("expire", "forget", "gc")  # their target, if any, is not a name

# JSON: of any kind until `_check` has seen it, hence `Any`.
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
    try:
        said: Json = json.loads(body)
        _check(said)
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise CorruptionError(
            f"it does not say what an operation must ({type(error).__name__}: {error})"
        ) from error
    return said


def _check(said: Json) -> None:
    """Check every field that a rebuild uses."""
    json_fields.natural(said["operation"])
    kind, target = json_fields.text(said["kind"]), json_fields.text(said["target"])
    detail = {} if said["detail"] is None else said["detail"]
    _check_detail(kind, detail)
    is_of_versions = kind == "undo" and "versions" in detail  # the undo of a forget
    if target and kind not in _WITHOUT_REF and not is_of_versions:
        check_name(target, kind="ref")
    for end in ("old", "new"):
        json_fields.optional(_check_named)(said[end])
    json_fields.text(said["author"])
    json_fields.time(said["created_at"])
    if "version" in said:
        _check_version(said["version"])
    if "repository" in said:
        about = said["repository"]
        json_fields.uid(about["uid"])
        json_fields.natural(about["format_version"])
        json_fields.natural(about["chunk_nbytes"])
        json_fields.text(about["chunk_codec"])
        json_fields.time(about["created_at"])


def _check_named(version: Json) -> None:
    json_fields.uid(version["uid"])
    json_fields.natural(version["version"])


def _check_ref(ref: Json) -> None:
    """Check what an operation that changed several refs says of one."""
    check_name(ref["name"], kind="ref")
    if ref["kind"] not in ("tag", "branch"):
        raise ValueError("a ref is a tag or a branch")
    for end in ("old", "new"):
        json_fields.optional(_check_named)(ref[end])


def _check_detail(kind: str, detail: Json) -> None:
    json_fields.mapping(detail, lambda found: found)
    if kind in ("expire", "forget"):
        json_fields.items(detail["versions"], json_fields.uid)
    if kind == "forget":
        json_fields.items(detail["refs"], _check_ref)
    if kind == "undo":
        json_fields.natural(detail["undoes"])
        json_fields.items(detail.get("versions", []), json_fields.uid)
    json_fields.items(detail.get("refs", []), _check_ref)
    removed = json_fields.mapping(
        detail.get("removed", {}), lambda n: json_fields.items(n, json_fields.text)
    )
    if not removed.keys() <= {"metrics", "labels"}:
        raise ValueError("metrics and labels can be removed, and nothing else")
    for added in json_fields.items(detail.get("added", []), lambda found: found):
        if kind == "gc":
            json_fields.entries(added, json_fields.pack, json_fields.natural, json_fields.uid)
        else:
            json_fields.text(added)
    if kind == "gc":
        for what in ("condemned", "deleted"):
            json_fields.items(detail.get(what, []), json_fields.pack)
        json_fields.items(detail.get("dropped", []), json_fields.uid)


def _check_version(fact: Json) -> None:
    json_fields.uid(fact["uid"])
    json_fields.optional(json_fields.uid)(fact["parent"])
    check_name(fact["branch"], kind="branch")
    json_fields.optional(json_fields.natural)(fact["step"])
    for name in ("message", "author", "host"):
        json_fields.text(fact[name])
    for name in ("number", "ranks", "nbytes", "nbytes_written", "nbytes_reused"):
        json_fields.natural(fact[name])
    for name in ("started_at", "created_at"):
        json_fields.time(fact[name])
    json_fields.mapping(fact["labels"], json_fields.text)
    json_fields.mapping(fact["metrics"], json_fields.number)
    json_fields.mapping(fact["seconds"], json_fields.number)
    json_fields.items(
        fact["packs"], lambda pack: json_fields.entries(pack, json_fields.pack, json_fields.natural)
    )
