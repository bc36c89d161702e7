"""Manifests: the self-describing copy of one version, kept beside the packs.

A manifest is a kerchunk reference file, version 1: Zarr documents inline and every chunk as a range
of a pack, so plain Zarr with fsspec reads the version. Its "dcpstore" member holds what `rebuild`
needs to restore the catalog: every chunk of every tensor, those of earlier versions too. A digest
over the rest comes first, so that damage is found before anything is used.
Format: https://fsspec.github.io/kerchunk/spec.html
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import msgspec

from dcpstore.core.digests import FIRST_ALGORITHM
from dcpstore.errors import CorruptionError, SchemaError
from dcpstore.formats import json_fields
from dcpstore.formats.json_fields import Natural, Naturals, PackKey, PackKeyOrNone, Text
from dcpstore.formats.sealed import check_seal, seal
from dcpstore.formats.version import decode_info, decode_stats, encode_facts
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

__all__ = ["Manifest", "decode_manifest", "encode_manifest", "manifest_key"]

_KERCHUNK, _FORMAT = 1, 1

# JSON as read: of any kind until it is checked, hence `Any`.
Json = dict[str, Any]


class _Templates(msgspec.Struct):
    data: Text


class _Tensor(msgspec.Struct):
    """A tensor with the digest, number of the pack, offset and length of each chunk."""

    digest: Text
    dtype: Text
    shape: Naturals
    codec: Text
    nbytes: Natural
    parts: list[tuple[Naturals, Naturals, Naturals]]
    chunks: list[tuple[Text, Natural, Natural, Natural]]
    algorithm: Text = FIRST_ALGORITHM


class _Plan(msgspec.Struct):
    """A plan with the FQN, rank, offsets and sizes of each shard."""

    digest: Text
    ranks: Natural
    shards: list[tuple[Text, Natural, Naturals, Naturals]]
    algorithm: Text = FIRST_ALGORITHM


class _Format(msgspec.Struct):
    format: Natural


class _Contents(msgspec.Struct):
    """What a version holds: beside its facts, which `formats.version` reads."""

    parent: Natural | None
    plan: _Plan
    entries: list[tuple[Text, Any, EntryKind, Text | None, Text | None]]
    packs: list[PackKeyOrNone]  # a tensor without elements may name none
    tensors: list[_Tensor]
    written: list[tuple[PackKey, Natural]]
    aliases: dict[Text, Text]
    planner_data: Text | None


class _File(msgspec.Struct):
    """A kerchunk reference file; its "refs" are for others."""

    templates: _Templates
    dcpstore: msgspec.Raw


@dataclass(frozen=True, slots=True)
class Manifest:
    """One version as its manifest describes it; each tensor of `content` has all its chunks."""

    draft: VersionDraft
    content: VersionContent
    data_url: str


def manifest_key(uid: str) -> str:
    """Return the key of a version's manifest."""
    return f"manifests/{uid}.json"


def encode_manifest(
    draft: VersionDraft,
    content: VersionContent,
    *,
    data_url: str,
    documents: Mapping[str, str],
    references: Iterable[tuple[str, NewChunk]],
) -> bytes:
    """Return the manifest of a version.

    Args:
        draft: what was known when the save began, with the branch and parent as they are now.
        content: what the save commits; `tensors` has every tensor of the version, known ones too,
            each with all its chunks in order of (part, ordinal).
        data_url: where "packs/" lies: an absolute path or a URL that fsspec opens.
        documents: the Zarr documents by key, "zarr.json" of the root among them.
        references: each chunk by its Zarr key.
    """
    refs = [
        f"{json_fields.quoted(key)}:{json_fields.quoted(text)}" for key, text in documents.items()
    ]
    refs += [
        f'{json_fields.quoted(key)}:["{{{{data}}}}/{c.pack}",{c.offset},{c.length}]'
        for key, c in references
    ]
    head = f'"templates":{json_fields.encode({"data": data_url})},"refs":{{'
    tail = f'}},"dcpstore":{_encode_version(draft, content)}}}'
    body = [part.encode() for part in (head, ",".join(refs), tail)]
    return seal("version", _KERCHUNK, body)


