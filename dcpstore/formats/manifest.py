"""Manifests: the self-describing copy of one version, kept beside the packs.

A manifest is a kerchunk reference file, version 1: Zarr documents inline and every chunk as a range
of a pack, so plain Zarr with fsspec reads the version. Its "dcpstore" member holds what `rebuild`
needs to restore the catalog: every chunk of every tensor, those of earlier versions too. A digest
over the rest comes first, so that damage is known before anything is believed.
Format: https://fsspec.github.io/kerchunk/spec.html
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_args

from blake3 import blake3

from dcpstore.core.ref_syntax import check_name
from dcpstore.errors import CorruptionError, SchemaError
from dcpstore.formats import json_fields
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
)

__all__ = ["Manifest", "decode_manifest", "encode_manifest", "manifest_key"]

_FORMAT = 1
_HEAD = '{{"version": 1, "digest": "{}", '
_HEAD_PATTERN = re.compile(rb'\{"version": 1, "digest": "([0-9a-f]{64})", ')

# JSON as read: each field is checked as it is taken, so `Any`.
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Manifest:
    """One version as its manifest tells it; each tensor of `content` has all its chunks."""

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
    body = [part.encode() for part in (head, ",".join(refs), tail)]  # megabytes: few copies
    digest = blake3(b"{")
    for part in body:
        digest.update(part)
    return b"".join([_HEAD.format(digest.hexdigest()).encode(), *body])


def decode_manifest(data: bytes) -> Manifest:
    """Return what a manifest says.

    Raises:
        CorruptionError: it is damaged or is no manifest.
        SchemaError: a newer dcpstore wrote it.
    """
    head = _HEAD_PATTERN.match(data)
    if head is None:
        raise CorruptionError(
            f"no manifest: it begins with {data[:40]!r}; restore it from a copy, or save the "
            "version again."
        )
    found = blake3(b"{" + data[head.end() :]).hexdigest()
    if found != head[1].decode():
        raise CorruptionError(
            f"a manifest is damaged: its digest is {found}, not {head[1].decode()}; restore it "
            "from a copy, or take the version from the catalog."
        )
    try:
        body = json.loads(b"{" + data[head.end() :])
        said = body["dcpstore"]
        if json_fields.natural(said["format"]) > _FORMAT:
            raise SchemaError(
                f"a manifest has format {said['format']}, newer than {_FORMAT}; update dcpstore."
            )
        draft, content = _decode_version(said)
        return Manifest(draft, content, json_fields.text(body["templates"]["data"]))
    except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise CorruptionError(
            f"a manifest does not hold what it must ({type(error).__name__}: {error}); restore it "
            "from a copy, or take the version from the catalog."
        ) from error


def _encode_version(draft: VersionDraft, content: VersionContent) -> str:
    packs = list(dict.fromkeys(chunk.pack for t in content.tensors for chunk in t.chunks))
    number = {pack: i for i, pack in enumerate(packs)}
    plan = content.plan
    facts: Json = {
        "format": _FORMAT,
        "uid": draft.uid,
        "branch": draft.branch,
        "parent": draft.parent,
        "step": draft.step,
        "message": draft.message,
        "tags": draft.tags,
        "metrics": {name: _encode_float(value) for name, value in draft.metrics.items()},
        "labels": dict(draft.labels),
        "author": draft.author,
        "host": draft.host,
        "ranks": draft.ranks,
        "created_at": content.created_at.isoformat(),
        "nbytes": content.nbytes,
        "nbytes_written": content.nbytes_written,
        "nbytes_reused": content.nbytes_reused,
        "seconds": dict(content.seconds),
        "aliases": dict(content.aliases),
        "planner_data": content.planner_data,
        "written": [[pack.key, pack.nbytes] for pack in content.packs],
    }
    shards = ",".join(map(_encode_shard, plan.shards))
    entries = ",".join(map(_encode_entry, content.entries))
    tensors = ",".join([_encode_tensor(tensor, number) for tensor in content.tensors])
    return (
        f'{json_fields.encode(facts)[:-1]},"plan":{{"digest":"{plan.digest}","ranks":{plan.ranks},'
        f'"shards":[{shards}]}},"entries":[{entries}],"packs":{json_fields.encode(packs)},'
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
    return f'{{"digest":"{tensor.digest}",{cut},"chunks":[{",".join(places)}]}}'


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


def _decode_version(said: Json) -> tuple[VersionDraft, VersionContent]:
    draft = VersionDraft(
        uid=json_fields.uid(said["uid"]),
        branch=check_name(said["branch"], kind="branch"),
        parent=json_fields.optional(json_fields.natural)(said["parent"]),
        step=json_fields.optional(json_fields.natural)(said["step"]),
        message=json_fields.text(said["message"]),
        tags=tuple(json_fields.items(said["tags"], lambda tag: check_name(tag, kind="tag"))),
        metrics=json_fields.mapping(said["metrics"], json_fields.number),
        labels=json_fields.mapping(said["labels"], json_fields.text),
        author=json_fields.text(said["author"]),
        host=json_fields.text(said["host"]),
        ranks=json_fields.natural(said["ranks"]),
    )
    packs = json_fields.items(said["packs"], _pack_or_none)
    plan = said["plan"]
    content = VersionContent(
        entries=json_fields.items(said["entries"], _decode_entry),
        tensors=json_fields.items(said["tensors"], lambda tensor: _decode_tensor(tensor, packs)),
        packs=[
            PackRecord(*json_fields.entries(one, json_fields.pack, json_fields.natural))
            for one in json_fields.items(said["written"], list)
        ],
        plan=PlanRecord(
            json_fields.text(plan["digest"]),
            json_fields.natural(plan["ranks"]),
            json_fields.items(plan["shards"], _decode_shard),
        ),
        nbytes=json_fields.natural(said["nbytes"]),
        nbytes_written=json_fields.natural(said["nbytes_written"]),
        nbytes_reused=json_fields.natural(said["nbytes_reused"]),
        seconds=json_fields.mapping(said["seconds"], json_fields.number),
        created_at=json_fields.time(said["created_at"]),
        aliases=json_fields.mapping(said["aliases"], json_fields.text),
        planner_data=json_fields.optional(json_fields.text)(said["planner_data"]),
    )
    _check_names(content)
    return draft, content


def _check_names(content: VersionContent) -> None:
    """Check that FQNs and tensors are there once, and every tensor that is named."""
    fqns = {entry.fqn for entry in content.entries}
    digests = {tensor.digest for tensor in content.tensors}
    if len(fqns) < len(content.entries) or len(digests) < len(content.tensors):
        raise ValueError("an FQN or a tensor is there twice")
    named = {e.tensor_digest for e in content.entries if e.tensor_digest is not None}
    if lacking := (named | set(content.aliases.values())) - digests:
        raise ValueError(f"no tensor {min(lacking)} is described")


def _pack_or_none(found: object) -> str:
    """Return the key of a pack; a tensor without elements may name none."""
    return "" if found == "" else json_fields.pack(found)


def _decode_entry(said: Sequence[Any]) -> NewEntry:
    optional_text = json_fields.optional(json_fields.text)
    fqn, path, kind, digest, value = json_fields.entries(
        said, json_fields.text, StatePath.parsed, json_fields.text, optional_text, optional_text
    )
    if (kind == "value") == (digest is not None) or (kind == "value" and value is None):
        raise ValueError(f"{fqn!r} is a {kind!r} of tensor {digest!r} and value {value!r}")
    if kind not in get_args(EntryKind):
        raise ValueError(f"{fqn!r} is a {kind!r}")
    return NewEntry(fqn, path, kind, digest, value)


def _decode_shard(said: Sequence[Any]) -> ShardRecord:
    fqn, rank, offsets, sizes = said
    return ShardRecord(
        json_fields.text(fqn), json_fields.natural(rank), json_fields.box(offsets, sizes)
    )


def _decode_tensor(said: Json, packs: Sequence[str]) -> NewTensor:
    shape = json_fields.naturals(said["shape"])
    parts = tuple(json_fields.items(said["parts"], lambda part: json_fields.grid(part, shape)))
    count = sum(part.size for part in parts)
    if count != len(said["chunks"]):
        raise ValueError(f"{len(said['chunks'])} chunks for {count} cells of {said['digest']}")
    chunks = [
        NewChunk(
            part,
            ordinal,
            bytes.fromhex(digest),
            packs[json_fields.natural(pack)],
            json_fields.natural(offset),
            json_fields.natural(length),
        )
        for (part, ordinal), (digest, pack, offset, length) in zip(
            _ordinals(parts), said["chunks"], strict=True
        )
    ]
    return NewTensor(
        json_fields.text(said["digest"]),
        json_fields.text(said["dtype"]),
        shape,
        json_fields.text(said["codec"]),
        json_fields.natural(said["nbytes"]),
        parts,
        chunks,
    )


def _encode_float(value: float) -> float | str:
    """Return a metric as JSON holds it: "nan" and "inf" as text."""
    return value if math.isfinite(value) else str(value)
