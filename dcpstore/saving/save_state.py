"""The coordinator's state of one save: which chunks exist, who writes which, what is committed.

The planned chunks of all ranks are in columns (`Cells`). Invariant: a version is made only from
results that equal the plan, chunk by chunk (design, invariant 4), and content that the repository
holds is not written again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import NamedTuple

import numpy as np

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.read.dedup import find_encoded, find_tensors, find_tensors_and_lost
from dcpstore.core.digests import content_digest
from dcpstore.errors import InvalidInputError
from dcpstore.formats import json_fields
from dcpstore.formats.entry_tree import grow, regrow
from dcpstore.geometry.box_table import Ints
from dcpstore.geometry.grids import cover
from dcpstore.planning.plan_table import GlobalTable
from dcpstore.records import (
    ChunkDefaults,
    ChunkKey,
    ChunkPlace,
    EntryRecord,
    EntryTree,
    NewChunk,
    NewEntry,
    NewTensor,
    ObjectPath,
    PackRecord,
    TensorRecord,
    VersionContent,
)
from dcpstore.saving.cells import Cells, CellTable
from dcpstore.saving.chunk_writer import Written
from dcpstore.saving.layout import Layout, blob_layout
from dcpstore.saving.rank_chunks import Digested

__all__ = ["Contents", "SaveState", "has_other_grids"]


class _Content(NamedTuple):
    """One tensor of the save: its layout, its cells in (part, ordinal) order, its digest.

    `nbytes` are those of the layout, computed once.
    """

    layout: Layout
    cells: Ints  # rows of `Cells`
    digest: str
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """The tensors of a save, by FQN, and what they were computed from.

    A later save of the same plan computes only those again whose chunks have other digests.
    """

    layouts: Mapping[str, Layout]
    cells: Cells
    by_fqn: Mapping[str, _Content]
    nbytes: int  # of all tensors

    @classmethod
    def of(
        cls,
        table: GlobalTable,
        layouts: Mapping[str, Layout],
        reports: Sequence[Digested],
        *,
        are_whole: bool,
    ) -> Contents:
        """Return the tensors of a save.

        Args:
            table: which rank writes which box.
            layouts: of all tensors and blobs, by FQN.
            reports: by rank.
            are_whole: whether each tensor must be complete.

        Raises:
            InvalidInputError: a rank resolved more or fewer chunks than its plan has, or a tensor
                is not complete.
        """
        if are_whole:
            _check_whole(layouts)
        fqns = list(layouts)
        blobs = [(rank, fqn) for rank, one in enumerate(reports) for fqn in sorted(one.blobs)]
        cells = Cells.of(CellTable.of(table, fqns, layouts, blobs), reports)
        # A content digest covers the chunk digests by (part, ordinal), whichever rank sent them.
        order, bounds = cells.table.order, cells.table.bounds.tolist()
        contents = {}
        for fqn, (start, end) in zip(fqns, itertools.pairwise(bounds), strict=True):
            contents[fqn] = _content(layouts[fqn], cells, order[start:end])
        nbytes = sum(content.nbytes for content in contents.values())
        return cls(layouts, cells, contents, nbytes)

    def again(self, layouts: Mapping[str, Layout], reports: Sequence[Digested]) -> Contents | None:
        """Return the tensors of another save of the same plan; None if blobs have other sizes."""
        if layouts.keys() != self.layouts.keys() or any(
            layout is not self.layouts[fqn] and layout != self.layouts[fqn]
            for fqn, layout in layouts.items()
        ):
            return None
        cells = Cells.of(self.cells.table, reports)
        changed = np.unique(cells.table.tensor[(cells.digest != self.cells.digest).any(axis=1)])
        fqns = list(self.by_fqn)
        contents = dict(self.by_fqn)
        for number in changed.tolist():
            old = contents[fqns[number]]
            contents[fqns[number]] = _content(old.layout, cells, old.cells)
        return Contents(self.layouts, cells, contents, self.nbytes)


def _content(layout: Layout, cells: Cells, own: Ints) -> _Content:
    """Return the content of one tensor, whose cells are in order."""
    digests = cells.digest[own].tobytes()
    digest = content_digest(layout.dtype, layout.shape, layout.grids, [digests])
    return _Content(layout, own, digest, layout.nbytes)


class SaveState:
    """Made from the plan and every rank's digests; its methods are called in the order of a save.

    `are_whole` says that the plan is that of all ranks, so that each tensor must be complete.
    `before` are the contents of an earlier save of the same plan.
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
        before: Contents | None = None,
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
        again = None if before is None else before.again(self._layouts, reports)
        self.contents = again or Contents.of(table, self._layouts, reports, are_whole=are_whole)
        self._fqns = list(self._layouts)
        self._cells = self.contents.cells
        self._contents = self.contents.by_fqn
        self._parent: Mapping[str, EntryRecord] = {}
        self._tree: EntryTree | None = None
        self._writes: list[Ints] = []  # by rank, rows of `_cells`, in the order they are written
        self._places: dict[ChunkKey, ChunkPlace] = {}
        self._nbytes_new = 0
        self._aliases: dict[str, str] = {}

    def look_up(
        self,
        catalog: Catalog,
        parent: Mapping[str, EntryRecord],
        tree: EntryTree | None = None,
    ) -> list[str]:
        """Find the contents that the repository holds.

        `parent` are the entries of the parent version by FQN, and `tree` is their tree, if it is
        known. Return the FQNs of those whose tensor may be unchanged, but is stored with other
        grids: then only a comparison of bytes shows it.
        """
        self._parent, self._tree = parent, tree
        # What the parent has under the same FQN need not be looked up, unless it is lost.
        unchanged = {
            content.digest: entry.tensor
            for fqn, content in self._contents.items()
            if (entry := parent.get(fqn)) is not None
            and entry.tensor is not None
            and entry.tensor.digest == content.digest
        }
        digests = {content.digest for content in self._contents.values()}
        found, lost = find_tensors_and_lost(catalog, digests - unchanged.keys())
        kept = {digest: held for digest, held in unchanged.items() if digest not in lost}
        self._known = kept | found | find_tensors(catalog, unchanged.keys() & lost)
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
        *,
        packs: Sequence[PackRecord],
        seconds: Mapping[str, float],
        planner_data: str | None,
    ) -> VersionContent:
        """Return what the version holds; the places of all chunks have been recorded.

        Only tensors that are new have their chunks.

        Args:
            packs: of all ranks.
            seconds: that each phase took.
            planner_data: what the planner stores with the version, as typed JSON.
        """
        nbytes = self.contents.nbytes
        tree, changed = self._tree, self._changed
        if (
            tree is None
            or len(self._parent) != len(self._layouts) + len(self._values)
            or (changed.keys() - self._parent.keys())
        ):
            tree = grow(map(self._entry, (*self._layouts, *self._values)))
        else:
            tree = regrow(tree, changed)
        return VersionContent(
            entries=[entry for one in tree.sets for entry in one.entries],
            tree=tree,
            tensors=self._tensors(changed.values()),
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

    def records(self) -> Mapping[str, EntryRecord]:
        """Return the entries as a catalog gives them, but for the ids that it gives to tensors."""
        names, changed = self._layouts.keys() | self._values.keys(), self._changed
        if not changed and names == self._parent.keys():
            return self._parent
        records = {fqn: self._parent[fqn] for fqn in names - changed.keys()}
        for fqn, (_, path, kind, _, value) in changed.items():
            records[fqn] = EntryRecord(fqn, path, kind, self._record(fqn), value)
        return records

    def _record(self, fqn: str) -> TensorRecord | None:
        content = self._contents.get(fqn)
        if content is None:
            return None
        if content.digest in self._known:
            return self._known[content.digest]
        layout = content.layout
        return TensorRecord(
            id=0,
            digest=content.digest,
            dtype=layout.dtype,
            shape=layout.shape,
            codec=layout.codec,
            nbytes=content.nbytes,
            parts=layout.grids,
        )

    @cached_property
    def _changed(self) -> dict[str, NewEntry]:
        """The entries that the parent does not have, by FQN; asked for once all are looked up."""
        changed = {}
        for fqn, content in self._contents.items():
            old = self._parent.get(fqn)
            if (
                old is None
                or old.tensor is None
                # The digest is compared first, for nearly all tensors are decided by it.
                or (
                    old.tensor.digest != content.digest
                    and old.tensor.digest != self._stored_digest(content)
                )
                or old.kind != ("blob" if fqn in self._blobs else "tensor")
                or old.value != self._blobs.get(fqn)
                or not _is_same_path(old.path, self._path(fqn))
            ):
                changed[fqn] = self._entry(fqn)
        for fqn, value in self._values.items():
            old = self._parent.get(fqn)
            if (
                old is None
                or (old.kind, old.value) != ("value", value)
                or not _is_same_path(old.path, self._path(fqn))
            ):
                changed[fqn] = self._entry(fqn)
        return changed

    def _path(self, fqn: str) -> ObjectPath:
        return self._paths.get(fqn, (fqn,))

    def _tensors(self, changed: Collection[NewEntry]) -> list[NewTensor]:
        """Return the tensors that are new, with their chunks, and known ones that were not here.

        Those are the ones that changed entries name, or an alias.
        """
        named = {entry.tensor_digest for entry in changed} | {*self._aliases.values()}
        known = {
            tensor.digest: NewTensor.of(tensor, ())
            for tensor in self._known.values()
            if tensor.digest in named
        }
        new = {
            content.digest: content
            for content in self._contents.values()
            if content.digest not in self._known
        }
        return [*known.values(), *self._new_tensors(list(new.values()))]

    def _entry(self, fqn: str) -> NewEntry:
        path = self._path(fqn)
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


def _is_same_path(one: ObjectPath, other: ObjectPath) -> bool:
    """Tell whether two paths are stored as the same, with what they lead through."""
    return one is other or (one == other and json_fields.path(one) == json_fields.path(other))


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
