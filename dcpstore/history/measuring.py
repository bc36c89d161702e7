"""Numbers about changed tensors, out of the chunks that differ and of no others.

Where old and new are cut alike, chunks are held against each other one by one, and those of equal
digest are never read; else each new chunk against the old ones below it. Memory stays bounded: each
thread holds a decoded chunk of either version, and a few more old ones where the grids differ.
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

from dcpstore.catalog import Catalog
from dcpstore.encoding.dtypes import PACKED, torch_dtype
from dcpstore.geometry.boxes import Box
from dcpstore.history.comparing import compare
from dcpstore.history.diff import Diff, EntryDiff, same_grids
from dcpstore.history.stats import TensorStats
from dcpstore.reading.boxes import find_chunks
from dcpstore.reading.chunks import ChunkReader
from dcpstore.records import EntryRecord, StoredChunk, TensorRecord
from dcpstore.storage.interface import Storage
from dcpstore.storage.packs import PackReader

__all__ = ["with_stats"]

Array = npt.NDArray[np.generic]
Place = tuple[int, int]  # part and ordinal of a chunk
_KEPT = 4  # old chunks that one thread keeps at hand where the grids differ


@dataclass(frozen=True, slots=True)
class _Task:
    """A tensor in both versions, with new chunks to measure, and the old ones below them."""

    fqn: str
    old: EntryRecord
    new: EntryRecord
    old_chunks: Mapping[Place, StoredChunk]
    new_chunks: Sequence[StoredChunk]


def with_stats(diff: Diff, catalog: Catalog, storage: Storage) -> Diff:
    """Return the diff with numbers for each tensor of one shape whose content or dtype changed.

    Raises:
        CorruptionError: stored bytes are damaged, naming version, FQN, chunk, pack and offset.
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
    return len(dtypes) == 1 or PACKED not in dtypes


def _tensor(entry: EntryRecord | None) -> TensorRecord:
    assert entry is not None
    assert entry.tensor is not None
    return entry.tensor


def _tasks(diff: Diff, wanted: Iterable[EntryDiff], catalog: Catalog) -> Iterator[_Task]:
    """Yield the work: chunk by chunk where the grids are equal, else tensor by tensor."""
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
    """Return all chunks of tensors by the tensor's id and their place in it."""
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
