"""Boxes of stored tensors, read: which chunks they meet, where those lie, and into which memory.

Invariant: no byte reaches a target before the digest of its chunk has been checked, unless the
caller asked for none (design, invariant 6).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dcpstore.catalog import Catalog
from dcpstore.encoding.codecs import decode
from dcpstore.encoding.digests import chunk_digest
from dcpstore.encoding.dtypes import as_bytes, numpy_dtype, torch_dtype
from dcpstore.encoding.values import decode_value
from dcpstore.errors import CorruptionError, UnsafeDataError
from dcpstore.geometry.boxes import Box
from dcpstore.records import ChunkRange, EntryRecord, StoredChunk
from dcpstore.storage.packs import PackReader

__all__ = ["BoxRequest", "ReadCounts", "read_boxes", "read_values"]

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class BoxRequest:
    """A box of a stored tensor, and the tensor of the same sizes that it fills."""

    entry: EntryRecord
    box: Box
    target: torch.Tensor


@dataclass(slots=True)
class ReadCounts:
    """What a read took: chunks, and their encoded bytes."""

    chunks: int = 0
    nbytes: int = 0


def read_boxes(
    requests: Sequence[BoxRequest],
    catalog: Catalog,
    packs: PackReader,
    *,
    version: int,
    verify: bool = True,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> ReadCounts:
    """Fill the targets of `requests`; each chunk is read and checked once, whoever wants it.

    Where stored and target dtype differ the values are converted, as `Tensor.copy_` does. `advance`
    hears of encoded bytes read.

    Raises:
        CorruptionError: naming version, FQN, chunk, pack and offset.
    """
    wanted: dict[int, list[BoxRequest]] = {}
    ranges: list[ChunkRange] = []
    for request in requests:
        tensor = request.entry.tensor
        assert tensor is not None
        wanted.setdefault(tensor.id, []).append(request)
        for part, grid in enumerate(tensor.parts):
            ranges += [ChunkRange(tensor.id, part, *ends) for ends in grid.ranges(request.box)]
    stored = catalog.chunks(ranges)
    _check_complete(ranges, stored, wanted, version)
    reader = _ChunkReader(packs, wanted, version=version, verify=verify)
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, "dcpstore-load") as pool:
        for chunk in pool.map(reader.read, stored):
            advance(chunk.length)
    return ReadCounts(len(stored), sum(chunk.length for chunk in stored))


class _ChunkReader:
    """Reads one chunk at a time into every target that wants some of it; used by many threads."""

    def __init__(
        self,
        packs: PackReader,
        wanted: dict[int, list[BoxRequest]],
        *,
        version: int,
        verify: bool,
    ) -> None:
        self._packs = packs
        self._wanted = wanted
        self._version = version
        self._verify = verify
        self._scratch = threading.local()

    def read(self, chunk: StoredChunk) -> StoredChunk:
        """Fill what `chunk` holds of every request for its tensor."""
        requests = self._wanted[chunk.tensor_id]
        tensor = requests[0].entry.tensor
        assert tensor is not None
        grid = tensor.parts[chunk.part]
        dtype = numpy_dtype(tensor.dtype)
        raw_nbytes = dtype.itemsize * int(np.prod(grid.chunk_shape, dtype=np.int64))
        try:
            raw = self._raw(chunk, tensor.codec, raw_nbytes)
        except CorruptionError as error:
            raise _damaged(self._version, requests[0].entry.fqn, chunk, str(error)) from error
        cell = grid.cell(chunk.ordinal)
        array = np.frombuffer(raw, dtype).reshape(grid.chunk_shape)
        for request in requests:
            shared = cell.intersect(request.box)
            if shared is not None:
                _copy(
                    request.target[shared.relative_to(request.box).slices],
                    array[shared.relative_to(cell).slices],
                    torch_dtype(tensor.dtype),
                )
        return chunk

    def _raw(self, chunk: StoredChunk, codec: str, nbytes: int) -> memoryview:
        encoded = self._packs.read(chunk.pack, chunk.offset, chunk.length)
        if codec == "none":
            if len(encoded) != nbytes:
                raise CorruptionError(f"{len(encoded)} bytes are stored and {nbytes} are needed")
            raw = encoded
        else:
            raw = self._buffer(nbytes)
            decode(codec, encoded, raw)
        if self._verify and chunk_digest(raw) != chunk.digest:
            raise CorruptionError("its bytes are not what its digest says")
        return raw

    def _buffer(self, nbytes: int) -> memoryview:
        """Return this thread's scratch memory; good until its next chunk."""
        kept: bytearray | None = getattr(self._scratch, "kept", None)
        if kept is None or len(kept) < nbytes:
            kept = self._scratch.kept = bytearray(nbytes)
        return memoryview(kept)[:nbytes]


def read_values(
    entries: Sequence[EntryRecord],
    catalog: Catalog,
    packs: PackReader,
    *,
    version: int,
    allow_pickle: bool,
) -> list[object]:
    """Return the values of entries that are values or blobs, in their order.

    Raises:
        UnsafeDataError: one is a pickle, and `allow_pickle` is not given.
        CorruptionError: a text or its bytes are damaged.
    """
    blobs = {
        entry.fqn: torch.empty(entry.tensor.shape, dtype=torch.uint8)
        for entry in entries
        if entry.tensor is not None
    }
    requests = [
        BoxRequest(entry, Box.whole(blobs[entry.fqn].shape), blobs[entry.fqn])
        for entry in entries
        if entry.fqn in blobs
    ]
    if requests:
        read_boxes(requests, catalog, packs, version=version)
    values = []
    for entry in entries:
        assert entry.value is not None
        blob = blobs.get(entry.fqn)
        data = None if blob is None else blob.numpy().tobytes()
        try:
            values.append(decode_value(entry.value, data, allow_pickle=allow_pickle))
        except (UnsafeDataError, CorruptionError) as error:
            raise type(error)(f"v{version}: {entry.fqn!r}: {error}") from error
    return values


def _copy(target: torch.Tensor, array: Array, dtype: torch.dtype) -> None:
    if target.device.type == "cpu" and target.dtype == dtype:
        into = as_bytes(target)
        into[...] = array
        return
    source = torch.from_numpy(array.copy())
    target.copy_(source if source.dtype == dtype else source.view(dtype))


def _check_complete(
    ranges: Sequence[ChunkRange],
    stored: Sequence[StoredChunk],
    wanted: dict[int, list[BoxRequest]],
    version: int,
) -> None:
    """Check that the catalog knows every chunk that was asked for."""
    asked = {
        (tensor_id, part, ordinal)
        for tensor_id, part, first, last in ranges
        for ordinal in range(first, last + 1)
    }
    missing = asked - {(c.tensor_id, c.part, c.ordinal) for c in stored}
    if missing:
        tensor_id, part, ordinal = min(missing)
        raise CorruptionError(
            f"v{version}: {wanted[tensor_id][0].entry.fqn!r}: the catalog lacks chunk {ordinal} of "
            f"part {part} ({len(missing)} in all); restore the catalog from a backup."
        )


def _damaged(version: int, fqn: str, chunk: StoredChunk, what: str) -> CorruptionError:
    return CorruptionError(
        f"v{version}: {fqn!r}: chunk {chunk.ordinal} of part {chunk.part} in pack {chunk.pack} at "
        f"offset {chunk.offset}, length {chunk.length}: {what}. Restore the pack from a backup, or "
        "load another version."
    )
