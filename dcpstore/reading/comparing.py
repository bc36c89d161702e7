"""Data in memory held against a stored tensor, without writing anything.

For a save whose ranks cut a tensor otherwise than it is stored (the world size changed): digests
cannot tell that it is unchanged, so its bytes do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dcpstore.catalog import Catalog
from dcpstore.geometry.boxes import Box
from dcpstore.reading.boxes import find_chunks
from dcpstore.reading.chunks import ChunkReader
from dcpstore.records import EntryRecord, StoredChunk
from dcpstore.storage.interface import Storage
from dcpstore.storage.packs import PackReader

__all__ = ["Held", "find_changed"]

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class Held:
    """A box of a stored tensor; `data` gives what this process holds in any box inside it."""

    entry: EntryRecord
    box: Box
    data: Callable[[Box], Array]


def find_changed(
    held: Sequence[Held], catalog: Catalog, storage: Storage, *, version: int, pool: Executor
) -> set[str]:
    """Return the FQNs of which some element held here differs, in its bits, from what is stored.

    A tensor that differs is read only as far as the first chunk that shows it.
    """
    stored = find_chunks(((one.entry, one.box) for one in held), catalog, version=version)
    by_tensor: dict[int, list[StoredChunk]] = {}
    for chunk in stored:
        by_tensor.setdefault(chunk.tensor_id, []).append(chunk)
    with closing(PackReader(storage)) as packs:
        reader = ChunkReader(packs, version=version, verify=True)

        def changed(one: Held) -> bool:
            assert one.entry.tensor is not None
            return any(_differs(one, reader, chunk) for chunk in by_tensor[one.entry.tensor.id])

        return {
            one.entry.fqn
            for one, differs in zip(held, pool.map(changed, held), strict=True)
            if differs
        }


def _differs(one: Held, reader: ChunkReader, chunk: StoredChunk) -> bool:
    assert one.entry.tensor is not None
    cell = one.entry.tensor.parts[chunk.part].cell(chunk.ordinal)
    shared = cell.intersect(one.box)
    if shared is None:
        return False
    theirs = reader.read(one.entry, chunk)[shared.relative_to(cell).slices]
    return not np.array_equal(_bits(one.data(shared)), _bits(theirs))


def _bits(array: Array) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
