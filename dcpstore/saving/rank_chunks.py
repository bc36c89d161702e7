"""One rank's data as raw chunks: views wherever memory allows, each with its digest.

Invariant: the chunks come in the order of the plan's items, then of the blobs by FQN, which is how
the coordinator counts them too; so only digests travel.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import NamedTuple, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.checkpoint import default_planner as torch_planner
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from dcpstore.core.digests import chunk_digest
from dcpstore.core.parallel import in_batches, run_ahead
from dcpstore.encoding.dtypes import as_bytes, check_plain
from dcpstore.encoding.values import EncodedValue, PlannerBytes, encode_value
from dcpstore.errors import InvalidInputError, UnsafeDataError
from dcpstore.geometry.boxes import Box
from dcpstore.planning.plan_table import item_box
from dcpstore.planning.save_planner import BoxResolver, DefaultSavePlanner
from dcpstore.reading.box_reads import Held
from dcpstore.records import ChunkDefaults, ChunkKey, EntryRecord
from dcpstore.saving.layout import Layout, blob_layout, planned_chunks

__all__ = [
    "Digested",
    "RankData",
    "RawChunk",
    "encoded_item",
    "first_places",
    "resolves_plainly",
    "total_nbytes",
]

_FIRST = 5  # a fifth of the bytes takes a disk longer to write than cores to digest the others
_ARCHIVE = b"PK\x03\x04"  # how torch.save's bytes begin
_PLAIN_TRANSFORMS = (
    torch_planner.DefaultSavePlanner.transform_object,
    DefaultSavePlanner.transform_object,
)
_PLAIN_RESOLVERS = (
    torch_planner.DefaultSavePlanner.resolve_data,
    DefaultSavePlanner.resolve_data,
)

Array = npt.NDArray[np.generic]
Bytes = npt.NDArray[np.uint8]
Source = Callable[[Box], Array]  # of the elements of any box inside a planned one


class RawChunk(NamedTuple):
    """A chunk before it is encoded; `nbytes` are its raw ones inside its part, without padding.

    `held` are the raw bytes, where memory has them in one run, or else what makes them.
    """

    codec: str
    itemsize: int
    nbytes: int
    held: Bytes | Callable[[], Bytes]

    def raw(self) -> Bytes:
        """Return the raw bytes; past its part a cell is padded with zeros, as in Zarr."""
        return self.held if isinstance(self.held, np.ndarray) else self.held()


@dataclass(frozen=True, slots=True)
class Digested:
    """What a rank sends of its data: the digests of its chunks, one after another, and its values.

    `blobs` are the values that are too large or too special for the catalog, with their bytes.
    """

    digests: bytes
    values: dict[str, str] = field(default_factory=dict)
    blobs: dict[str, tuple[str, int]] = field(default_factory=dict)


class RankData:
    """The data of one rank's plan: resolved once where it lies in memory, else chunk by chunk."""

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
        # asked once: such a check looks at every attribute
        self._resolver = planner if isinstance(planner, BoxResolver) else None
        self._values: dict[str, EncodedValue] = {}
        self._boxes: dict[str, list[tuple[Box, WriteItem, Array | None]]] = {}
        self._digests: list[bytes] = []  # of the chunks so far
        self.chunks: list[RawChunk] = []
        for item in plan.items:
            fqn = item.index.fqn
            if item.tensor_data is None:
                self._values[fqn] = encoded_item(planner, item, allow_pickle=allow_pickle)
            else:
                box = item_box(item)
                array = self._array(item, box)
                self._boxes.setdefault(fqn, []).append((box, item, array))
                if array is None:
                    self.chunks += _cut(layouts[fqn], box, self._source(item, box))
                else:
                    self.chunks += _cut_array(layouts[fqn], box, array)
        for _, value in sorted(self._values.items()):
            if value.data is not None:
                layout = blob_layout(len(value.data), chunk)
                array = np.frombuffer(value.data, np.uint8)
                self.chunks += _cut_array(layout, Box.whole(layout.shape), array)

    def digest_first(
        self, pool: Executor, advance: Callable[[int], None] = lambda nbytes: None
    ) -> list[ChunkKey]:
        """Return the keys of the first chunks, those of about a fifth of the bytes."""
        nbytes = np.cumsum([chunk.nbytes for chunk in self.chunks])
        end = int(np.searchsorted(nbytes, nbytes[-1] / _FIRST)) + 1 if self.chunks else 0
        self._digest_until(end, pool, advance)
        return self.keys

    def digest(
        self, pool: Executor, advance: Callable[[int], None] = lambda nbytes: None
    ) -> Digested:
        """Return the digests of all chunks, and the values; `advance` hears of bytes done."""
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
        """The keys of the chunks that are digested by now, in order."""
        return [
            (chunk.codec, digest) for chunk, digest in zip(self.chunks, self._digests, strict=False)
        ]

    def held(self, entries: Sequence[EntryRecord]) -> list[Held]:
        """Return what this rank holds of stored tensors, to be compared with them."""
        return [
            Held(
                entry, box, _source_of(array, box) if array is not None else self._source(item, box)
            )
            for entry in entries
            for box, item, array in self._boxes.get(entry.fqn, ())
        ]

    def _array(self, item: WriteItem, box: Box) -> Array | None:
        """Return the elements of an item where they lie in host memory; None where they do not."""
        if self._resolver is not None:
            return None
        tensor = self._tensor(item, box)
        try:
            if tensor.device.type == "cpu":
                return as_bytes(tensor)
            check_plain(tensor)
        except InvalidInputError as error:
            raise InvalidInputError(f"{item.index.fqn!r}: {error}") from error
        return None

    def _source(self, item: WriteItem, box: Box) -> Source:
        if self._resolver is not None:
            return partial(self._resolved_box, self._resolver, item)
        # device memory is fetched twice rather than held in host memory all at once
        return lambda part: as_bytes(self._tensor(item, box)[part.relative_to(box).slices].cpu())

    def _resolved_box(self, planner: BoxResolver, item: WriteItem, part: Box) -> Array:
        return as_bytes(_checked(item, planner.resolve_box(item, part), part.sizes))

    def _tensor(self, item: WriteItem, box: Box) -> torch.Tensor:
        return _checked(item, self._planner.resolve_data(item), box.sizes)


