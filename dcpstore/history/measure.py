"""Statistics of changed tensors, computed only from the chunks that differ.

If old and new have the same grid, chunks are compared one by one, and those of equal digest are
not read. Otherwise each new chunk is compared with the old chunks that overlap it. Memory is
bounded: each thread holds one decoded chunk of each version, and a few more old ones if the grids
differ. Elements are converted to float64 (or complex128) block by block, so nothing large is copied
at once. An element counts as changed by its bits if the dtypes are equal, as for digests, and
otherwise by its value.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dcpstore.catalog.catalog import Catalog
from dcpstore.encoding.dtypes import PACKED, torch_dtype
from dcpstore.geometry.boxes import Box
from dcpstore.history.diff import Diff, EntryDiff, TensorStats, same_grids
from dcpstore.reading.box_reads import find_chunks
from dcpstore.reading.chunk_reads import ChunkReader
from dcpstore.records import EntryRecord, StoredChunk, TensorRecord
from dcpstore.storage.interface import Storage
from dcpstore.storage.packs import PackReader

__all__ = ["compare", "with_stats"]

Place = tuple[int, int]  # part and ordinal of a chunk
_KEPT = 4  # old chunks that one thread caches if the grids differ

Array = npt.NDArray[np.generic]
Numbers = npt.NDArray[np.inexact]
_BLOCK = 1 << 18  # elements that are converted at a time
_WIDE = ("int64", "uint64")  # float64 cannot hold all their values
# The eight magnitudes of a float4_e2m1fn, by its lower three bits; the fourth bit is the sign.
_FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def compare(old: Array, new: Array, *, old_dtype: str, new_dtype: str) -> TensorStats:
    """Return the statistics of two arrays of one shape, in the dtypes under which they are stored.

    `elements` stays 0, for the arrays may be only a part of the tensor.
    """
    flat_old = np.ascontiguousarray(old).reshape(-1)
    flat_new = np.ascontiguousarray(new).reshape(-1)
    total = TensorStats()
    # No warnings: elements that are not finite are counted, and an overflow shows as infinity.
    with np.errstate(invalid="ignore", over="ignore"):
        for at in range(0, flat_new.size, _BLOCK):
            piece = slice(at, at + _BLOCK)
            total += _compare_block(flat_old[piece], flat_new[piece], old_dtype, new_dtype)
    return total


def _compare_block(old: Array, new: Array, old_dtype: str, new_dtype: str) -> TensorStats:
    before, after = _numbers(old, old_dtype), _numbers(new, new_dtype)
    same_kind = old_dtype == new_dtype
    difference: Numbers = after - before
    if same_kind and new_dtype in _WIDE:
        difference = _wide_difference(old, new)
    changed = _bits_differ(old, new) if same_kind else _values_differ(before, after)
    nan_old, nan_new = np.isnan(before), np.isnan(after)
    inf_old, inf_new = np.isinf(before), np.isinf(after)
    odd = nan_old | nan_new | inf_old | inf_new
    if odd.any():
        before, after, difference = before[~odd], after[~odd], difference[~odd]
    return TensorStats(
        compared=new.size,
        changed=int(np.count_nonzero(changed)),
        squared_difference=_dot(difference, difference),
        squared_old=_dot(before, before),
        squared_new=_dot(after, after),
        product=_dot(before, after),
        max_abs=float(np.abs(difference).max(initial=0.0)),
        nan_old=int(np.count_nonzero(nan_old)),
        nan_new=int(np.count_nonzero(nan_new)),
        inf_old=int(np.count_nonzero(inf_old)),
        inf_new=int(np.count_nonzero(inf_new)),
    )


def _numbers(raw: Array, dtype: str) -> Numbers:
    """Return stored elements as numbers; an element of float4_e2m1fn_x2 gives two."""
    if dtype == "bfloat16":
        return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype == "complex32":
        return raw.view(np.float16).astype(np.float64).view(np.complex128)
    if dtype == "float4_e2m1fn_x2":
        nibbles = np.stack((raw.astype(np.uint8) & 15, raw.astype(np.uint8) >> 4), -1).reshape(-1)
        pairs: Numbers = np.where(nibbles & 8, -1.0, 1.0) * _FLOAT4[nibbles & 7]
        return pairs
    if dtype.startswith("float8"):
        every = torch.arange(256, dtype=torch.uint8, device="cpu").view(torch_dtype(dtype))
        values: Numbers = every.to(torch.float32).numpy().astype(np.float64)[raw.view(np.uint8)]
        return values
    return raw.astype(np.complex128 if raw.dtype.kind == "c" else np.float64)


def _wide_difference(old: Array, new: Array) -> Numbers:
    """Return new - old of 64-bit integers, rounded once; float64 would round both of them first."""
    (old_high, old_low), (new_high, new_low) = _halves(old), _halves(new)
    difference: Numbers = (new_high - old_high) * 2.0**32 + (new_low - old_low)
    return difference


def _halves(raw: Array) -> tuple[Numbers, Numbers]:
    """Return the upper halves of 64-bit integers, with their sign, and the lower halves."""
    halves = raw.view(np.uint32).reshape(-1, 2)
    high = halves[:, 1].view(np.int32) if raw.dtype.kind == "i" else halves[:, 1]
    return high.astype(np.float64), halves[:, 0].astype(np.float64)


def _bits_differ(old: Array, new: Array) -> npt.NDArray[np.bool_]:
    words = old.dtype.itemsize // 8 if old.dtype.itemsize > 8 else 1
    word = np.dtype(f"u{old.dtype.itemsize // words}")
    differ = np.asarray(old.view(word) != new.view(word)).reshape(-1, words)
    return np.asarray(differ.any(axis=1))


def _values_differ(before: Numbers, after: Numbers) -> npt.NDArray[np.bool_]:
    differ: npt.NDArray[np.bool_] = ~((before == after) | (np.isnan(before) & np.isnan(after)))
    return differ


def _dot(one: Numbers, other: Numbers) -> float:
    """Return the sum of products; the real part of it for complex numbers."""
    return float(np.vdot(one, other).real)


@dataclass(frozen=True, slots=True)
class _Task:
    """A tensor in both versions, with new chunks to measure, and the old chunks to compare with."""

    fqn: str
    old: EntryRecord
    new: EntryRecord
    old_chunks: Mapping[Place, StoredChunk]
    new_chunks: Sequence[StoredChunk]


def with_stats(diff: Diff, catalog: Catalog, storage: Storage) -> Diff:
    """Return the diff with statistics of each tensor of one shape whose content or dtype changed.

    Raises:
        CorruptionError: stored bytes are damaged; names version, FQN, chunk, pack and offset.
    """
    wanted = [entry for entry in diff.entries if _is_measured(entry)]
    found = {e.fqn: TensorStats(elements=math.prod(_tensor(e.new).shape)) for e in wanted}
    with closing(PackReader(storage)) as packs:
        old = ChunkReader(packs, version=diff.old.number, verify=True)
        new = ChunkReader(packs, version=diff.new.number, verify=True)

        def measure(task: _Task) -> tuple[str, TensorStats]:
            return task.fqn, _measure(task, old, new)

        with ThreadPoolExecutor(torch.get_num_threads(), "dcpstore-diff") as pool:
            for fqn, stats in pool.map(measure, _tasks(diff, wanted, catalog)):
                found[fqn] += stats
    entries = (dataclasses.replace(e, stats=found.get(e.fqn)) for e in diff.entries)
    return dataclasses.replace(diff, entries=tuple(entries))


def _is_measured(entry: EntryDiff) -> bool:
    old, new = entry.old, entry.new
    if entry.change not in ("changed", "retyped") or old is None or new is None:
        return False
    if not old.kind == new.kind == "tensor" or _tensor(old).shape != _tensor(new).shape:
        return False
    dtypes = {torch_dtype(_tensor(entry).dtype) for entry in (old, new)}
    return len(dtypes) == 1 or PACKED.isdisjoint(dtypes)


def _tensor(entry: EntryRecord | None) -> TensorRecord:
    assert entry is not None
    assert entry.tensor is not None
    return entry.tensor


def _tasks(diff: Diff, wanted: Iterable[EntryDiff], catalog: Catalog) -> Iterator[_Task]:
    """Yield the work: chunk by chunk if the grids are equal, otherwise tensor by tensor."""
    pairs = [(e.old, e.new) for e in wanted if e.old is not None and e.new is not None]
    olds = _chunks([old for old, _ in pairs], catalog, version=diff.old.number)
    news = _chunks([new for _, new in pairs], catalog, version=diff.new.number)
    for old, new in pairs:
        old_chunks, new_chunks = olds[_tensor(old).id], news[_tensor(new).id]
        if not same_grids(_tensor(old), _tensor(new)):
            yield _Task(new.fqn, old, new, old_chunks, list(new_chunks.values()))
            continue
        for place, chunk in new_chunks.items():
            if chunk.digest != old_chunks[place].digest:
                yield _Task(new.fqn, old, new, {place: old_chunks[place]}, [chunk])


def _chunks(
    entries: Sequence[EntryRecord], catalog: Catalog, *, version: int
) -> dict[int, dict[Place, StoredChunk]]:
    """Return all chunks of tensors, by the id of the tensor and the place of the chunk in it."""
    boxes = ((entry, Box.whole(_tensor(entry).shape)) for entry in entries)
    found: dict[int, dict[Place, StoredChunk]] = {_tensor(entry).id: {} for entry in entries}
    for chunk in find_chunks(boxes, catalog, version=version):
        found[chunk.tensor_id][chunk.part, chunk.ordinal] = chunk
    return found


def _measure(task: _Task, old_reader: ChunkReader, new_reader: ChunkReader) -> TensorStats:
    old, new = _tensor(task.old), _tensor(task.new)
    kept: OrderedDict[Place, Array] = OrderedDict()

    def old_array(place: Place) -> Array:
        if len(task.old_chunks) == 1:
            return old_reader.read(task.old, task.old_chunks[place])
        if place not in kept:
            kept[place] = old_reader.read(task.old, task.old_chunks[place]).copy()
        kept.move_to_end(place)
        while len(kept) > _KEPT:
            kept.popitem(last=False)
        return kept[place]

    total = TensorStats()
    for chunk in task.new_chunks:
        cell = new.parts[chunk.part].cell(chunk.ordinal)
        new_array = new_reader.read(task.new, chunk)
        for place in _places_below(old, cell):
            below = old.parts[place[0]].cell(place[1])
            shared = below.intersect(cell)
            assert shared is not None
            total += compare(
                old_array(place)[shared.relative_to(below).slices],
                new_array[shared.relative_to(cell).slices],
                old_dtype=old.dtype,
                new_dtype=new.dtype,
            )
    return total


def _places_below(tensor: TensorRecord, cell: Box) -> Iterator[Place]:
    for part, grid in enumerate(tensor.parts):
        for first, last in grid.ranges(cell):
            for ordinal in range(first, last + 1):
                yield part, ordinal
