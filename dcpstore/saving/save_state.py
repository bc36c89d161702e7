"""The coordinator's state of one save: which chunks exist, who writes which, what is committed.

The planned chunks of all ranks are in columns (`Cells`). Invariant: a version is made only from
results that equal the plan, chunk by chunk (design, invariant 4), and content that the repository
holds is not written again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.read.dedup import find_encoded, find_tensors
from dcpstore.catalog.read.entries import load_whole_tensors
from dcpstore.core.digests import content_digest
from dcpstore.errors import InvalidInputError
from dcpstore.geometry.box_table import Ints
from dcpstore.geometry.grids import cover
from dcpstore.planning.plan_table import GlobalTable
from dcpstore.records import (
    ChunkDefaults,
    ChunkKey,
    ChunkPlace,
    EntryRecord,
    NewChunk,
    NewEntry,
    NewTensor,
    ObjectPath,
    PackRecord,
    VersionContent,
)
from dcpstore.saving.cells import CellMemory, Cells
from dcpstore.saving.chunk_writer import Written
from dcpstore.saving.digest_exchange import CHUNK_DIGEST
from dcpstore.saving.layout import Layout, blob_layout
from dcpstore.saving.rank_chunks import Digested

__all__ = ["SaveState", "has_other_grids"]


class _Content(NamedTuple):
    """One tensor of the save: its layout, its cells in (part, ordinal) order, its digest.

    `nbytes` are those of the layout, computed once.
    """

    layout: Layout
    cells: Ints  # rows of `Cells`
    digest: str
    nbytes: int


class SaveState:
    """Made from the plan and every rank's digests; its methods are called in the order of a save.

    `are_whole` says that the plan is that of all ranks, so that each tensor must be complete.
    `cells` caches what follows from the plan alone.
    """

    def __init__(
        self,
        table: GlobalTable,
        layouts: Mapping[str, Layout],
        reports: Sequence[Digested],
        *,
        paths: Mapping[str, ObjectPath],
        chunk: ChunkDefaults,
        are_whole: bool,
        cells: CellMemory | None = None,
    ) -> None:
        self._table = table
        self._paths = paths
        self._layouts = dict(layouts)
        self._values: dict[str, str] = {}
        self._blobs: dict[str, str] = {}
        for digested in reports:
            self._values.update(digested.values)
            for fqn, (text, nbytes) in digested.blobs.items():
                self._blobs[fqn] = text
                self._layouts[fqn] = blob_layout(nbytes, chunk)
        names = {name.fqn for name in table.names}
        if differing := names ^ (self._layouts.keys() | self._values.keys()):
            raise InvalidInputError(
                f"the plan and what the ranks resolved differ in {sorted(differing)[:8]}; "
                "make the planner's plan and its data agree."
            )
        if are_whole:
            _check_whole(self._layouts)
        self._fqns = list(self._layouts)
        blobs = [(rank, fqn) for rank, one in enumerate(reports) for fqn in sorted(one.blobs)]
        table_of_cells = (cells or CellMemory()).table(table, self._fqns, self._layouts, blobs)
        self._cells = Cells.of(table_of_cells, reports)
        self._contents = self._contents_by_fqn()
        self._writes: list[Ints] = []  # by rank, rows of `_cells`, in the order they are written
        self._places: dict[ChunkKey, ChunkPlace] = {}
        self._nbytes_new = 0
        self._aliases: dict[str, str] = {}

    def look_up(self, catalog: Catalog, parent: Mapping[str, EntryRecord]) -> list[str]:
        """Find the contents that the repository holds.

        `parent` are the entries of the parent version by FQN. Return the FQNs of those whose tensor
        may be unchanged, but is stored with other grids: then only a comparison of bytes shows it.
        """
        self._known = find_tensors(catalog, {c.digest for c in self._contents.values()})
        return [
            fqn
            for fqn, content in self._contents.items()
            if content.digest not in self._known
            and has_other_grids(content.layout, parent.get(fqn))
        ]

    def take_unchanged(self, entries: Iterable[EntryRecord]) -> None:
        """Record that these entries hold what the save holds under their FQNs."""
        for entry in entries:
            assert entry.tensor is not None
            digest = self._contents[entry.fqn].digest
            self._known[digest] = entry.tensor
            self._aliases[digest] = entry.tensor.digest

    def choose_writes(
        self, catalog: Catalog, first: Sequence[Sequence[int]]
    ) -> list[Sequence[int]]:
        """Return, by rank, the places of the chunks that it writes, ascending.

        Of equal chunks, one rank writes one. `first` are, by rank, the places of the chunks that it
        has begun to write.
        """
        starts = self._cells.table.starts[:-1]
        early = [
            np.array(places, np.int64) + start for places, start in zip(first, starts, strict=True)
        ]
        written = set(self._keys(np.concatenate(early)))
        is_new = np.array([self._contents[f].digest not in self._known for f in self._fqns], bool)
        codecs = np.array([self._layouts[fqn].codec for fqn in self._fqns], object)
        chosen = [np.zeros(0, np.int64)]
        # A chunk is stored once per codec, so each codec is looked up by itself.
        for codec in dict.fromkeys(codecs[is_new]):
            cells = np.flatnonzero((is_new & (codecs == codec))[self._cells.table.tensor])
            cells = self._cells.distinct(cells)
            keys = [*self._keys(cells)]
            found = find_encoded(catalog, keys)
            self._places |= found
            chosen.append(cells[[key not in found and key not in written for key in keys]])
        late = np.sort(np.concatenate(chosen))
        bounds = np.searchsorted(late, self._cells.table.starts)
        rest = [late[a:b] for a, b in itertools.pairwise(bounds)]
        self._writes = [np.concatenate(both) for both in zip(early, rest, strict=True)]
        return [(cells - start).tolist() for cells, start in zip(rest, starts, strict=True)]

    def take_results(self, results: Sequence[Written]) -> None:
        """Record where the ranks wrote their chunks.

        Raises:
            InvalidInputError: a rank did not write all chunks that it was assigned.
        """
        for rank, (cells, written) in enumerate(zip(self._writes, results, strict=True)):
            if len(cells) != len(written.places):
                raise InvalidInputError(
                    f"rank {rank} wrote {len(written.places)} chunks of {len(cells)}; save again."
                )
            self._places.update(zip(self._keys(cells), written.places, strict=True))
            self._nbytes_new += written.nbytes

    def take_places(self, places: Mapping[ChunkKey, ChunkPlace], nbytes: int) -> None:
        """Record the places of chunks that a rank found or wrote by itself.

        `nbytes` are the raw bytes that it wrote.
        """
        # Two ranks may have written equal chunks: the place of either will do.
        for key, place in places.items():
            self._places.setdefault(key, place)
        self._nbytes_new += nbytes

    def content(
        self,
        catalog: Catalog,
        *,
        packs: Sequence[PackRecord],
        seconds: Mapping[str, float],
        planner_data: str | None,
    ) -> VersionContent:
        """Return what the version holds; the places of all chunks have been recorded.

        Args:
            catalog: has the tensors that are reused.
            packs: of all ranks.
            seconds: that each phase took.
            planner_data: what the planner stores with the version, as typed JSON.

        Raises:
            ConflictError: gc deleted a tensor after `look_up` had found it.
        """
        fqns = sorted(self._layouts.keys() | self._values.keys())
        nbytes = sum(content.nbytes for content in self._contents.values())
        return VersionContent(
            entries=[self._entry(fqn) for fqn in fqns],
            tensors=self._tensors(catalog),
            packs=packs,
            plan=self._table.record,  # the shard index: which rank wrote which box
            nbytes=nbytes,  # those of tied tensors each time
            nbytes_written=sum(pack.nbytes for pack in packs),
            # The rest was not written: the repository, or another entry, has it.
            nbytes_reused=nbytes - self._nbytes_new,
            seconds=seconds,
            created_at=datetime.now(UTC),
            aliases=self._aliases,
            planner_data=planner_data,
        )

    def _tensors(self, catalog: Catalog) -> list[NewTensor]:
        """Return each distinct tensor content with all its chunks, those of reused ones too."""
        stored = {tensor.id: tensor for tensor in self._known.values()}
        known = load_whole_tensors(catalog, list(stored.values()))
        reused = {tensor.digest for tensor in known}
        new = {
            content.digest: content
            for content in self._contents.values()
            if self._stored_digest(content) not in reused
        }
        return [*known, *self._new_tensors(list(new.values()))]

    def _contents_by_fqn(self) -> dict[str, _Content]:
        # A content digest covers the chunk digests by (part, ordinal), whichever rank sent them.
        order, bounds = self._cells.table.order, self._cells.table.bounds.tolist()
        data = self._cells.digest[order].tobytes()
        contents = {}
        for fqn, (start, end) in zip(self._fqns, itertools.pairwise(bounds), strict=True):
            layout, digests = self._layouts[fqn], data[start * CHUNK_DIGEST : end * CHUNK_DIGEST]
            digest = content_digest(layout.dtype, layout.shape, layout.grids, [digests])
            contents[fqn] = _Content(layout, order[start:end], digest, layout.nbytes)
        return contents

    def _entry(self, fqn: str) -> NewEntry:
        path = self._paths.get(fqn, (fqn,))
        if fqn in self._values:
            return NewEntry(fqn, path, "value", value=self._values[fqn])
        digest = self._stored_digest(self._contents[fqn])
        if fqn in self._blobs:
            return NewEntry(fqn, path, "blob", tensor_digest=digest, value=self._blobs[fqn])
        return NewEntry(fqn, path, "tensor", tensor_digest=digest)

    def _stored_digest(self, content: _Content) -> str:
        known = self._known.get(content.digest)
        return content.digest if known is None else known.digest

    def _new_tensors(self, contents: Sequence[_Content]) -> Iterator[NewTensor]:
        """Yield the contents with their chunks; the places of all of them have been recorded."""
        cells = np.concatenate([np.zeros(0, np.int64), *(content.cells for content in contents)])
        places = zip(
            self._cells.table.part[cells].tolist(),
            self._cells.table.ordinal[cells].tolist(),
            self._cells.digests(cells),
            strict=True,
        )
        for content in contents:
            layout = content.layout
            yield NewTensor(
                digest=content.digest,
                dtype=layout.dtype,
                shape=layout.shape,
                codec=layout.codec,
                nbytes=content.nbytes,
                parts=layout.grids,
                chunks=[
                    NewChunk(part, ordinal, digest, *self._places[layout.codec, digest])
                    for part, ordinal, digest in itertools.islice(places, len(content.cells))
                ],
            )

    def _keys(self, cells: Ints) -> Iterator[ChunkKey]:
        """Return the keys of some cells, in order."""
        codecs = (
            self._layouts[self._fqns[i]].codec for i in self._cells.table.tensor[cells].tolist()
        )
        return zip(codecs, self._cells.digests(cells), strict=True)


def has_other_grids(layout: Layout, entry: EntryRecord | None) -> bool:
    """Tell whether the tensor of an entry differs from a layout in its grids only."""
    stored = None if entry is None else entry.tensor
    return (
        stored is not None
        and (stored.dtype, stored.shape) == (layout.dtype, layout.shape)
        and stored.parts != layout.grids
        and cover(stored.parts, layout.shape)
    )


def _check_whole(layouts: Mapping[str, Layout]) -> None:
    """Check that the grids of each tensor hold all of it (design, invariant 4)."""
    for fqn, layout in layouts.items():
        if not cover(layout.grids, layout.shape):
            held = sum(grid.box.volume for grid in layout.grids)
            raise InvalidInputError(
                f"{fqn!r} of shape {layout.shape}: {held} of {math.prod(layout.shape)} elements "
                "would be stored; report this as a bug of dcpstore, and save to a new branch."
            )
