"""A version written with packs, page, manifest and reference, by the parts that a save has."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dcpstore.core.digests import chunk_digest, content_digest
from dcpstore.encoding.codecs import encode
from dcpstore.encoding.dtypes import as_bytes, dtype_name
from dcpstore.formats.entry_tree import grow
from dcpstore.formats.manifest import Manifest, encode_manifest, manifest_key
from dcpstore.formats.page import encode_page, page_key
from dcpstore.geometry.grids import Grid
from dcpstore.records import (
    EntryRecord,
    NewChunk,
    NewEntry,
    NewTensor,
    StoredChunk,
    TensorRecord,
    VersionDraft,
    VersionStats,
)
from dcpstore.storage.local import LocalFolder
from dcpstore.storage.packs import PackWriter
from dcpstore.zarr.documents import array_heads, array_names, chunk_keys, zarr_documents


@dataclass
class Written:
    """What a save leaves, and what the catalog would answer."""

    storage: LocalFolder
    reference: Path
    entries: list[EntryRecord]
    chunks: list[StoredChunk] = field(default_factory=list)


Write = Callable[..., Written]


def raw_cell(array: np.ndarray, grid: Grid, ordinal: int) -> np.ndarray:
    """Return the elements of a chunk, padded as Zarr pads."""
    cell = np.zeros(grid.chunk_shape, array.dtype)
    box = grid.cell(ordinal)
    cell[tuple(slice(0, n) for n in box.sizes)] = array[box.slices]
    return cell


def referred(
    url: str,
    entries: Sequence[EntryRecord],
    chunks: Mapping[str, Sequence[NewChunk]],
    attributes: Mapping[str, object],
) -> dict[str, Any]:
    """Return the reference of a version, from the documents and keys of `VersionStore`."""
    refs: dict[str, Any] = dict(zarr_documents(entries, attributes))
    for entry in entries:
        if entry.tensor is not None:
            parts = zip(array_names(entry), entry.tensor.parts, strict=True)
            keys = itertools.chain.from_iterable(itertools.starmap(chunk_keys, parts))
            for key, chunk in zip(keys, chunks[entry.tensor.digest], strict=True):
                refs[key] = ["{{data}}/" + chunk.pack, chunk.offset, chunk.length]
    return {"version": 1, "templates": {"data": url}, "refs": refs}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_version(
        tensors: Mapping[str, tuple[torch.Tensor, tuple[Grid, ...]]],
        *,
        codec: str = "none",
        values: Mapping[str, str] | None = None,
        step: int | None = None,
    ) -> Written:
        storage = LocalFolder(tmp_path / "data", create=True)
        writer = PackWriter(storage, "ab12", 0)
        written = Written(storage, tmp_path / "data" / "references" / "ab12.json", [])
        contents: dict[str, NewTensor] = {}
        for number, (fqn, (tensor, parts)) in enumerate(tensors.items()):
            array = as_bytes(tensor)
            chunks = []
            for part, grid in enumerate(parts):
                for ordinal in range(int(np.prod(grid.counts))):
                    raw = raw_cell(array, grid, ordinal)
                    place = writer.append(encode(codec, raw, raw.itemsize))
                    digest = chunk_digest(raw.reshape(-1).view(np.uint8))
                    chunks.append(NewChunk(part, ordinal, digest, *place))
            name = dtype_name(tensor.dtype)
            shape = tuple(tensor.shape)
            digest = content_digest(name, shape, parts, [c.digest for c in chunks])
            contents[fqn] = NewTensor(digest, name, shape, codec, array.nbytes, parts, chunks)
            record = TensorRecord(number, digest, name, shape, codec, array.nbytes, parts)
            written.entries.append(EntryRecord(fqn, (fqn,), "tensor", record))
            written.chunks += [StoredChunk(number, *chunk) for chunk in chunks]
        for fqn, value in (values or {}).items():
            written.entries.append(EntryRecord(fqn, (fqn,), "value", None, value))
        known = {tensor.digest: tensor for tensor in contents.values()}
        tree = grow(
            [
                NewEntry(e.fqn, e.path, e.kind, e.tensor and e.tensor.digest, e.value)
                for e in written.entries
            ]
        )
        page = encode_page(
            page_key("ab12"),
            sets=tree.sets,
            groups=[*((1, one) for one in tree.groups), (2, tree.root)],
            tensors=known,
            elsewhere={},
            documents=array_heads,
        )
        storage.put(page_key("ab12"), page)
        manifest = Manifest(
            draft=VersionDraft(uid="ab12", branch="main", step=step),
            stats=VersionStats(
                created_at=datetime.now(UTC),
                nbytes=0,
                nbytes_written=0,
                nbytes_reused=0,
                seconds={},
            ),
            root=tree.root.digest,
            page=page_key("ab12"),
            plan="plans/ab12.json",
            packs=writer.finish(),
        )
        storage.put(manifest_key("ab12"), encode_manifest(manifest))
        reference = referred(
            storage.url,
            sorted(written.entries, key=lambda entry: entry.fqn),
            {digest: tensor.chunks for digest, tensor in known.items()},
            {"uid": "ab12", "step": step},
        )
        storage.put("references/ab12.json", json.dumps(reference).encode())
        return written

    return write_version
