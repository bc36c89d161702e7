"""Operations of the journal, each stored alone at first, as "operations/<number>.json".

A digest over the rest comes first, as in a manifest, so that a rebuild uses nothing damaged. Format
2 is as format 1; it says that others may lie in segments (`journal_segment`), which a dcpstore that
knows only format 1 would miss.
The catalog knows what an operation means; here each of its fields is checked for its type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from dcpstore.core.syntax import check_name
from dcpstore.errors import CorruptionError, SchemaError
from dcpstore.formats.json_fields import Natural, PackKey, Text, Time, Uid, encode
from dcpstore.formats.sealed import check_seal, seal
from dcpstore.formats.version import decode_info, decode_stats

__all__ = ["decode_operation", "encode_operation", "kind_of", "operation_key", "operation_number"]

_FORMAT = 2
_KEY_PATTERN = re.compile(r"operations/([0-9]{12,18})\.json")

# JSON: of any type until it is checked, hence `Any`.
Json = dict[str, Any]


class Kind(NamedTuple):
    """What operations of a kind have in common.

    Attributes:
        target: what their target names: a branch, a tag, or versions as text for people; None where
            it names either ref, or nothing.
        describes: whether the journal holds all facts of the version `new`.
        adds: whether they add to a version what an undo removes again.
        detail: what must be in their detail.
    """

    target: Literal["branch", "tag", "versions"] | None = None
    describes: bool = True
    adds: bool = False
    detail: tuple[str, ...] = ()


# Every kind of operation. What replaying one does is in `catalog/maintenance/restore.py`, what
# undoing one does in `catalog/write/undo.py`.
_KINDS = {
    "init": Kind(),
    "save": Kind("branch"),
    "copy": Kind("branch"),
    "tag": Kind("tag", describes=False),
    "branch": Kind("branch", describes=False),
    "rollback": Kind("branch", describes=False),
    "delete_tag": Kind("tag", describes=False),
    "delete_branch": Kind("branch", describes=False),
    "metrics": Kind(adds=True),
    "labels": Kind(adds=True),
    "expire": Kind("versions", detail=("versions",)),
    "forget": Kind("versions", detail=("versions", "refs")),
    "gc": Kind("versions"),
    "undo": Kind(detail=("undoes",)),
    "lost": Kind(),  # what a rebuild writes in the place of one that is missing
}


class _Named(msgspec.Struct):
    """How an operation names a version."""

    uid: Uid
    version: Natural


class _Ref(msgspec.Struct):
    """What an operation that changed several refs did to one."""

    name: str
    kind: Literal["tag", "branch"]
    old: _Named | None
    new: _Named | None


class _Removed(msgspec.Struct, forbid_unknown_fields=True):
    """What an undo took from a version."""

    metrics: list[Text] = []
    labels: list[Text] = []


class _Detail(msgspec.Struct):
    """Further members of an operation; which are required depends on its kind."""

    versions: list[Uid] = []
    refs: list[_Ref] = []
    undoes: Natural | None = None
    removed: _Removed | None = None
    added: list[Text | tuple[PackKey, Natural, Uid]] = []
    condemned: list[PackKey] = []
    deleted: list[PackKey] = []
    dropped: list[Uid] = []


class _Repository(msgspec.Struct):
    uid: Uid
    format_version: Natural
    chunk_nbytes: Natural
    chunk_codec: Text
    created_at: Time


class _Made(msgspec.Struct):
    """What the journal has of a version besides its facts."""

    number: Natural
    parent: Uid | None
    started_at: Time
    packs: list[tuple[PackKey, Natural]]


class _Operation(msgspec.Struct):
    operation: Natural
    kind: Text
    target: Text
    old: _Named | None
    new: _Named | None
    author: Text
    created_at: Time
    detail: _Detail | None
    version: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    repository: _Repository | msgspec.UnsetType = msgspec.UNSET


def kind_of(name: str) -> Kind:
    """Return what operations of a kind have in common; an unknown kind has the defaults."""
    return _KINDS.get(name, Kind())


def operation_key(number: int) -> str:
    """Return the key of an operation."""
    return f"operations/{number:012}.json"


def operation_number(key: str) -> int | None:
    """Return the number of the operation that lies under `key`, or None."""
    match = _KEY_PATTERN.fullmatch(key)
    return None if match is None else int(match[1])


def encode_operation(operation: Mapping[str, Any]) -> bytes:
    """Return an operation as it is stored."""
    return seal("format", _FORMAT, [encode(dict(operation))[1:].encode()])


def decode_operation(data: bytes) -> Json:
    """Return the members of a stored operation; those that a rebuild uses have the right types.

    Raises:
        CorruptionError: it is damaged or is not an operation.
        SchemaError: a newer dcpstore wrote it.
    """
    version = check_seal(data, "format", what="operation")
    if version < 1:
        raise CorruptionError(f"the operation is damaged: its format is {version}")
    if version > _FORMAT:
        raise SchemaError(
            f"an operation has format {version}, newer than {_FORMAT}; update dcpstore."
        )
    try:
        operation: Json = msgspec.json.decode(data)
        _check(msgspec.convert(operation, _Operation), operation["detail"] or {})
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise CorruptionError(
            f"it lacks a member or has an invalid one ({type(error).__name__}: {error})"
        ) from error
    del operation["format"], operation["digest"]
    operation.pop("algorithm", None)
    return operation


def _check(operation: _Operation, detail: Json) -> None:
    """Check the names in an operation, and what its kind requires."""
    kind, target = operation.kind, operation.target
    known = kind_of(kind)
    if lacking := [name for name in known.detail if name not in detail]:
        raise ValueError(f"a {kind!r} without {lacking[0]!r}")
    for ref in detail.get("refs", []):
        check_name(ref["name"], kind="ref")
    if any(isinstance(added, list) != (kind == "gc") for added in detail.get("added", [])):
        raise ValueError("packs are added by gc, and names by nothing else")
    is_of_versions = known.target == "versions" or "versions" in detail  # or undoes a forget
    if is_of_versions and (operation.old or operation.new):
        raise ValueError(f"a {kind!r} of versions that moves a ref")
    if target and not is_of_versions:
        check_name(target, kind="ref")
    if operation.version is not msgspec.UNSET:
        decode_info(operation.version)
        decode_stats(operation.version)
        msgspec.convert(operation.version, _Made)
