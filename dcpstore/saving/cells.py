"""The planned chunks of all ranks in columns, matched with the digests that the ranks told.

Invariant: the cells stand by rank, and within a rank in the order in which it tells its digests: by
item of its plan, then by blob.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dcpstore.errors import InvalidInputError
from dcpstore.geometry.grids import Grid
from dcpstore.geometry.tables import GridTable, Ints
from dcpstore.planning.tables import GlobalTable
from dcpstore.saving.chunking import Digested
from dcpstore.saving.layouts import Layout, planned_chunks

__all__ = ["DIGEST", "Cells"]

DIGEST = 32  # bytes

_NO_GRID = Grid((), (), ())  # stands where a table must name a grid and nobody asks for it


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """One row a planned chunk.

    Attributes:
        tensor: [cells], the number of the FQN.
        part, ordinal: [cells], where in the tensor.
        digest: [cells, 32], what is inside.
        starts: [ranks + 1], where the cells of each rank begin; the last is where they end.
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
        told: Sequence[Digested],
    ) -> Cells:
        """Return the cells of all ranks, with what each rank told of its own.

        Args:
            table: who writes which box.
            fqns: of tensors and blobs, by number.
            layouts: of all of them.
            told: by rank.

        Raises:
            InvalidInputError: a rank resolved more or fewer chunks than its plan has.
        """
        number = {fqn: i for i, fqn in enumerate(fqns)}
        numbers = np.array([number.get(name.fqn, -1) for name in table.names], np.int64)
        row, part, ordinal = _planned(table, layouts)
        blobs = [
            (rank, number[fqn], i)
            for rank, digested in enumerate(told)
            for fqn in sorted(digested.blobs)
            for i in range(layouts[fqn].grids[0].size)
        ]
        more = np.array(blobs, np.int64).reshape(len(blobs), 3)
        rank = np.concatenate([table.rank[row], more[:, 0]])
        order = np.argsort(rank, kind="stable")
        starts = np.searchsorted(rank[order], np.arange(table.ranks + 1))
        for i, (digested, planned) in enumerate(zip(told, np.diff(starts), strict=True)):
            if len(digested.digests) != DIGEST * planned:
                raise InvalidInputError(
                    f"rank {i} resolved {len(digested.digests) // DIGEST} chunks, and its plan has "
                    f"{planned}; make the planner's plan and its data agree."
                )
        return cls(
            tensor=np.concatenate([numbers[table.rows.tensor[row]], more[:, 1]])[order],
            part=np.concatenate([part, np.zeros(len(blobs), np.int64)])[order],
            ordinal=np.concatenate([ordinal, more[:, 2]])[order],
            digest=np.frombuffer(b"".join(d.digests for d in told), np.uint8).reshape(-1, DIGEST),
            starts=starts,
        )

    def digests(self, cells: Ints) -> list[bytes]:
        """Return the digests of some cells."""
        data = self.digest[cells].tobytes()
        return [data[i : i + DIGEST] for i in range(0, len(data), DIGEST)]

    def distinct(self, cells: Ints) -> Ints:
        """Return the first of these cells for each digest among them."""
        whole = np.ascontiguousarray(self.digest[cells]).view(f"V{DIGEST}").reshape(-1)
        first: Ints = cells[np.unique(whole, return_index=True)[1]]
        return first

    def check_complete(
        self, order: Ints, grids: Sequence[Sequence[Grid]], fqns: Sequence[str]
    ) -> None:
        """Check that the cells are those of all grids, each once.

        Args:
            order: the cells by tensor, part and ordinal.
            grids: of each tensor.
            fqns: of each tensor.

        Raises:
            InvalidInputError: naming a tensor of which cells are missing, or planned twice.
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
        number = min(int(told[0, first]) for told in (planned, wanted) if first < told.shape[1])
        raise InvalidInputError(
            f"{fqns[number]!r}: the ranks wrote {int((planned[0] == number).sum())} chunks, not "
            f"each of the {int((wanted[0] == number).sum())} once; make every planned item be "
            "written by one rank."
        )


def _planned(table: GlobalTable, layouts: Mapping[str, Layout]) -> tuple[Ints, Ints, Ints]:
    """Return (row, part, ordinal) of each cell of the planned boxes, row by row."""
    grids = [layouts[n.fqn].grids if n.dtype is not None else () for n in table.names]
    is_live = table.is_tensor[table.rows.tensor] & (table.rows.volumes > 0)
    is_one = np.array([len(mine) == 1 for mine in grids], bool)[table.rows.tensor]
    regular = np.flatnonzero(is_live & is_one)
    one_each = [mine[0] if len(mine) == 1 else _NO_GRID for mine in grids]
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
