"""The coordinator's state of one save: which chunks exist, who writes which, what is committed.

The planned chunks of all ranks are in columns (`Cells`), sorted by rank, and within a rank in the
order in which it reports its digests: by item of its plan, then by blob. Invariant: a version is
made only from results that equal the plan, chunk by chunk (design, invariant 4), and content that
the repository holds is not written again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.read.dedup import find_encoded, find_tensors, lost_tensors
from dcpstore.core.digests import content_digest
from dcpstore.errors import InvalidInputError
from dcpstore.formats import json_fields
from dcpstore.formats.entry_tree import grow, regrow
from dcpstore.geometry.box_table import GridTable, Ints
from dcpstore.geometry.grids import Grid, cover
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
from dcpstore.saving.chunk_writer import Written
from dcpstore.saving.digest_exchange import CHUNK_DIGEST
from dcpstore.saving.layout import Layout, blob_layout, planned_chunks
from dcpstore.saving.rank_chunks import Digested

__all__ = ["Cells", "Contents", "SaveState", "has_other_grids"]

_DIGEST = CHUNK_DIGEST

_NO_GRID = Grid((), (), ())  # fills the rows of a grid table that are never read


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """One row per planned chunk.

    Attributes:
        tensor: [cells], the number of the FQN.
        part, ordinal: [cells], the place in the tensor.
        digest: [cells, 32], of the raw bytes.
        starts: [ranks + 1], the first cell of each rank, and at last the number of cells.
    """

    tensor: Ints
    part: Ints
    ordinal: Ints
    digest: npt.NDArray[np.uint8]
    starts: Ints

    @classmethod
    def of(
        cls,
        table: GlobalTable,
        fqns: Sequence[str],
        layouts: Mapping[str, Layout],
        reports: Sequence[Digested],
    ) -> Cells:
        """Return the cells of all ranks, with the digests that each rank reported.

        Args:
            table: which rank writes which box.
            fqns: of tensors and blobs, by number.
            layouts: of all of them.
            reports: by rank.

        Raises:
            InvalidInputError: a rank resolved more or fewer chunks than its plan has.
        """
        number = {fqn: i for i, fqn in enumerate(fqns)}
        numbers = np.array([number.get(name.fqn, -1) for name in table.names], np.int64)
        row, part, ordinal = _planned(table, layouts)
        blobs = [
            (rank, number[fqn], i)
            for rank, digested in enumerate(reports)
            for fqn in sorted(digested.blobs)
            for i in range(layouts[fqn].grids[0].size)
        ]
        more = np.array(blobs, np.int64).reshape(len(blobs), 3)
        rank = np.concatenate([table.rank[row], more[:, 0]])
        order = np.argsort(rank, kind="stable")  # keeps the order in which a rank sends its digests
        starts = np.searchsorted(rank[order], np.arange(table.ranks + 1))
        for i, (digested, planned) in enumerate(zip(reports, np.diff(starts), strict=True)):
            if len(digested.digests) != _DIGEST * planned:
                raise InvalidInputError(
                    f"rank {i} resolved {len(digested.digests) // _DIGEST} chunks, and its plan "
                    f"has {planned}; make the planner's plan and its data agree."
                )
        return cls(
            tensor=np.concatenate([numbers[table.rows.tensor[row]], more[:, 1]])[order],
            part=np.concatenate([part, np.zeros(len(blobs), np.int64)])[order],
            ordinal=np.concatenate([ordinal, more[:, 2]])[order],
            digest=_joined(reports),
            starts=starts,
        )

    def with_digests(self, reports: Sequence[Digested]) -> Cells:
        """Return the cells of another save of the same plan."""
        return replace(self, digest=_joined(reports))

    def digests(self, cells: Ints) -> list[bytes]:
        """Return the digests of some cells."""
        data = self.digest[cells].tobytes()
        return [data[i : i + _DIGEST] for i in range(0, len(data), _DIGEST)]

    def distinct(self, cells: Ints) -> Ints:
        """Return the first of these cells for each digest among them."""
        # one element of 32 bytes per digest: np.unique compares elements, not rows
        digests = np.ascontiguousarray(self.digest[cells]).view(f"V{_DIGEST}").reshape(-1)
        first: Ints = cells[np.unique(digests, return_index=True)[1]]
        return first

    def check_complete(
        self, order: Ints, grids: Sequence[Sequence[Grid]], fqns: Sequence[str]
    ) -> None:
        """Check that the cells are exactly those of all grids, each once.

        Args:
            order: the cells by tensor, part and ordinal.
            grids: of each tensor.
            fqns: of each tensor.

        Raises:
            InvalidInputError: cells of a tensor are missing or planned twice; names the tensor.
        """
        tensor = np.repeat(np.arange(len(grids)), [len(parts) for parts in grids])
        part = np.concatenate([np.arange(len(parts)) for parts in grids] or [tensor])
        every = [grid for parts in grids for grid in parts]
        dims = max((len(grid.shape) for grid in every), default=0)
        sizes = GridTable.of(every, dims).sizes
        ordinal = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        planned = np.stack([self.tensor[order], self.part[order], self.ordinal[order]])
        wanted = np.stack([np.repeat(tensor, sizes), np.repeat(part, sizes), ordinal])
        if np.array_equal(planned, wanted):
            return
        shared = min(planned.shape[1], wanted.shape[1])
        differs = (planned[:, :shared] != wanted[:, :shared]).any(axis=0)
        first = int(differs.argmax()) if differs.any() else shared
        number = min(int(cells[0, first]) for cells in (planned, wanted) if first < cells.shape[1])
        raise InvalidInputError(
            f"{fqns[number]!r}: the ranks wrote {int((planned[0] == number).sum())} chunks, not "
            f"each of the {int((wanted[0] == number).sum())} once; make every planned item be "
            "written by one rank."
        )


def _joined(reports: Sequence[Digested]) -> npt.NDArray[np.uint8]:
    """Return the digests of all ranks, one a row."""
    data = b"".join(digested.digests for digested in reports)
    return np.frombuffer(data, np.uint8).reshape(-1, _DIGEST)


def _planned(table: GlobalTable, layouts: Mapping[str, Layout]) -> tuple[Ints, Ints, Ints]:
    """Return (row, part, ordinal) of each cell of the planned boxes, row by row.

    Tensors with one grid, which are nearly all, are computed in columns; the others box by box.
    """
    grids = [layouts[n.fqn].grids if n.dtype is not None else () for n in table.names]
    is_live = table.is_tensor[table.rows.tensor] & (table.rows.volumes > 0)
    is_one = np.array([len(parts) == 1 for parts in grids], bool)[table.rows.tensor]
    regular = np.flatnonzero(is_live & is_one)
    one_each = [parts[0] if len(parts) == 1 else _NO_GRID for parts in grids]
    rows, ordinals = GridTable.of(one_each, table.rows.dims).cells(table.rows.take(regular))
    split = [
        (row, *place)
        for row in np.flatnonzero(is_live & ~is_one).tolist()
        for place in planned_chunks(
            layouts[table.names[table.rows.tensor[row]].fqn], table.boxes(np.array([row]))[0]
        )
    ]
    more = np.array(split, np.int64).reshape(len(split), 3)
    row = np.concatenate([regular[rows], more[:, 0]])
    order = np.argsort(row, kind="stable")
    part = np.concatenate([np.zeros(len(rows), np.int64), more[:, 1]])
    return row[order], part[order], np.concatenate([ordinals, more[:, 2]])[order]


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
        cells = Cells.of(table, fqns, layouts, reports)
        # A content digest covers the chunk digests by (part, ordinal), whichever rank sent them.
        order = np.lexsort((cells.ordinal, cells.part, cells.tensor))
        starts = np.searchsorted(cells.tensor[order], np.arange(len(fqns) + 1)).tolist()
        cells.check_complete(order, [layouts[fqn].grids for fqn in fqns], fqns)
        contents = {}
        for fqn, (start, end) in zip(fqns, itertools.pairwise(starts), strict=True):
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
        if [len(d.digests) for d in reports] != (_DIGEST * np.diff(self.cells.starts)).tolist():
            return None  # which makes an error
        cells = self.cells.with_digests(reports)
        changed = np.unique(cells.tensor[(cells.digest != self.cells.digest).any(axis=1)])
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
        # What the parent has under the same FQN need not be looked up, unless it is damaged.
        lost = lost_tensors(catalog) if parent else set()
        self._known = {
            content.digest: entry.tensor
            for fqn, content in self._contents.items()
            if (entry := parent.get(fqn)) is not None
            and entry.tensor is not None
            and entry.tensor.digest == content.digest
            and content.digest not in lost
        }
        digests = {content.digest for content in self._contents.values()}
        self._known |= find_tensors(catalog, digests - self._known.keys())
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
        starts = self._cells.starts[:-1]
        early = [
            np.array(places, np.int64) + start for places, start in zip(first, starts, strict=True)
        ]
        written = set(self._keys(np.concatenate(early)))
        is_new = np.array([self._contents[f].digest not in self._known for f in self._fqns], bool)
        codecs = np.array([self._layouts[fqn].codec for fqn in self._fqns], object)
        chosen = [np.zeros(0, np.int64)]
        # A chunk is stored once per codec, so each codec is looked up by itself.
        for codec in dict.fromkeys(codecs[is_new]):
            cells = np.flatnonzero((is_new & (codecs == codec))[self._cells.tensor])
            cells = self._cells.distinct(cells)
            keys = [*self._keys(cells)]
            found = find_encoded(catalog, keys)
            self._places |= found
            chosen.append(cells[[key not in found and key not in written for key in keys]])
        late = np.sort(np.concatenate(chosen))
        bounds = np.searchsorted(late, self._cells.starts)
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
        tree, changed = self._tree, self._find_changed()
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
        names, changed = self._layouts.keys() | self._values.keys(), self._find_changed()
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

    def _find_changed(self) -> dict[str, NewEntry]:
        """Return the entries that the parent does not have, by FQN."""
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
            self._cells.part[cells].tolist(),
            self._cells.ordinal[cells].tolist(),
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
        codecs = (self._layouts[self._fqns[i]].codec for i in self._cells.tensor[cells].tolist())
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