def decode_manifest(data: bytes) -> Manifest:
    """Return what a manifest describes.

    Raises:
        CorruptionError: it is damaged or is not a manifest.
        SchemaError: a newer dcpstore wrote it.
    """
    if (found := check_seal(data, "version", what="manifest")) != _KERCHUNK:
        raise CorruptionError(f"the manifest is damaged: its kerchunk version is {found}")
    try:
        data_url, version = _opened(data)
        found = json_fields.read(version, _Format).format
        if found > _FORMAT:
            raise SchemaError(
                f"a manifest has format {found}, newer than {_FORMAT}; update dcpstore."
            )
        return Manifest(*_decode_version(version), data_url)
    except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise CorruptionError(
            f"a manifest lacks a member or has an invalid one ({type(error).__name__}: {error}); "
            "restore it from a copy, or take the version from the catalog."
        ) from error


def _encode_version(draft: VersionDraft, content: VersionContent) -> str:
    # Chunks name packs by number: a key would be repeated for each of thousands of chunks.
    packs = list(dict.fromkeys(chunk.pack for t in content.tensors for chunk in t.chunks))
    number = {pack: i for i, pack in enumerate(packs)}
    plan = content.plan
    facts = {
        "format": _FORMAT,
        **encode_facts(draft, content),
        "parent": draft.parent,
        "aliases": dict(content.aliases),
        "planner_data": content.planner_data,
        "written": [[pack.key, pack.nbytes] for pack in content.packs],
    }
    shards = ",".join(map(_encode_shard, plan.shards))
    entries = ",".join(map(_encode_entry, content.entries))
    tensors = ",".join([_encode_tensor(tensor, number) for tensor in content.tensors])
    return (
        f'{json_fields.encode(facts)[:-1]},"plan":{{"digest":"{plan.digest}",'
        f'"algorithm":"{plan.algorithm}","ranks":{plan.ranks},"shards":[{shards}]}},"entries":[{entries}],"packs":{json_fields.encode(packs)},'
        f'"tensors":[{tensors}]}}'
    )


def _encode_shard(shard: ShardRecord) -> str:
    offsets, sizes = map(json_fields.integers, (shard.box.offsets, shard.box.sizes))
    return f"[{json_fields.quoted(shard.fqn)},{shard.rank},{offsets},{sizes}]"


def _encode_entry(entry: NewEntry) -> str:
    fqn, path = json_fields.quoted(entry.fqn), json_fields.path(entry.path)
    tensor = "null" if entry.tensor_digest is None else f'"{entry.tensor_digest}"'
    value = "null" if entry.value is None else json_fields.quoted(entry.value)
    return f'[{fqn},{path},"{entry.kind}",{tensor},{value}]'


def _encode_tensor(tensor: NewTensor, number: Mapping[str, int]) -> str:
    """Return a tensor with each chunk's digest and place; part and ordinal follow from the order.

    Args:
        tensor: with all its chunks.
        number: of each pack.
    """
    chunks = tensor.chunks
    assert [c[:2] for c in chunks] == _ordinals(tensor.parts), f"chunks of {tensor.digest}"
    places = [f'["{c.digest.hex()}",{number[c.pack]},{c.offset},{c.length}]' for c in chunks]
    cut = _encode_cut(tensor.dtype, tensor.shape, tensor.codec, tensor.nbytes, tuple(tensor.parts))
    digest = f'"digest":"{tensor.digest}","algorithm":"{tensor.algorithm}"'
    return f'{{{digest},{cut},"chunks":[{",".join(places)}]}}'


@lru_cache(4096)
def _encode_cut(
    dtype: str, shape: tuple[int, ...], codec: str, nbytes: int, parts: tuple[Grid, ...]
) -> str:
    """Return what tensors of one kind have in common, without braces; few are distinct."""
    grids = [[part.offsets, part.shape, part.chunk_shape] for part in parts]
    facts = {"dtype": dtype, "shape": shape, "codec": codec, "nbytes": nbytes, "parts": grids}
    return json_fields.encode(facts)[1:-1]


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
