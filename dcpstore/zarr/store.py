"""A read-only Zarr store over one version: documents made here, chunks read out of packs.

Chunk places are asked for once an array, when its first chunk is read. Every chunk is checked
against its digest, and a chunk that cannot be found is an error: Zarr would read it as zeros.
"""

from __future__ import annotations

import asyncio
import math
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import NoReturn

from typing_extensions import Buffer as Bytes
from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype

from dcpstore.core.digests import chunk_digest
from dcpstore.encoding.codecs import check_held, decode
from dcpstore.encoding.dtypes import numpy_dtype
from dcpstore.errors import CorruptionError
from dcpstore.records import ChunkRange, EntryRecord, StoredChunk
from dcpstore.zarr.documents import array_names, chunk_keys, zarr_documents

__all__ = ["VersionStore"]


class VersionStore(Store):
    """A version that `zarr.open_group` takes.

    Args:
        name: of the version, for messages ("v12").
        entries: of the version.
        attributes: JSON values for the root group.
        find: returns the stored chunks in ranges of ordinals, as the catalog does.
        read: returns the encoded bytes at (pack, offset, length), as `PackReader.read` does.
        verify: check each chunk against its digest, at the cost of decoding it once more.
    """

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(
        self,
        name: str,
        entries: Sequence[EntryRecord],
        *,
        attributes: Mapping[str, object],
        find: Callable[[Sequence[ChunkRange]], Iterable[StoredChunk]],
        read: Callable[[str, int, int], Bytes],
        verify: bool = True,
    ) -> None:
        super().__init__(read_only=True)
        self._name, self._find, self._read, self._verify = name, find, read, verify
        self._documents = zarr_documents(entries, attributes)
        self._arrays = {
            array: (entry, part)
            for entry in entries
            for part, array in enumerate(array_names(entry))
        }
        self._places: dict[tuple[int, int], dict[int, StoredChunk]] = {}
        self._lock = threading.Lock()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VersionStore) and (
            (self._name, self._documents, self._read)
            == (other._name, other._documents, other._read)
        )

    __hash__ = None  # type: ignore[assignment]  # as every Zarr store: equal by content

    def __str__(self) -> str:
        return f"dcpstore:{self._name}"

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """Return a document or a chunk; None for a key that the version does not have."""
        await self._ensure_open()
        prototype = prototype or default_buffer_prototype()
        document = self._documents.get(key)
        if document is not None:
            return _cut(prototype.buffer.from_bytes(document.encode()), byte_range)
        chunk = self._locate(key)
        if chunk is None:
            return None
        encoded = await asyncio.to_thread(self._fetch, *chunk)
        return _cut(prototype.buffer.from_bytes(memoryview(encoded)), byte_range)

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        """Return `get` of each key and range."""
        return list(await asyncio.gather(*(self.get(k, prototype, r) for k, r in key_ranges)))

    async def exists(self, key: str) -> bool:
        """Tell whether the version has this document or chunk."""
        return key in self._documents or self._locate(key) is not None

    async def set(self, key: str, value: Buffer) -> None:
        """Refuse: a committed version never changes."""
        self._refuse()

    async def delete(self, key: str) -> None:
        """Refuse: a committed version never changes."""
        self._refuse()

    async def list(self) -> AsyncIterator[str]:
        """Yield every key."""
        for key in self._keys():
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield the keys that begin with `prefix`."""
        for key in self._keys():
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names right below the node `prefix`."""
        folder = prefix.rstrip("/") + "/" if prefix.rstrip("/") else ""
        # Every node has a document, so chunk keys are looked through only inside their array.
        keys = self._keys(folder.split("/")[0]) if folder else iter(self._documents)
        below = (key[len(folder) :] for key in keys if key.startswith(folder))
        for name in dict.fromkeys(key.split("/")[0] for key in below):
            yield name

    def _keys(self, node: str | None = None) -> Iterable[str]:
        """Yield every key, or those of arrays at or below a node of the root."""
        yield from self._documents
        for array, (entry, part) in self._arrays.items():
            if node is None or array.split("/")[0] == node:
                assert entry.tensor is not None
                yield from chunk_keys(array, entry.tensor.parts[part])

    def _locate(self, key: str) -> tuple[EntryRecord, int, int] | None:
        """Return the entry, part and ordinal of a chunk key; None if there is no such chunk."""
        names = key.split("/")
        for depth in (1, 2):
            found = self._arrays.get("/".join(names[:depth]))
            if found is not None and names[depth : depth + 1] == ["c"]:
                entry, part = found
                assert entry.tensor is not None
                ordinal = _ordinal(names[depth + 1 :], entry.tensor.parts[part].counts)
                return None if ordinal is None else (entry, part, ordinal)
        return None

    def _fetch(self, entry: EntryRecord, part: int, ordinal: int) -> Bytes:
        assert entry.tensor is not None
        tensor = entry.tensor
        chunk = self._chunks(tensor.id, part, math.prod(tensor.parts[part].counts)).get(ordinal)
        where = f"chunk {ordinal} of part {part} of {entry.fqn!r} in {self._name}"
        if chunk is None:
            raise CorruptionError(f"{where} is not in the catalog; run 'dcpstore verify'.")
        where += f" (pack {chunk.pack!r}, offset {chunk.offset})"
        encoded = self._read(chunk.pack, chunk.offset, chunk.length)
        if self._verify:
            cell = math.prod(tensor.parts[part].chunk_shape)
            nbytes = cell * numpy_dtype(tensor.dtype).itemsize
            try:
                check_held(tensor.codec, encoded, nbytes)
                raw = bytearray(nbytes)
                decode(tensor.codec, encoded, raw)
            except CorruptionError as error:
                raise CorruptionError(f"{where} is damaged: {error}") from error
            found = chunk_digest(raw, algorithm=tensor.algorithm)
            if found != chunk.digest:
                raise CorruptionError(
                    f"{where} is damaged: its digest is {found.hex()}, not "
                    f"{chunk.digest.hex()}; run 'dcpstore verify' to see what else is damaged."
                )
        return encoded

    def _chunks(self, tensor: int, part: int, count: int) -> dict[int, StoredChunk]:
        with self._lock:  # threads that read one array ask the catalog once
            known = self._places.get((tensor, part))
            if known is None:
                found = self._find([ChunkRange(tensor, part, 0, count - 1)])
                known = self._places[tensor, part] = {chunk.ordinal: chunk for chunk in found}
            return known

    def _refuse(self) -> NoReturn:
        raise ValueError(
            f"{self._name} is a committed version, which never changes; save a new version with "
            "dcpstore.save."
        )


def _ordinal(index: Sequence[str], counts: Sequence[int]) -> int | None:
    """Return the row-major ordinal of a cell; None if it is outside of the grid."""
    if len(index) != len(counts):
        return None
    ordinal = 0
    for text, count in zip(index, counts, strict=True):
        if not re.fullmatch("0|[1-9][0-9]{0,18}", text) or int(text) >= count:
            return None
        ordinal = ordinal * count + int(text)
    return ordinal


def _cut(value: Buffer, byte_range: ByteRequest | None) -> Buffer:
    match byte_range:
        case RangeByteRequest(start, end):
            return value[start:end]
        case OffsetByteRequest(offset):
            return value[offset : len(value)]
        case SuffixByteRequest(suffix):
            return value[max(len(value) - suffix, 0) : len(value)]
        case _:
            return value
