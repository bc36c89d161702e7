"""A version's manifest, written with the Zarr documents that make it readable alone."""

from __future__ import annotations

from collections.abc import Sequence

from dcpstore.records import EntryRecord, VersionContent, VersionDraft
from dcpstore.storage.interface import Storage
from dcpstore.storage.manifests import encode_manifest, manifest_key
from dcpstore.zarr_view.documents import chunk_references, zarr_documents

__all__ = ["write_manifest"]


def write_manifest(
    storage: Storage, draft: VersionDraft, content: VersionContent, entries: Sequence[EntryRecord]
) -> None:
    """Write the manifest of a version, each of whose tensors has all its chunks.

    `entries` are those of `content` as records.
    """
    chunks = {tensor.digest: tensor.chunks for tensor in content.tensors}
    manifest = encode_manifest(
        draft,
        content,
        data_url=storage.url,
        documents=zarr_documents(entries, {"uid": draft.uid, "step": draft.step}),
        references=chunk_references(entries, chunks),
    )
    storage.put(manifest_key(draft.uid), manifest)