def encoded_item(planner: SavePlanner, item: WriteItem, *, allow_pickle: bool) -> EncodedValue:
    """Return a value item's value as the catalog keeps it.

    Raises:
        UnsafeDataError: it needs a pickle, and that is not allowed.
        InvalidInputError: it cannot be kept; both name the FQN.
    """
    if _keeps_values(planner):
        encode = partial(encode_value, planner.lookup_object(item.index))
    else:
        encode = partial(_encoded_bytes, planner, item)
    try:
        return encode(allow_pickle=allow_pickle)
    except UnsafeDataError as error:
        raise UnsafeDataError(f"{item.index.fqn!r}: {error}") from error
    except InvalidInputError as error:
        raise InvalidInputError(f"{item.index.fqn!r}: {error}") from error


def resolves_plainly(planner: SavePlanner) -> TypeGuard[torch_planner.DefaultSavePlanner]:
    """Tell whether a planner resolves an item as torch's or ours does, so that any item will do."""
    return (
        isinstance(planner, torch_planner.DefaultSavePlanner)
        and type(planner).resolve_data in _PLAIN_RESOLVERS
    )


def _checked(item: WriteItem, tensor: object, sizes: tuple[int, ...]) -> torch.Tensor:
    """Return what a planner gave for a tensor item, if it is what its plan says."""
    assert item.tensor_data is not None
    dtype = item.tensor_data.properties.dtype
    if not isinstance(tensor, torch.Tensor):
        raise InvalidInputError(
            f"the planner gives {type(tensor).__name__} for tensor {item.index.fqn!r}; its "
            "resolve_data must return what its plan says."
        )
    if tensor.dtype != dtype or tuple(tensor.size()) != sizes:
        raise InvalidInputError(
            f"the planner gives {tensor.dtype} {tuple(tensor.size())} for {item.index.fqn!r}, "
            f"and its plan says {dtype} {sizes}; make its plan and its resolve_data agree."
        )
    return tensor


def _keeps_values(planner: SavePlanner) -> TypeGuard[torch_planner.DefaultSavePlanner]:
    """Tell whether the planner's bytes of a value are just torch's, so that the value will do."""
    return (
        isinstance(planner, torch_planner.DefaultSavePlanner)
        and type(planner).transform_object in _PLAIN_TRANSFORMS
        and type(planner).resolve_data in _PLAIN_RESOLVERS
    )


def _planners_bytes(planner: SavePlanner, item: WriteItem) -> bytes:
    try:
        data = planner.resolve_data(item)
    except (TypeError, pickle.PicklingError) as error:
        raise InvalidInputError(f"the planner cannot make bytes of it ({error}).") from error
    if not isinstance(data, io.BytesIO):
        raise InvalidInputError(
            f"the planner gives {type(data).__name__} for value {item.index.fqn!r}; its "
            "resolve_data must return io.BytesIO for a BYTE_IO item."
        )
    return data.getvalue()


