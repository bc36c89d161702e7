"""A version written with packs and a manifest, by the parts that a save is made of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from dcpstore.core.digests import chunk_digest, content_digest
from dcpstore.encoding.codecs import encode
from dcpstore.encoding.dtypes import as_bytes, dtype_name
from dcpstore.formats.manifest import encode_manifest, manifest_key
from dcpstore.geometry.grids import Grid
from dcpstore.records import (
    EntryRecord,
    NewChunk,
    NewEntry,
    NewTensor,
    PlanRecord,
    StoredChunk,
    TensorRecord,
    VersionContent,
    VersionDraft,
)
from dcpstore.storage.local import LocalFolder
from dcpstore.storage.packs import PackWriter
from dcpstore.zarr.documents import chunk_references, zarr_documents


@dataclass
class Written:
    """What a save leaves, and what the catalog would answer."""

    storage: LocalFolder
    manifest: Path
    entries: list[EntryRecord]
    chunks: list[StoredChunk] = field(default_factory=list)


Write = Callable[..., Written]


def raw_cell(array: np.ndarray, grid: Grid, ordinal: int) -> np.ndarray:
    """Return the elements of a chunk, padded as Zarr pads."""
    cell = np.zeros(grid.chunk_shape, array.dtype)
    box = grid.cell(ordinal)
    cell[tuple(slice(0, n) for n in box.sizes)] = array[box.slices]
    return cell


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_version(
        tensors: Mapping[str, tuple[torch.Tensor, tuple[Grid, ...]]],
        *,
        codec: str = "none",
        values: Mapping[str, str] | None = None,
        attributes: Mapping[str, object] | None = None,
    ) -> Written:
        storage = LocalFolder(tmp_path / "data", create=True)
        writer = PackWriter(storage, "ab12", 0)
        written = Written(storage, tmp_path / "data" / manifest_key("ab12"), [])
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
        known = {tensor.digest: tensor.chunks for tensor in contents.values()}
        content = VersionContent(
            entries=[
                NewEntry(e.fqn, e.path, e.kind, e.tensor and e.tensor.digest, e.value)
                for e in written.entries
            ],
            tensors=list({t.digest: t for t in contents.values()}.values()),
            packs=writer.finish(),
            plan=PlanRecord("p", 1, []),
            nbytes=0,
            nbytes_written=0,
            nbytes_reused=0,
            seconds={},
            created_at=datetime.now(UTC),
        )
        manifest = encode_manifest(
            VersionDraft(uid="ab12", branch="main"),
            content,
            data_url=storage.url,
            documents=zarr_documents(written.entries, attributes or {}),
            references=chunk_references(written.entries, known),
        )
        storage.put(manifest_key("ab12"), manifest)
        return written

    return write_version
