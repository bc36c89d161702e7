"""One rank's data as raw chunks: views of memory wherever possible, each with its digest.

Invariant: the chunks are in the order of the plan's items, then of the blobs by FQN. The
coordinator counts them in the same order, so a rank sends digests only, and no names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from dcpstore.core.digests import chunk_digest
from dcpstore.core.parallel import in_batches, run_ahead
from dcpstore.encoding.dtypes import as_bytes, check_plain
from dcpstore.encoding.values import EncodedValue
from dcpstore.errors import InvalidInputError
from dcpstore.geometry.boxes import Box
from dcpstore.planning.plan_table import item_box
from dcpstore.planning.save_planner import BoxResolver
from dcpstore.reading.box_reads import LocalBox
from dcpstore.records import ChunkDefaults, ChunkKey, EntryRecord
from dcpstore.saving.item_data import checked_tensor, encoded_item, error_of
from dcpstore.saving.layout import Layout, blob_layout, planned_chunks

__all__ = ["Digested", "RankData", "RawChunk", "first_indices", "total_nbytes"]

# A fifth is enough: the disk needs longer to write it than the cores need to digest the rest.
_FIRST = 5

Array = npt.NDArray[np.generic]
Bytes = npt.NDArray[np.uint8]
Source = Callable[[Box], Array]  # gives the elements of any box inside a planned one


class RawChunk(NamedTuple):
    """A chunk before it is encoded; `nbytes` counts its raw bytes, without padding.

    `held` are the raw bytes if they are contiguous in memory, or else a function that makes them.
    """

    codec: str
    itemsize: int
    nbytes: int
    held: Bytes | Callable[[], Bytes]

    def raw(self) -> Bytes:
        """Return the raw bytes; a chunk at the edge of its grid is padded with zeros."""
        return self.held if isinstance(self.held, np.ndarray) else self.held()


@dataclass(frozen=True, slots=True)
class Digested:
    """What a rank sends of its data: the digests of its chunks, joined, and its values.

    `blobs` are the values that are stored as chunks: too long for the catalog, or pickled. Each has
    its format and its length in bytes.
    """

    digests: bytes
    values: dict[str, str] = field(default_factory=dict)
    blobs: dict[str, tuple[str, int]] = field(default_factory=dict)


class RankData:
    """The data of one rank's plan.

    What lies in host memory is resolved once. What a device holds, or a BoxResolver makes, is
    resolved chunk by chunk, so that it is never in host memory all at once.
    """

    def __init__(
        self,
        plan: SavePlan,
        planner: SavePlanner,
        layouts: dict[str, Layout],
        *,
        chunk: ChunkDefaults,
        allow_pickle: bool,
    ) -> None:
        self._planner = planner
        # Asked once, not for each item: isinstance of a protocol looks at every attribute.
        self._resolver = planner if isinstance(planner, BoxResolver) else None
        self._values: dict[str, EncodedValue] = {}
        self._boxes: list[tuple[Box, WriteItem, Array | None]] = []
        self._digests: list[bytes] = []  # of the chunks digested so far
        self.chunks: list[RawChunk] = []
        for item in plan.items:
            fqn = item.index.fqn
            if item.tensor_data is None:
                self._values[fqn] = encoded_item(planner, item, allow_pickle=allow_pickle)
            else:
                box = item_box(item)
                array = self._array(item, box)
                self._boxes.append((box, item, array))
                if array is None:
                    self.chunks += _cut(layouts[fqn], box, self._source(item, box))
                else:
                    self.chunks += _cut_array(layouts[fqn], box, array)
        # By FQN, as the coordinator counts them: it does not know the order of the plan's values.
        for _, value in sorted(self._values.items()):
            if value.data is not None:
                layout = blob_layout(len(value.data), chunk)
                array = np.frombuffer(value.data, np.uint8)
                self.chunks += _cut_array(layout, Box.whole(layout.shape), array)

    def digest_first(
        self, pool: Executor, advance: Callable[[int], None] = lambda nbytes: None
    ) -> list[ChunkKey]:
        """Return (codec, digest) of the first chunks, which hold about a fifth of the bytes."""
        nbytes = np.cumsum([chunk.nbytes for chunk in self.chunks])
        end = int(np.searchsorted(nbytes, nbytes[-1] / _FIRST)) + 1 if self.chunks else 0
        self._digest_until(end, pool, advance)
        return self.keys

    def digest(
        self, pool: Executor, advance: Callable[[int], None] = lambda nbytes: None
    ) -> Digested:
        """Return the digests of all chunks, and the values.

        `advance` is called with the raw bytes of each batch that is done.
        """
        self._digest_until(len(self.chunks), pool, advance)
        return Digested(
            digests=b"".join(self._digests),
            values={f: v.text for f, v in self._values.items() if v.data is None},
            blobs={f: (v.text, len(v.data)) for f, v in self._values.items() if v.data is not None},
        )

    def _digest_until(self, end: int, pool: Executor, advance: Callable[[int], None]) -> None:
        batches = in_batches(self.chunks[len(self._digests) : end], attrgetter("nbytes"))
        for batch, digests in run_ahead(pool, _digest_all, batches):
            self._digests += digests
            advance(total_nbytes(batch))

    @property
    def keys(self) -> list[ChunkKey]:
        """(codec, digest) of the chunks that are digested so far, in order."""
        return [
            # strict=False: there are fewer digests until all chunks are done
            (chunk.codec, digest)
            for chunk, digest in zip(self.chunks, self._digests, strict=False)
        ]

    def held(self, entries: Sequence[EntryRecord]) -> list[LocalBox]:
        """Return this rank's boxes of these stored tensors, to compare their bytes."""
        by_fqn = {entry.fqn: entry for entry in entries}
        return [
            LocalBox(
                by_fqn[item.index.fqn],
                box,
                self._source(item, box) if array is None else _source_of(array, box),
            )
            for box, item, array in self._boxes
            if item.index.fqn in by_fqn
        ]

    def _array(self, item: WriteItem, box: Box) -> Array | None:
        """Return the elements of an item, or None if they are not in host memory."""
        if self._resolver is not None:
            return None
        tensor = self._tensor(item, box)
        try:
            if tensor.is_cpu:
                return as_bytes(tensor)
            check_plain(tensor)
        except InvalidInputError as error:
            raise error_of(item, error) from error
        return None

    def _source(self, item: WriteItem, box: Box) -> Source:
        resolver = self._resolver
        if resolver is not None:
            return lambda part: as_bytes(
                checked_tensor(item, resolver.resolve_box(item, part), part.sizes)
            )
        # Device memory is copied twice, to be digested and to be written: a copy of all of it in
        # host memory may not fit.
        return lambda part: as_bytes(self._tensor(item, box)[part.relative_to(box).slices].cpu())

    def _tensor(self, item: WriteItem, box: Box) -> torch.Tensor:
        return checked_tensor(item, self._planner.resolve_data(item), box.sizes)


