"""The coordinator's books of one save: which chunks exist, who writes which, what is committed.

Invariant: a version is put together only from results that equal the plan, chunk by chunk (design,
invariant 4), and a content that the repository holds is never written again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch.distributed.checkpoint.planner import SavePlan

from dcpstore.catalog import Catalog
from dcpstore.encoding.digests import content_digest, text_digest
from dcpstore.errors import InvalidInputError
from dcpstore.geometry.boxes import Box
from dcpstore.planning.checks import item_box
from dcpstore.records import (
    ChunkDefaults,
    ChunkPlace,
    ChunkRange,
    EntryRecord,
    NewChunk,
    NewEntry,
    NewTensor,
    ObjectPath,
    PlanRecord,
    ShardRecord,
    TensorRecord,
    VersionContent,
)
from dcpstore.saving.chunking import Digested
from dcpstore.saving.layouts import Layout, blob_layout, planned_chunks
from dcpstore.saving.writing import Written

__all__ = ["Books", "Planned"]

_DIGEST = 32  # bytes


class Planned(NamedTuple):
    """What one rank is to write: boxes of tensors, in order, and the FQNs of values."""

    boxes: Sequence[tuple[str, Box]]
    values: Sequence[str]

    @classmethod
    def by(cls, plan: SavePlan) -> Planned:
        """Return what `plan` says."""
        tensors = [item for item in plan.items if item.tensor_data is not None]
        return cls(
            [(item.index.fqn, item_box(item)) for item in tensors],
            [item.index.fqn for item in plan.items if item.tensor_data is None],
        )


class _Cell(NamedTuple):
    """One planned chunk: of which tensor, where in it, and what is inside."""

    fqn: str
    part: int
    ordinal: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class _Content:
    """One tensor of the save: its layout, its cells in (part, ordinal) order, its digest."""

    layout: Layout
    cells: Sequence[_Cell]
    digest: str


class Books:
    """Put together from the plans and every rank's digests; then asked, in the order of a save."""

    def __init__(
        self,
        planned: Sequence[Planned],
        layouts: Mapping[str, Layout],
        told: Sequence[Digested],
        *,
        paths: Mapping[str, ObjectPath],
        chunk: ChunkDefaults,
    ) -> None:
        self._planned = planned
        self._paths = paths
        self._layouts = dict(layouts)
        self._values: dict[str, str] = {}
        self._blobs: dict[str, str] = {}
        for digested in told:
            self._values.update(digested.values)
            for fqn, (text, nbytes) in digested.blobs.items():
                self._blobs[fqn] = text
                self._layouts[fqn] = blob_layout(nbytes, chunk)
        self._cells = [
            self._cells_of(rank, boxes, digested)
            for rank, ((boxes, _), digested) in enumerate(zip(planned, told, strict=True))
        ]
        names = {fqn for boxes, values in planned for fqn in (*(f for f, _ in boxes), *values)}
        held = self._layouts.keys() | self._values.keys()
        if names != held:
            raise InvalidInputError(
                f"the plan and what the ranks resolved differ in {sorted(names ^ held)[:8]}; "
                "make the planner's plan and its data agree."
            )
        self._contents = self._gathered_contents()
        self._asked: list[list[_Cell]] = []
        self._places: dict[tuple[str, bytes], ChunkPlace] = {}
        self.aliases: dict[str, str] = {}

    def look_up(self, catalog: Catalog, before: Mapping[str, EntryRecord]) -> list[EntryRecord]:
        """Find the contents that the repository holds.

        Return those entries of `before` whose tensor may be the same as the save's, and is stored
        under other grids: only its bytes can tell.
        """
        self._known = catalog.find_tensors({c.digest for c in self._contents.values()})
        return [
            entry
            for fqn, content in self._contents.items()
            if content.digest not in self._known
            and (entry := before.get(fqn)) is not None
            and _cut_otherwise(content.layout, entry.tensor)
        ]

    def take_unchanged(self, entries: Iterable[EntryRecord]) -> None:
        """Enter that these entries hold what the save holds under their FQNs."""
        for entry in entries:
            assert entry.tensor is not None
            digest = self._contents[entry.fqn].digest
            self._known[digest] = entry.tensor
            self.aliases[digest] = entry.tensor.digest

    def choose_writes(self, catalog: Catalog) -> list[Sequence[int]]:
        """Return, by rank, the places among its chunks of those that it is to write, ascending."""
        wanted: dict[str, set[bytes]] = {}
        for content in self._contents.values():
            if content.digest not in self._known:
                digests = wanted.setdefault(content.layout.codec, set())
                digests.update(cell.digest for cell in content.cells)
        for codec, digests in wanted.items():
            for digest, place in catalog.find_chunks(digests, codec).items():
                self._places[codec, digest] = place
        chosen: set[tuple[str, bytes]] = set()
        asked: list[Sequence[int]] = []
        for cells in self._cells:
            mine = []
            for i, cell in enumerate(cells):
                codec = self._layouts[cell.fqn].codec
                key = codec, cell.digest
                if cell.digest not in wanted.get(codec, ()) or key in self._places or key in chosen:
                    continue
                if self._contents[cell.fqn].digest not in self._known:
                    chosen.add(key)
                    mine.append(i)
            asked.append(mine)
            self._asked.append([cells[i] for i in mine])
        return asked

    def take_results(self, results: Sequence[Written]) -> None:
        """Enter where the ranks wrote their chunks.

        Raises:
            InvalidInputError: a rank did not write what it was asked to.
        """
        for rank, (cells, written) in enumerate(zip(self._asked, results, strict=True)):
            if len(cells) != len(written.places):
                raise InvalidInputError(
                    f"rank {rank} wrote {len(written.places)} chunks of {len(cells)}; save again."
                )
            for cell, place in zip(cells, written.places, strict=True):
                self._places[self._layouts[cell.fqn].codec, cell.digest] = place

    def take_places(self, places: Mapping[tuple[str, bytes], ChunkPlace]) -> None:
        """Enter where chunks lie, by codec and digest, that ranks found or wrote by themselves."""
        for key, place in places.items():
            self._places.setdefault(key, place)

    def plan_record(self) -> PlanRecord:
        """Return the shard index: which rank wrote which box, with its digest."""
        shards = [
            ShardRecord(fqn, rank, box)
            for rank, (boxes, _) in enumerate(self._planned)
            for fqn, box in boxes
        ]
        shards.sort(key=lambda shard: (shard.fqn, shard.rank, shard.box))
        text = "\n".join(f"{s.fqn}\t{s.rank}\t{s.box.offsets}\t{s.box.sizes}" for s in shards)
        ranks = len(self._planned)
        return PlanRecord(text_digest(f"{ranks}\n{text}"), ranks, shards)

    def entries(self) -> list[NewEntry]:
        """Return the entries of the version, by FQN."""
        fqns = sorted(self._layouts.keys() | self._values.keys())
        return [self._entry(fqn) for fqn in fqns]

    def tensors(self, catalog: Catalog) -> list[NewTensor]:
        """Return each distinct tensor content with all its chunks, those of known ones included."""
        tensors = self._known_tensors(catalog)
        for content in self._contents.values():
            if self._stored_digest(content) not in tensors:
                tensors[content.digest] = self._new_tensor(content)
        return list(tensors.values())

    def records(self, content: VersionContent) -> list[EntryRecord]:
        """Return the entries of `content` as the catalog gives them, without the tensors' ids."""
        tensors = {
            tensor.digest: TensorRecord(
                id=0,
                digest=tensor.digest,
                dtype=tensor.dtype,
                shape=tensor.shape,
                codec=tensor.codec,
                nbytes=tensor.nbytes,
                parts=tuple(tensor.parts),
            )
            for tensor in content.tensors
        }
        return [
            EntryRecord(
                entry.fqn,
                entry.path,
                entry.kind,
                None if entry.tensor_digest is None else tensors[entry.tensor_digest],
                entry.value,
            )
            for entry in content.entries
        ]

    @property
    def nbytes(self) -> int:
        """Raw bytes of all tensors of the version, those of tied ones each time."""
        return sum(self._nbytes(content) for content in self._contents.values())

    @property
    def nbytes_reused(self) -> int:
        """Raw bytes that this save did not write, for the repository or the save had them."""
        written = sum(self._cell_nbytes(cell) for cells in self._asked for cell in cells)
        return self.nbytes - written

    def _cells_of(
        self, rank: int, boxes: Sequence[tuple[str, Box]], digested: Digested
    ) -> list[_Cell]:
        blobs = [(fqn, Box.whole(self._layouts[fqn].shape)) for fqn in sorted(digested.blobs)]
        where = [
            (fqn, part, ordinal)
            for fqn, box in (*boxes, *blobs)
            for part, ordinal in planned_chunks(self._layouts[fqn], box)
        ]
        if len(where) * _DIGEST != len(digested.digests):
            raise InvalidInputError(
                f"rank {rank} resolved {len(digested.digests) // _DIGEST} chunks, and its plan has "
                f"{len(where)}; make the planner's plan and its data agree."
            )
        return [
            _Cell(*place, digested.digests[i * _DIGEST : (i + 1) * _DIGEST])
            for i, place in enumerate(where)
        ]

    def _gathered_contents(self) -> dict[str, _Content]:
        by_fqn: dict[str, list[_Cell]] = {fqn: [] for fqn in self._layouts}
        for cells in self._cells:
            for cell in cells:
                by_fqn[cell.fqn].append(cell)
        contents = {}
        for fqn, cells in by_fqn.items():
            cells.sort()
            layout = self._layouts[fqn]
            if [cell[1:3] for cell in cells] != list(_every_cell(layout)):
                raise InvalidInputError(
                    f"{fqn!r}: the ranks wrote {len(cells)} chunks, not each of the "
                    f"{sum(grid.size for grid in layout.grids)} once; make every planned item be "
                    "written by one rank."
                )
            digest = content_digest(
                layout.dtype, layout.shape, layout.grids, [cell.digest for cell in cells]
            )
            contents[fqn] = _Content(layout, cells, digest)
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

    def _known_tensors(self, catalog: Catalog) -> dict[str, NewTensor]:
        """Return the contents that the catalog holds, their chunks asked for in one go."""
        known = {tensor.id: tensor for tensor in self._known.values()}
        ranges = [
            ChunkRange(tensor.id, part, 0, grid.size - 1)
            for tensor in known.values()
            for part, grid in enumerate(tensor.parts)
            if grid.size
        ]
        chunks: dict[int, list[NewChunk]] = {tensor_id: [] for tensor_id in known}
        for chunk in catalog.chunks(ranges):
            chunks[chunk.tensor_id].append(NewChunk(*chunk[1:]))
        return {
            tensor.digest: NewTensor(
                digest=tensor.digest,
                dtype=tensor.dtype,
                shape=tensor.shape,
                codec=tensor.codec,
                nbytes=tensor.nbytes,
                parts=tensor.parts,
                chunks=sorted(chunks[tensor.id]),
            )
            for tensor in known.values()
        }

    def _new_tensor(self, content: _Content) -> NewTensor:
        layout = content.layout
        return NewTensor(
            digest=content.digest,
            dtype=layout.dtype,
            shape=layout.shape,
            codec=layout.codec,
            nbytes=self._nbytes(content),
            parts=layout.grids,
            chunks=[
                NewChunk(
                    cell.part, cell.ordinal, cell.digest, *self._places[layout.codec, cell.digest]
                )
                for cell in content.cells
            ],
        )

    def _nbytes(self, content: _Content) -> int:
        volume = sum(grid.box.volume for grid in content.layout.grids)
        return volume * content.layout.itemsize

    def _cell_nbytes(self, cell: _Cell) -> int:
        layout = self._layouts[cell.fqn]
        return layout.grids[cell.part].cell(cell.ordinal).volume * layout.itemsize


def _every_cell(layout: Layout) -> Iterator[tuple[int, int]]:
    for part, grid in enumerate(layout.grids):
        for ordinal in range(grid.size):
            yield part, ordinal


def _cut_otherwise(layout: Layout, stored: TensorRecord | None) -> bool:
    """Tell whether a stored tensor differs from a layout in its grids alone."""
    return (
        stored is not None
        and (stored.dtype, stored.shape) == (layout.dtype, layout.shape)
        and stored.parts != layout.grids
    )
