"""Manifests of format 1: a whole version in one object, as dcpstore wrote them before pages.

Such a manifest is a kerchunk reference file, version 1: Zarr documents inline and every chunk as a
range of a pack. Its "dcpstore" member is all that the catalog has about the version: every chunk of
every tensor, those of earlier versions too. The first collection of garbage after an upgrade writes
them again as manifests with pages.
Format: https://fsspec.github.io/kerchunk/spec.html
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import msgspec

from dcpstore.core.digests import FIRST_ALGORITHM
from dcpstore.errors import CorruptionError, SchemaError
from dcpstore.formats import json_fields
from dcpstore.formats.json_fields import (
    Digest,
    Natural,
    Naturals,
    PackKey,
    PackKeyOrNone,
    Text,
)
from dcpstore.formats.sealed import check_seal, kind_of
from dcpstore.formats.version import decode_info, decode_stats
from dcpstore.geometry.grids import Grid
from dcpstore.records import (
    EntryKind,
    NewChunk,
    NewEntry,
    NewTensor,
    PackRecord,
    PlanRecord,
    ShardRecord,
    StatePath,
    VersionContent,
    VersionDraft,
    VersionInfo,
    VersionStats,
)

__all__ = ["FirstManifest", "decode_first", "is_first"]

_KERCHUNK, _FORMAT = 1, 1

# JSON as read: of any kind until it is checked, hence `Any`.
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class FirstManifest:
    """A version as a manifest of format 1 has it; each tensor of `content` has all its chunks."""

    draft: VersionDraft
    content: VersionContent
    data_url: str

    @property
    def stats(self) -> VersionStats:
        """What was known when the save ended."""
        return self.content


def is_first(data: bytes) -> bool:
    """Tell whether a manifest is of format 1, by how it begins."""
    return kind_of(data) == "version"  # of kerchunk


def decode_first(data: bytes) -> FirstManifest:
    """Return what a manifest of format 1 describes.

    Raises:
        CorruptionError: it is damaged.
        SchemaError: it says that its format is newer.
        LookupError, TypeError, ValueError, RecursionError: a member is missing or invalid.
    """
    if (found := check_seal(data, "version", what="manifest")) != _KERCHUNK:
        raise CorruptionError(f"the manifest is damaged: its kerchunk version is {found}")
    data_url, version = _opened(data)
    if (found := json_fields.read(version, _Format).format) > _FORMAT:
        raise SchemaError(f"a manifest has format {found}, newer than {_FORMAT}; update dcpstore.")
    return FirstManifest(*_decode_version(version), data_url)


class _Format(msgspec.Struct):
    format: Natural


class _Templates(msgspec.Struct):
    data: Text


class _Tensor(msgspec.Struct):
    """A tensor with the digest, number of the pack, offset and length of each chunk."""

    digest: Digest
    dtype: Text
    shape: Naturals
    codec: Text
    nbytes: Natural
    parts: list[tuple[Naturals, Naturals, Naturals]]
    chunks: list[tuple[Digest, Natural, Natural, Natural]]
    algorithm: Text = FIRST_ALGORITHM


class _Plan(msgspec.Struct):
    """A plan with the FQN, rank, offsets and sizes of each shard."""

    digest: Digest
    ranks: Natural
    shards: list[tuple[Text, Natural, Naturals, Naturals]]
    algorithm: Text = FIRST_ALGORITHM


class _Contents(msgspec.Struct):
    """What a version of format 1 holds besides its facts."""

    parent: Natural | None
    plan: _Plan
    entries: list[tuple[Text, Any, EntryKind, Digest | None, Text | None]]
    packs: list[PackKeyOrNone]  # a tensor without elements may name none
    tensors: list[_Tensor]
    written: list[tuple[PackKey, Natural]]
    aliases: dict[Digest, Digest]
    planner_data: Text | None


class _File(msgspec.Struct):
    """A kerchunk reference file; its "refs" are for others."""

    templates: _Templates
    dcpstore: msgspec.Raw


def _ordinals(parts: Sequence[Grid]) -> list[tuple[int, int]]:
    return [(i, j) for i, part in enumerate(parts) for j in range(part.size)]


def _opened(data: bytes) -> tuple[str, msgspec.Raw | Json]:
    """Return the URL of the data, and the "dcpstore" member."""
    try:
        file = msgspec.json.decode(data, type=_File)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:  # a key in a path may have a lone surrogate, which msgspec refuses
        body = json.loads(data)
        return msgspec.convert(body["templates"], _Templates).data, body["dcpstore"]
    return file.templates.data, file.dcpstore


def _decode_version(version: msgspec.Raw | Json) -> tuple[VersionDraft, VersionContent]:
    info, stats = decode_info(version), decode_stats(version)
    held = json_fields.read(version, _Contents)
    content = VersionContent(
        **{fact.name: getattr(stats, fact.name) for fact in fields(VersionStats)},
        entries=[_decode_entry(*entry) for entry in held.entries],
        tensors=[_decode_tensor(tensor, held.packs) for tensor in held.tensors],
        packs=[PackRecord(*pack) for pack in held.written],
        plan=PlanRecord(
            held.plan.digest,
            held.plan.ranks,
            [
                ShardRecord(fqn, rank, json_fields.box(offsets, sizes))
                for fqn, rank, offsets, sizes in held.plan.shards
            ],
            held.plan.algorithm,
        ),
        aliases=held.aliases,
        planner_data=held.planner_data,
    )
    _check_names(content)
    facts = {fact.name: getattr(info, fact.name) for fact in fields(VersionInfo)}
    return VersionDraft(**facts, parent=held.parent), content


def _check_names(content: VersionContent) -> None:
    """Check that FQNs and tensors are unique, and that every tensor that is named is described."""
    fqns = {entry.fqn for entry in content.entries}
    digests = {tensor.digest for tensor in content.tensors}
    if len(fqns) < len(content.entries) or len(digests) < len(content.tensors):
        raise ValueError("an FQN or a tensor is listed twice")
    named = {e.tensor_digest for e in content.entries if e.tensor_digest is not None}
    if lacking := (named | set(content.aliases.values())) - digests:
        raise ValueError(f"tensor {min(lacking)} is not described")


def _decode_entry(
    fqn: str, path: Any, kind: EntryKind, digest: str | None, value: str | None
) -> NewEntry:
    if (kind == "value") == (digest is not None) or (kind == "value" and value is None):
        raise ValueError(f"{fqn!r} is a {kind!r} of tensor {digest!r} and value {value!r}")
    return NewEntry(fqn, StatePath.parsed(path), kind, digest, value)


def _decode_tensor(stored: _Tensor, packs: Sequence[str]) -> NewTensor:
    parts = tuple(json_fields.grid(part, stored.shape) for part in stored.parts)
    count = sum(part.size for part in parts)
    if count != len(stored.chunks):
        raise ValueError(f"{len(stored.chunks)} chunks for {count} cells of {stored.digest}")
    chunks = [
        NewChunk(part, ordinal, bytes.fromhex(digest), packs[pack], offset, length)
        for (part, ordinal), (digest, pack, offset, length) in zip(
            _ordinals(parts), stored.chunks, strict=True
        )
    ]
    return NewTensor(
        stored.digest,
        stored.dtype,
        stored.shape,
        stored.codec,
        stored.nbytes,
        parts,
        chunks,
        stored.algorithm,
    )