def _source_of(array: Array, box: Box) -> Source:
    """Return a Source that slices `array`, which holds all of `box`."""
    return lambda part: array[part.relative_to(box).slices]


def _cut_array(layout: Layout, box: Box, array: Array) -> Sequence[RawChunk]:
    """Return the chunks of a box that is in host memory, as views of it if possible."""
    # Most tensors are small and one chunk. This is the quick way for them.
    if array.flags.c_contiguous and _is_one_cell(layout, box):
        return (RawChunk(layout.codec, layout.itemsize, array.nbytes, _flat_bytes(array)),)
    return list(_cut(layout, box, _source_of(array, box), are_views=True))


def _cut(
    layout: Layout, box: Box, source: Source, *, are_views: bool = False
) -> Iterator[RawChunk]:
    """Yield the chunks of a box.

    `are_views`: the source copies nothing. So a full cell is sliced now, and kept if it is
    contiguous; all other cells are made when their bytes are needed.
    """
    codec, itemsize = layout.codec, layout.itemsize
    for part, ordinal in planned_chunks(layout, box):
        grid = layout.grids[part]
        cell = grid.cell(ordinal)
        held: Bytes | Callable[[], Bytes] = partial(_padded_bytes, source, cell, grid.chunk_shape)
        if are_views and cell.sizes == grid.chunk_shape:
            piece = source(cell)
            if piece.flags.c_contiguous:
                held = _flat_bytes(piece)
        yield RawChunk(codec, itemsize, cell.volume * itemsize, held)


def _is_one_cell(layout: Layout, box: Box) -> bool:
    """Tell whether a box is exactly one chunk, without padding."""
    grids = layout.grids
    return len(grids) == 1 and grids[0].is_one_cell and grids[0].shape == box.sizes


def _flat_bytes(array: Array) -> Bytes:
    flat = array if array.ndim == 1 else array.reshape(-1)
    return flat.view(np.uint8)


def _padded_bytes(source: Source, cell: Box, chunk_shape: tuple[int, ...]) -> Bytes:
    """Return the raw bytes of a cell, padded with zeros to the shape of a chunk, as Zarr does."""
    piece = source(cell)
    if cell.sizes != chunk_shape:
        padded = np.zeros(chunk_shape, piece.dtype)
        padded[tuple(map(slice, cell.sizes))] = piece
        piece = padded
    return _flat_bytes(np.ascontiguousarray(piece))


def _digest_all(chunks: Sequence[RawChunk]) -> list[bytes]:
    return [chunk_digest(chunk.raw().data) for chunk in chunks]


def first_indices(keys: Iterable[ChunkKey]) -> dict[ChunkKey, int]:
    """Return the index at which each key occurs first."""
    indices: dict[ChunkKey, int] = {}
    for i, key in enumerate(keys):
        indices.setdefault(key, i)
    return indices


def total_nbytes(chunks: Sequence[RawChunk]) -> int:
    """Return the raw bytes of `chunks`, without padding."""
    return sum(chunk.nbytes for chunk in chunks)
