"""Boxes of stored tensors: their chunks are found, and read into memory or compared with it.

A save compares if its ranks cut a tensor into other chunks than the stored ones (the world size
changed): then digests cannot show that the tensor is unchanged, so bytes are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import numpy.typing as npt
import torch

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.read.entries import load_chunks
from dcpstore.catalog.read.ref_lookup import resolve
from dcpstore.core.parallel import BATCH, in_batches
from dcpstore.encoding.dtypes import as_bytes, torch_dtype
from dcpstore.errors import CorruptionError
from dcpstore.geometry.boxes import Box
from dcpstore.reading.chunk_reads import ChunkReader
from dcpstore.records import ChunkRange, EntryRecord, StoredChunk
from dcpstore.storage.interface import Storage
from dcpstore.storage.packs import PackReader

__all__ = [
    "BoxRequest",
    "LocalBox",
    "ReadCounts",
    "chunk_ranges",
    "fill_boxes",
    "find_changed",
    "find_chunks",
    "find_ranges",
    "read_boxes",
]

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class BoxRequest:
    """A box of a stored tensor, and the target tensor of the same shape to copy it into."""

    entry: EntryRecord
    box: Box
    target: torch.Tensor


class _BoxFiller:
    """Copies chunks into the target of one request; `__init__` does what is common to all of them.

    If the stored and the target dtype differ, values are converted as `Tensor.copy_` does.
    """

    def __init__(self, request: BoxRequest) -> None:
        assert request.entry.tensor is not None
        self.entry = request.entry
        self._tensor = request.entry.tensor
        self._box, self._target = request.box, request.target
        self._dtype = torch_dtype(self._tensor.dtype)
        is_plain = (
            self._target.device.type == "cpu"
            and self._target.dtype == self._dtype
            # The memory of a lazy conj or neg view is not its value.
            and not (self._target.is_conj() or self._target.is_neg())
        )
        self._memory = as_bytes(self._target) if is_plain else None
        parts = self._tensor.parts
        # The fast case: most tensors are small, so they have one chunk, which is read whole.
        self._is_one_cell = (
            len(parts) == 1 and parts[0].is_one_cell and parts[0].shape == self._box.sizes
        )

    def copy_from(self, array: Array, part: int, ordinal: int) -> None:
        """Copy the elements of a chunk that are in the box; `array` is its cell with padding."""
        if self._is_one_cell and self._memory is not None:
            self._memory[...] = array
            return
        cell = self._tensor.parts[part].cell(ordinal)
        shared = cell.intersect(self._box)
        if shared is None:
            return
        piece = array[shared.relative_to(cell).slices]
        where = shared.relative_to(self._box).slices
        if self._memory is not None:
            self._memory[where] = piece
            return
        source = torch.from_numpy(piece.copy())
        same = source.dtype == self._dtype
        # Inference tensors can be written only in inference mode.
        with torch.inference_mode(self._target.is_inference()):
            self._target[where].copy_(source if same else source.view(self._dtype))


@dataclass(frozen=True, slots=True)
class ReadCounts:
    """The number of chunks that were read, and of their encoded bytes."""

    chunks: int
    nbytes: int


def find_chunks(
    boxes: Iterable[tuple[EntryRecord, Box]], catalog: Catalog, *, version: int
) -> list[StoredChunk]:
    """Return the chunks that intersect boxes of stored tensors, each once, in pack order.

    Raises:
        NotFoundError, CorruptionError: as `chunk_ranges` and `find_ranges`.
    """
    return find_ranges(chunk_ranges(boxes, version=version), catalog, version=version)


def chunk_ranges(boxes: Iterable[tuple[EntryRecord, Box]], *, version: int) -> list[ChunkRange]:
    """Return the ranges of the chunks that intersect boxes of stored tensors; they may overlap.

    Raises:
        CorruptionError: the parts in the catalog do not cover a box.
    """
    ranges: list[ChunkRange] = []
    for entry, box in boxes:
        assert entry.tensor is not None
        is_whole = box.sizes == entry.tensor.shape
        held = (grid.box.intersect(box) for grid in entry.tensor.parts)
        if sum(shared.volume for shared in held if shared is not None) != box.volume:
            # Without this check a part of the target would stay uninitialised.
            raise CorruptionError(
                f"v{version}: {entry.fqn!r}: the parts in the catalog do not cover the box at "
                f"offsets {box.offsets}, sizes {box.sizes}; read a part that they cover, or "
                "restore the catalog."
            )
        for part, grid in enumerate(entry.tensor.parts):
            ends = ((0, grid.size - 1),) if is_whole and grid.size else grid.ranges(box)
            ranges += [ChunkRange(entry.tensor.id, part, first, last) for first, last in ends]
    return ranges


def find_ranges(
    ranges: Sequence[ChunkRange], catalog: Catalog, *, version: int
) -> list[StoredChunk]:
    """Return the chunks of these ranges, each once, in pack order.

    Raises:
        NotFoundError: the version has expired in the meantime.
        CorruptionError: the catalog lacks some of them.
    """
    stored = load_chunks(catalog, ranges)
    if len(stored) != sum(last - first + 1 for _, _, first, last in ranges):
        resolve(catalog, version)  # raises NotFoundError if it expired during the read
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
    batch_nbytes: int = BATCH,
) -> ReadCounts:
    """Fill the targets of `requests`; each chunk is read and checked once.

    Args:
        requests: what to read; values are converted as `Tensor.copy_` does if the dtypes differ.
        catalog: where the chunks are found.
        packs: where they are read.
        version: of the entries.
        verify: whether digests are checked.
        advance: called with the encoded bytes of each batch that was read.
        batch_nbytes: encoded bytes that one task of the thread pool reads.

    Raises:
        NotFoundError, CorruptionError: as `find_chunks` and `fill_boxes`.
    """
    stored = find_chunks(((r.entry, r.box) for r in requests), catalog, version=version)
    return fill_boxes(
        requests,
        stored,
        packs,
        version=version,
        verify=verify,
        advance=advance,
        batch_nbytes=batch_nbytes,
    )


def fill_boxes(
    requests: Sequence[BoxRequest],
    stored: Sequence[StoredChunk],
    packs: PackReader,
    *,
    version: int,
    verify: bool = True,
    advance: Callable[[int], None] = lambda nbytes: None,
    batch_nbytes: int = BATCH,
) -> ReadCounts:
    """Fill the targets of `requests` from their chunks, which were found before.

    Args:
        requests: as for `read_boxes`, like the other arguments.
        stored: all chunks that intersect the boxes, in pack order, and no other ones.

    Raises:
        CorruptionError: naming version, FQN, chunk, pack and offset.
    """
    # Several requests may read one stored tensor: entries with equal contents share it.
    wanted: dict[int, list[_BoxFiller]] = {}
    for request in requests:
        assert request.entry.tensor is not None
        wanted.setdefault(request.entry.tensor.id, []).append(_BoxFiller(request))
    reader = ChunkReader(packs, version=version, verify=verify)

    def fill(batch: Sequence[StoredChunk]) -> int:
        waiting = [wanted[chunk.tensor_id] for chunk in batch]
        pairs = [(fillers[0].entry, c) for fillers, c in zip(waiting, batch, strict=True)]
        for chunk, fillers, array in zip(batch, waiting, reader.read_all(pairs), strict=True):
            for filler in fillers:
                filler.copy_from(array, chunk.part, chunk.ordinal)
        return sum(chunk.length for chunk in batch)

    # Reads, decoders and digests release the GIL, so threads use all cores.
    with ThreadPoolExecutor(torch.get_num_threads(), "dcpstore-read") as pool:
        nbytes = 0
        batches = in_batches(
            stored, attrgetter("length"), place=attrgetter("pack"), limit=batch_nbytes
        )
        for done in pool.map(fill, batches):
            nbytes += done
            advance(done)
    return ReadCounts(len(stored), nbytes)


def _check_complete(
    ranges: Sequence[ChunkRange], stored: Sequence[StoredChunk], version: int
) -> None:
    # Of a range longer than all that was found, one of so many ordinals is missing: a damaged grid
    # may claim more of them than can be counted through.
    most = len(stored)
    asked = {
        (tensor_id, part, ordinal)
        for tensor_id, part, first, last in ranges
        for ordinal in range(first, min(last, first + most) + 1)
    }
    missing = asked - {(chunk.tensor_id, chunk.part, chunk.ordinal) for chunk in stored}
    if missing:
        tensor_id, part, ordinal = min(missing)
        raise CorruptionError(
            f"v{version}: the catalog lacks chunk {ordinal} of part {part} of tensor {tensor_id} "
            f"({len(missing)} chunks in all); restore the catalog from a backup."
        )


@dataclass(frozen=True, slots=True)
class LocalBox:
    """A box of a stored tensor; `data` returns this process's elements of any box inside it."""

    entry: EntryRecord
    box: Box
    data: Callable[[Box], Array]


