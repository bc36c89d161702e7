"""One rank's data as raw chunks: views wherever memory allows, each with its digest.

Invariant: the chunks come in the order of the plan's items, then of the blobs by FQN, which is how
the coordinator counts them too; so only digests travel.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.checkpoint import default_planner as torch_planner
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from dcpstore.encoding.digests import chunk_digest
from dcpstore.encoding.dtypes import as_bytes
from dcpstore.encoding.values import EncodedValue, encode_value
from dcpstore.errors import InvalidInputError, UnsafeDataError
from dcpstore.geometry.boxes import Box
from dcpstore.geometry.grids import Grid
from dcpstore.planning.checks import item_box
from dcpstore.reading.comparing import Held
from dcpstore.records import ChunkDefaults, EntryRecord
from dcpstore.saving.layouts import Layout, blob_layout, planned_chunks

__all__ = ["Digested", "RankData", "RawChunk"]

Array = npt.NDArray[np.generic]
Source = Callable[[], Array]  # of a box's elements


@dataclass(frozen=True, slots=True)
class RawChunk:
    """A chunk before it is encoded; `source` gives the elements of `box`."""

    source: Source
    box: Box
    grid: Grid
    ordinal: int
    codec: str
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Raw bytes inside the part, without padding."""
        return self.grid.cell(self.ordinal).volume * self.itemsize

    def raw(self) -> npt.NDArray[np.uint8]:
        """Return the raw bytes; past its part a cell is padded with zeros, as in Zarr."""
        array = self.source()
        cell = self.grid.cell(self.ordinal)
        piece = array[cell.relative_to(self.box).slices]
        if cell.sizes != self.grid.chunk_shape:
            padded = np.zeros(self.grid.chunk_shape, array.dtype)
            padded[tuple(map(slice, cell.sizes))] = piece
            piece = padded
        return np.ascontiguousarray(piece).reshape(-1).view(np.uint8)


@dataclass(frozen=True, slots=True)
class Digested:
    """What a rank tells of its data: the digests of its chunks, one after another, and its values.

    `blobs` are the values that are too large or too special for the catalog, with their bytes.
    """

    digests: bytes
    values: dict[str, str] = field(default_factory=dict)
    blobs: dict[str, tuple[str, int]] = field(default_factory=dict)


class RankData:
    """The data of one rank's plan: resolved once where it lies in memory, else on demand."""

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
        self._values: dict[str, EncodedValue] = {}
        self._boxes: dict[str, list[tuple[Box, Source]]] = {}
        self.chunks: list[RawChunk] = []
        for item in plan.items:
            fqn = item.index.fqn
            if item.tensor_data is None:
                self._values[fqn] = self._encoded(item, allow_pickle=allow_pickle)
            else:
                box, source = item_box(item), self._source(item)
                self._boxes.setdefault(fqn, []).append((box, source))
                self.chunks += _cut(layouts[fqn], box, source)
        for _, value in sorted(self._values.items()):
            if value.data is not None:
                layout = blob_layout(len(value.data), chunk)
                array = np.frombuffer(value.data, np.uint8)
                self.chunks += _cut(layout, Box.whole(layout.shape), partial(_same, array))

    def digest(self, pool: Executor, advance: Callable[[int], None]) -> Digested:
        """Return the digests of all chunks, and the values; `advance` hears of bytes done."""
        digests = []
        for chunk, digest in zip(
            self.chunks, pool.map(lambda c: chunk_digest(c.raw()), self.chunks), strict=True
        ):
            digests.append(digest)
            advance(chunk.nbytes)
        return Digested(
            digests=b"".join(digests),
            values={f: v.text for f, v in self._values.items() if v.data is None},
            blobs={f: (v.text, len(v.data)) for f, v in self._values.items() if v.data is not None},
        )

    def held(self, entries: Sequence[EntryRecord]) -> list[Held]:
        """Return what this rank holds of stored tensors, to be compared with them."""
        return [
            Held(entry, box, source)
            for entry in entries
            for box, source in self._boxes.get(entry.fqn, ())
        ]

    def _source(self, item: WriteItem) -> Source:
        tensor = self._tensor(item)
        if tensor.device.type == "cpu":
            return partial(_same, as_bytes(tensor))
        # device memory is fetched twice rather than held in host memory all at once
        return lambda: as_bytes(self._tensor(item).cpu())

    def _tensor(self, item: WriteItem) -> torch.Tensor:
        tensor = self._planner.resolve_data(item)
        data = item.tensor_data
        assert data is not None
        if not isinstance(tensor, torch.Tensor):
            raise InvalidInputError(
                f"the planner gives {type(tensor).__name__} for tensor {item.index.fqn!r}; its "
                "resolve_data must return what its plan says."
            )
        if tensor.dtype != data.properties.dtype or tensor.size() != data.chunk.sizes:
            raise InvalidInputError(
                f"the planner gives {tensor.dtype} {tuple(tensor.size())} for {item.index.fqn!r}, "
                f"and its plan says {data.properties.dtype} {tuple(data.chunk.sizes)}; "
                "make its plan and its resolve_data agree."
            )
        return tensor.detach()

    def _encoded(self, item: WriteItem, *, allow_pickle: bool) -> EncodedValue:
        try:
            return encode_value(_plain_value(self._planner, item), allow_pickle=allow_pickle)
        except UnsafeDataError as error:
            raise UnsafeDataError(f"{item.index.fqn!r}: {error}") from error


def _plain_value(planner: SavePlanner, item: WriteItem) -> Any:
    """Return the value itself, not torch's pickled bytes of it."""
    if (
        isinstance(planner, torch_planner.DefaultSavePlanner)
        and type(planner).transform_object is torch_planner.DefaultSavePlanner.transform_object
    ):
        return planner.lookup_object(item.index)
    data = planner.resolve_data(item)
    if not isinstance(data, io.BytesIO):
        raise InvalidInputError(
            f"the planner gives {type(data).__name__} for value {item.index.fqn!r}; its "
            "resolve_data must return io.BytesIO for a BYTE_IO item."
        )
    return data.getvalue()


def _same(array: Array) -> Array:
    return array


def _cut(layout: Layout, box: Box, source: Source) -> Iterator[RawChunk]:
    for part, ordinal in planned_chunks(layout, box):
        yield RawChunk(source, box, layout.grids[part], ordinal, layout.codec, layout.itemsize)


def total_nbytes(chunks: Sequence[RawChunk]) -> int:
    """Return the raw bytes of `chunks`, without padding."""
    return sum(chunk.nbytes for chunk in chunks)
