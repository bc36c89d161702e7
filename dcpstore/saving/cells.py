"""The planned chunks of all ranks in columns: where each lies in its tensor, and its digest.

They are sorted by rank, and within a rank in the order in which it sends its digests: by item of
its plan, then by blob. Where they lie follows from the plan, so it is computed once for each plan.
Invariant: the cells of a table are exactly those of all grids of its tensors, each once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dcpstore.errors import InvalidInputError
from dcpstore.geometry.box_table import GridTable, Ints
from dcpstore.geometry.grids import Grid
from dcpstore.planning.plan_table import GlobalTable
from dcpstore.saving.digest_exchange import CHUNK_DIGEST, split
from dcpstore.saving.layout import Layout, planned_chunks
from dcpstore.saving.rank_chunks import Digested

__all__ = ["CellTable", "Cells"]

_NO_GRID = Grid((), (), ())  # fills the rows of a grid table that are never read


@dataclass(frozen=True, slots=True, eq=False)
class CellTable:
    """Where each planned chunk lies; one row a chunk.

    Attributes:
        tensor: [cells], the number of the FQN.
        part, ordinal: [cells], the place in the tensor.
        starts: [ranks + 1], the first cell of each rank, and at last the number of cells.
        order: [cells], the cells by tensor, part and ordinal.
        bounds: [tensors + 1], where each tensor begins in `order`, and at last the end.
    """

    tensor: Ints
    part: Ints
    ordinal: Ints
    starts: Ints
    order: Ints
    bounds: Ints

    @classmethod
    def of(
        cls,
        table: GlobalTable,
        fqns: Sequence[str],
        layouts: Mapping[str, Layout],
        blobs: Sequence[tuple[int, str]],
    ) -> CellTable:
        """Return the cells of all ranks.

        Args:
            table: which rank writes which box.
            fqns: of tensors and blobs, by number.
            layouts: of all of them.
            blobs: the rank and the FQN of each, sorted.

        Raises:
            InvalidInputError: cells of a tensor are missing or planned twice; names the tensor.
        """
        number = {fqn: i for i, fqn in enumerate(fqns)}
        numbers = np.array([number.get(name.fqn, -1) for name in table.names], np.int64)
        row, part, ordinal = _planned(table, layouts)
        of_blobs = [
            (rank, number[fqn], i) for rank, fqn in blobs for i in range(layouts[fqn].grids[0].size)
        ]
        more = np.array(of_blobs, np.int64).reshape(len(of_blobs), 3)
        rank = np.concatenate([table.rank[row], more[:, 0]])
        by_rank = np.argsort(rank, kind="stable")  # keeps the order in which a rank sends digests
        tensor = np.concatenate([numbers[table.rows.tensor[row]], more[:, 1]])[by_rank]
        part = np.concatenate([part, np.zeros(len(of_blobs), np.int64)])[by_rank]
        ordinal = np.concatenate([ordinal, more[:, 2]])[by_rank]
        order = np.lexsort((ordinal, part, tensor))
        cells = cls(
            tensor=tensor,
            part=part,
            ordinal=ordinal,
            starts=np.searchsorted(rank[by_rank], np.arange(table.ranks + 1)),
            order=order,
            bounds=np.searchsorted(tensor[order], np.arange(len(fqns) + 1)),
        )
        cells._check_complete([layouts[fqn].grids for fqn in fqns], fqns)
        return cells

    def _check_complete(self, grids: Sequence[Sequence[Grid]], fqns: Sequence[str]) -> None:
        """Check that the cells are exactly those of all grids, each once.

        Args:
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
        order = self.order
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


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """The cells of one save: where they lie, and `digest` of the raw bytes of each: [cells, 32]."""

    table: CellTable
    digest: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, table: CellTable, reports: Sequence[Digested]) -> Cells:
        """Return the cells with the digests that each rank reported.

        Raises:
            InvalidInputError: a rank resolved more or fewer chunks than its plan has.
        """
        for i, (digested, planned) in enumerate(zip(reports, np.diff(table.starts), strict=True)):
            if len(digested.digests) != CHUNK_DIGEST * planned:
                raise InvalidInputError(
                    f"rank {i} resolved {len(digested.digests) // CHUNK_DIGEST} chunks, and its "
                    f"plan has {planned}; make the planner's plan and its data agree."
                )
        joined = np.frombuffer(b"".join(d.digests for d in reports), np.uint8)
        return cls(table, joined.reshape(-1, CHUNK_DIGEST))

    def digests(self, cells: Ints) -> list[bytes]:
        """Return the digests of some cells."""
        return split(self.digest[cells].tobytes(), CHUNK_DIGEST)

    def distinct(self, cells: Ints) -> Ints:
        """Return the first of these cells for each digest among them."""
        # one element of 32 bytes per digest: np.unique compares elements, not rows
        digests = np.ascontiguousarray(self.digest[cells]).view(f"V{CHUNK_DIGEST}").reshape(-1)
        first: Ints = cells[np.unique(digests, return_index=True)[1]]
        return first


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
    split_rows = [
        (row, *place)
        for row in np.flatnonzero(is_live & ~is_one).tolist()
        for place in planned_chunks(
            layouts[table.names[table.rows.tensor[row]].fqn], table.boxes(np.array([row]))[0]
        )
    ]
    more = np.array(split_rows, np.int64).reshape(len(split_rows), 3)
    row = np.concatenate([regular[rows], more[:, 0]])
    order = np.argsort(row, kind="stable")
    part = np.concatenate([np.zeros(len(rows), np.int64), more[:, 1]])
    return row[order], part[order], np.concatenate([ordinals, more[:, 2]])[order]
