"""A version's manifest, written with the Zarr documents that make it readable alone."""

from __future__ import annotations

from dcpstore.records import EntryRecord, TensorRecord, VersionContent, VersionDraft
from dcpstore.storage.interface import Storage
from dcpstore.storage.manifests import encode_manifest, manifest_key
from dcpstore.zarr_view.documents import chunk_references, zarr_documents

__all__ = ["write_manifest"]


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
