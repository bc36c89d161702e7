"""Boxes of stored tensors, read: which chunks they meet, where those lie, and into which memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter

import torch

from dcpstore.batches import in_batches
from dcpstore.catalog import Catalog
from dcpstore.errors import CorruptionError
from dcpstore.geometry.boxes import Box
from dcpstore.reading.chunks import ChunkReader
from dcpstore.reading.filling import BoxRequest, Filling
from dcpstore.records import ChunkRange, EntryRecord, StoredChunk
from dcpstore.storage.packs import PackReader

__all__ = ["BoxRequest", "ReadCounts", "find_chunks", "read_boxes"]


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
        CorruptionError: the catalog lacks some of them, or no part holds what a box wants.
    """
    ranges: list[ChunkRange] = []
    for entry, box in boxes:
        assert entry.tensor is not None
        is_whole = box.sizes == entry.tensor.shape
        held = (grid.box.intersect(box) for grid in entry.tensor.parts)
        if sum(shared.volume for shared in held if shared is not None) != box.volume:
            raise CorruptionError(  # or memory that nobody filled would be handed out
                f"v{version}: {entry.fqn!r}: the parts that the catalog knows do not hold offsets "
                f"{box.offsets}, sizes {box.sizes}; read what they hold, or restore the catalog."
            )
        for part, grid in enumerate(entry.tensor.parts):
            ends = ((0, grid.size - 1),) if is_whole and grid.size else grid.ranges(box)
            ranges += [ChunkRange(entry.tensor.id, part, first, last) for first, last in ends]
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
    wanted: dict[int, list[Filling]] = {}
    for request in requests:
        assert request.entry.tensor is not None
        wanted.setdefault(request.entry.tensor.id, []).append(Filling(request))
    stored = find_chunks(((r.entry, r.box) for r in requests), catalog, version=version)
    reader = ChunkReader(packs, version=version, verify=verify)

    def fill(batch: Sequence[StoredChunk]) -> int:
        waiting = [wanted[chunk.tensor_id] for chunk in batch]
        pairs = [(fillings[0].entry, c) for fillings, c in zip(waiting, batch, strict=True)]
        for chunk, fillings, array in zip(batch, waiting, reader.read_all(pairs), strict=True):
            for filling in fillings:
                filling.take(array, chunk.part, chunk.ordinal)
        return sum(chunk.length for chunk in batch)

    with ThreadPoolExecutor(torch.get_num_threads(), "dcpstore-read") as pool:
        nbytes = 0
        for done in pool.map(
            fill, in_batches(stored, attrgetter("length"), place=attrgetter("pack"))
        ):
            nbytes += done
            advance(done)
    return ReadCounts(len(stored), nbytes)


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
