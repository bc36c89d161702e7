"""Boxes of stored tensors, read: which chunks they meet, where those lie, and into which memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dcpstore.catalog import Catalog
from dcpstore.encoding.dtypes import as_bytes, torch_dtype
from dcpstore.errors import CorruptionError
from dcpstore.geometry.boxes import Box
from dcpstore.reading.chunks import ChunkReader
from dcpstore.records import ChunkRange, EntryRecord, StoredChunk
from dcpstore.storage.packs import PackReader

__all__ = ["BoxRequest", "ReadCounts", "find_chunks", "read_boxes"]


@dataclass(frozen=True, slots=True)
class BoxRequest:
    """A box of a stored tensor, and the tensor of the same sizes that it fills."""

    entry: EntryRecord
    box: Box
    target: torch.Tensor


@dataclass(frozen=True, slots=True)
class ReadCounts:
    """What a read took: chunks, and their encoded bytes."""

    chunks: int
    nbytes: int


def find_chunks(
    boxes: Iterable[tuple[EntryRecord, Box]], catalog: Catalog, *, version: int
) -> list[StoredChunk]:
    """Return the chunks that boxes of stored tensors meet, each once, as they lie in the packs.

    Raises:
        NotFoundError: the version expired meanwhile.
        CorruptionError: the catalog lacks some of them.
    """
    ranges: list[ChunkRange] = []
    for entry, box in boxes:
        assert entry.tensor is not None
        for part, grid in enumerate(entry.tensor.parts):
            ranges += [ChunkRange(entry.tensor.id, part, *ends) for ends in grid.ranges(box)]
    stored = catalog.chunks(ranges)
    if len(stored) != sum(last - first + 1 for _, _, first, last in ranges):
        catalog.resolve(version)  # says so if it expired while it was being read
        _check_complete(ranges, stored, version)
    return stored


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
    for request in requests:
        assert request.entry.tensor is not None
        wanted.setdefault(request.entry.tensor.id, []).append(request)
    stored = find_chunks(((r.entry, r.box) for r in requests), catalog, version=version)
    reader = ChunkReader(packs, version=version, verify=verify)

    def fill(chunk: StoredChunk) -> int:
        waiting = wanted[chunk.tensor_id]
        array = reader.read(waiting[0].entry, chunk)
        for request in waiting:
            _copy_shared(array, chunk, request)
        return chunk.length

    with ThreadPoolExecutor(torch.get_num_threads(), "dcpstore-read") as pool:
        for nbytes in pool.map(fill, stored):
            advance(nbytes)
    return ReadCounts(len(stored), sum(chunk.length for chunk in stored))


def _copy_shared(array: npt.NDArray[np.generic], chunk: StoredChunk, request: BoxRequest) -> None:
    tensor = request.entry.tensor
    assert tensor is not None
    cell = tensor.parts[chunk.part].cell(chunk.ordinal)
    shared = cell.intersect(request.box)
    if shared is None:
        return
    target = request.target[shared.relative_to(request.box).slices]
    piece = array[shared.relative_to(cell).slices]
    dtype = torch_dtype(tensor.dtype)
    if target.device.type == "cpu" and target.dtype == dtype:
        as_bytes(target)[...] = piece
        return
    source = torch.from_numpy(piece.copy())
    target.copy_(source if source.dtype == dtype else source.view(dtype))


def _check_complete(
    ranges: Sequence[ChunkRange], stored: Sequence[StoredChunk], version: int
) -> None:
    missing = set(_ordinals(ranges)) - {(c.tensor_id, c.part, c.ordinal) for c in stored}
    if missing:
        tensor_id, part, ordinal = min(missing)
        raise CorruptionError(
            f"v{version}: the catalog lacks chunk {ordinal} of part {part} of tensor {tensor_id} "
            f"({len(missing)} chunks in all); restore the catalog from a backup."
        )


def _ordinals(ranges: Sequence[ChunkRange]) -> Iterator[tuple[int, int, int]]:
    for tensor_id, part, first, last in ranges:
        for ordinal in range(first, last + 1):
            yield tensor_id, part, ordinal
