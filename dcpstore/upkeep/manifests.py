"""Manifests written from the catalog: anew where chunks moved, and for copies.

Invariant: a pack is not deleted while a manifest names it, so plain Zarr and a rebuild find every
committed version at any time.
"""

from __future__ import annotations

from dcpstore.catalog import Catalog
from dcpstore.errors import CorruptionError, NotFoundError
from dcpstore.records import EntryRecord, TensorRecord, VersionContent, VersionDraft
from dcpstore.storage.interface import Storage
from dcpstore.storage.manifests import encode_manifest, manifest_key
from dcpstore.zarr_view.documents import chunk_references, zarr_documents

__all__ = ["renew_manifests", "write_manifest"]


def renew_manifests(catalog: Catalog, storage: Storage) -> int:
    """Write the manifests anew that name places of the past; return how many."""
    upkeep = catalog.upkeep()
    renewed = 0
    tried: set[tuple[int, str]] = set()
    while new := [found for found in upkeep.stale_versions().items() if found not in tried]:
        for number, mark in new:
            tried.add((number, mark))
            try:
                draft, content = upkeep.content(number)
            except (NotFoundError, CorruptionError):  # expired meanwhile; or for verify to report
                continue
            write_manifest(storage, draft, content)
            # Where chunks moved again since, the mark is another, and the loop comes back to it.
            renewed += upkeep.clear_stale(number, mark)
    return renewed


def write_manifest(storage: Storage, draft: VersionDraft, content: VersionContent) -> None:
    """Write the manifest of a version, each of whose tensors has all its chunks."""
    entries = _records(content)
    chunks = {tensor.digest: tensor.chunks for tensor in content.tensors}
    manifest = encode_manifest(
        draft,
        content,
        chunks=chunks,
        data_url=storage.url,
        documents=zarr_documents(entries, {"uid": draft.uid, "step": draft.step}),
        references=chunk_references(entries, chunks),
    )
    storage.put(manifest_key(draft.uid), manifest)


def _records(content: VersionContent) -> list[EntryRecord]:
    tensors = {
        tensor.digest: TensorRecord(
            id=0,
            digest=tensor.digest,
            dtype=tensor.dtype,
            shape=tensor.shape,
            codec=tensor.codec,
            nbytes=tensor.nbytes,
            parts=tuple(tensor.parts),
        )
        for tensor in content.tensors
    }
    return [
        EntryRecord(
            entry.fqn,
            entry.path,
            entry.kind,
            None if entry.tensor_digest is None else tensors[entry.tensor_digest],
            entry.value,
        )
        for entry in content.entries
    ]