def _encoded_bytes(planner: SavePlanner, item: WriteItem, *, allow_pickle: bool) -> EncodedValue:
    """Encode what a planner made of a value: the value again, where these are torch's bytes of it.

    Other bytes are kept as they are, for the load planner that knows them.
    """
    data = _planners_bytes(planner, item)
    if data.startswith(_ARCHIVE):
        try:
            value = torch.load(io.BytesIO(data), weights_only=True)
            return encode_value(value, allow_pickle=False)
        except (UnsafeDataError, pickle.UnpicklingError) as error:
            if isinstance(planner, torch_planner.DefaultSavePlanner):
                value = planner.lookup_object(item.index)
                if _is_torchs(data, value):  # such as an io.BytesIO, which torch would unpickle
                    return encode_value(value, allow_pickle=allow_pickle)
            if not allow_pickle:
                raise UnsafeDataError(
                    "the planner's bytes hold a pickle; give plain values, or save with "
                    "allow_pickle=True."
                ) from error
    return encode_value(PlannerBytes(data), allow_pickle=False)


def _is_torchs(data: bytes, value: object) -> bool:
    """Tell whether bytes are torch's archive of a value; each archive has a number of its own."""
    own = io.BytesIO()
    try:
        torch.save(value, own)
    except (pickle.PicklingError, TypeError, AttributeError, RuntimeError):
        return False  # it does not pickle, so the bytes are of something else
    return _records(data) == _records(own.getvalue())


def _records(archive: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        names = [name for name in file.namelist() if not name.endswith("/serialization_id")]
        return {name: file.read(name) for name in names}


def _source_of(array: Array, box: Box) -> Source:
    """Return what gives the elements of any part of `box` out of an array of all of them."""
    return lambda part: array[part.relative_to(box).slices]


def _cut_array(layout: Layout, box: Box, array: Array) -> Sequence[RawChunk]:
    """Return the chunks of a box whose elements lie in host memory: views of it, if they can be."""
    codec, itemsize = layout.codec, layout.itemsize
    if _is_one_cell(layout, box) and array.flags.c_contiguous:
        return (RawChunk(codec, itemsize, array.nbytes, _as_run(array)),)
    return list(_cut(layout, box, _source_of(array, box), are_views=True))


def _cut(
    layout: Layout, box: Box, source: Source, *, are_views: bool = False
) -> Iterator[RawChunk]:
    """Yield the chunks of a box; `are_views` says that its source only looks at memory."""
    codec, itemsize = layout.codec, layout.itemsize
    for part, ordinal in planned_chunks(layout, box):
        grid = layout.grids[part]
        cell = grid.cell(ordinal)
        held: Bytes | Callable[[], Bytes] = partial(_made, source, cell, grid.chunk_shape)
        if are_views and cell.sizes == grid.chunk_shape:
            piece = source(cell)
            if piece.flags.c_contiguous:
                held = _as_run(piece)
        yield RawChunk(codec, itemsize, cell.volume * itemsize, held)


def _is_one_cell(layout: Layout, box: Box) -> bool:
    """Tell whether a box is one chunk, unpadded; most tensors are small, and this is quick."""
    grids = layout.grids
    return len(grids) == 1 and grids[0].is_one_cell and grids[0].shape == box.sizes


def _as_run(array: Array) -> Bytes:
    return array.reshape(-1).view(np.uint8)


def _made(source: Source, cell: Box, chunk_shape: tuple[int, ...]) -> Bytes:
    piece = source(cell)
    if cell.sizes != chunk_shape:
        padded = np.zeros(chunk_shape, piece.dtype)
        padded[tuple(map(slice, cell.sizes))] = piece
        piece = padded
    return _as_run(np.ascontiguousarray(piece))


def _digest_all(chunks: Sequence[RawChunk]) -> list[bytes]:
    return [chunk_digest(chunk.raw().data) for chunk in chunks]


def first_places(keys: Iterable[ChunkKey]) -> dict[ChunkKey, int]:
    """Return where each key stands first."""
    places: dict[ChunkKey, int] = {}
    for i, key in enumerate(keys):
        places.setdefault(key, i)
    return places


def total_nbytes(chunks: Sequence[RawChunk]) -> int:
    """Return the raw bytes of `chunks`, without padding."""
    return sum(chunk.nbytes for chunk in chunks)