def find_changed(
    held: Sequence[LocalBox], catalog: Catalog, storage: Storage, *, version: int, pool: Executor
) -> set[str]:
    """Return the FQNs of tensors with an element here whose bits differ from the stored ones.

    A tensor is read only up to the first chunk that differs.
    """
    stored = find_chunks(((one.entry, one.box) for one in held), catalog, version=version)
    by_tensor: dict[int, list[StoredChunk]] = {}
    for chunk in stored:
        by_tensor.setdefault(chunk.tensor_id, []).append(chunk)
    with closing(PackReader(storage)) as packs:
        reader = ChunkReader(packs, version=version, verify=True)

        def changed(one: LocalBox) -> bool:
            assert one.entry.tensor is not None
            return any(_differs(one, reader, chunk) for chunk in by_tensor[one.entry.tensor.id])

        return {
            one.entry.fqn
            for one, differs in zip(held, pool.map(changed, held), strict=True)
            if differs
        }


def _differs(one: LocalBox, reader: ChunkReader, chunk: StoredChunk) -> bool:
    assert one.entry.tensor is not None
    cell = one.entry.tensor.parts[chunk.part].cell(chunk.ordinal)
    shared = cell.intersect(one.box)
    if shared is None:
        return False
    theirs = reader.read(one.entry, chunk)[shared.relative_to(cell).slices]
    return not np.array_equal(_bits(one.data(shared)), _bits(theirs))


def _bits(array: Array) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
