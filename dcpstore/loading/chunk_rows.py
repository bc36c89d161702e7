"""Where chunks lie, for all ranks of a load: the coordinator asks once, and hands the rows out.

So a load asks the catalog one statement for its chunks, however many ranks it has. What travels is
columns, for a thousand ranks ask for a million chunks. Invariant: each rank gets exactly the chunks
of its ranges, each once, in the order in which packs hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dcpstore.core.checksums import CHECKSUM
from dcpstore.geometry.box_table import Ints
from dcpstore.records import ChunkRange, StoredChunk

__all__ = ["ChunkRows", "as_rows", "hand_out"]

_ROW = np.dtype(
    [
        ("tensor", "<i8"),
        ("part", "<i4"),
        ("ordinal", "<i8"),
        ("digest", "V32"),
        ("pack", "<i4"),
        ("offset", "<i8"),
        ("length", "<i8"),
        ("has_checksum", "?"),
        ("checksum", f"V{CHECKSUM}"),
    ]
)


@dataclass(frozen=True, slots=True, eq=False)
class ChunkRows:
    """Chunks as they travel: `rows` in columns, in which `packs` are named by number."""

    packs: Sequence[str]
    rows: npt.NDArray[np.void]

    @classmethod
    def of(cls, stored: Sequence[StoredChunk]) -> ChunkRows:
        """Return stored chunks in columns, in their order."""
        packs = {key: i for i, key in enumerate(dict.fromkeys(chunk.pack for chunk in stored))}
        none = bytes(CHECKSUM)
        rows = [
            (tensor, part, ordinal, digest, packs[pack], offset, length, bool(check), check or none)
            for tensor, part, ordinal, digest, pack, offset, length, check in stored
        ]
        return cls(tuple(packs), np.array(rows, _ROW))

    def take(self, rows: Ints) -> ChunkRows:
        """Return these rows, with the packs that they name."""
        taken = self.rows[rows]
        named, taken["pack"] = np.unique(taken["pack"], return_inverse=True)
        return ChunkRows([self.packs[i] for i in named.tolist()], taken)

    def chunks(self) -> list[StoredChunk]:
        """Return the chunks as records."""
        return [
            StoredChunk(
                tensor, part, ordinal, digest, self.packs[pack], offset, length,
                check if has_check else None,
            )
            for tensor, part, ordinal, digest, pack, offset, length, has_check, check in (
                self.rows.tolist()
            )
        ]  # fmt: skip


def as_rows(ranges: Sequence[ChunkRange]) -> Ints:
    """Return ranges in columns as they travel: [ranges, 4], the fields of `ChunkRange`."""
    return np.array(ranges, np.int64).reshape(len(ranges), 4)


def hand_out(
    wanted: Sequence[Ints], find: Callable[[list[ChunkRange]], Sequence[StoredChunk]]
) -> list[ChunkRows]:
    """Return the chunks of each rank.

    Args:
        wanted: by rank, its ranges in columns.
        find: returns all chunks of some ranges in pack order; called once.
    """
    every = np.concatenate(wanted)
    if not len(every):
        find([])
        return [ChunkRows.of([])] * len(wanted)
    # Each part of each tensor gets an interval of one line, so that ranges are intervals too.
    parts, place = np.unique(every[:, :2], axis=0, return_inverse=True)
    step = int(every[:, 3].max()) + 2  # a gap between parts, so that their ranges do not merge
    base = place.reshape(-1) * step
    first, last = base + every[:, 2], base + every[:, 3]
    stored = find(_merged(parts, first, last, step))
    found = ChunkRows.of(stored)
    order, sorted_lines = _on_the_line(found.rows, parts, step)
    starts = np.searchsorted(sorted_lines, first)
    stops = np.searchsorted(sorted_lines, last, side="right")
    handed: dict[bytes, ChunkRows] = {}  # ranks that ask for the same share the answer
    answers = []
    at = 0
    for ranges in wanted:
        of_rank = slice(at, at + len(ranges))
        at += len(ranges)
        key = ranges.tobytes()
        if key not in handed:
            rows = order[_expanded(starts[of_rank], stops[of_rank])]
            handed[key] = found.take(np.unique(rows))  # in pack order, as `found` is
        answers.append(handed[key])
    return answers


def _merged(parts: Ints, first: Ints, last: Ints, step: int) -> list[ChunkRange]:
    """Return the ranges of all ranks without overlaps, from intervals of the line."""
    order = np.argsort(first, kind="stable")
    first, reach = first[order], np.maximum.accumulate(last[order])
    is_new = np.ones(len(first), bool)
    is_new[1:] = first[1:] > reach[:-1] + 1
    begin = np.flatnonzero(is_new)
    end = np.append(begin[1:], len(first)) - 1
    place = first[begin] // step
    columns = (*parts[place].T, first[begin] - place * step, reach[end] - place * step)
    return [ChunkRange(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]


def _on_the_line(rows: Any, parts: Ints, step: int) -> tuple[Ints, Ints]:
    """Return the rows sorted by their places on the line, and these places."""
    # A pair of numbers as one: the pairs in `parts` are sorted, so the numbers are too.
    width = int(parts[:, 1].max()) + 1
    place = np.searchsorted(
        parts[:, 0] * width + parts[:, 1], rows["tensor"] * width + rows["part"]
    )
    line = place * step + rows["ordinal"]
    order = np.argsort(line, kind="stable")
    return order, line[order]


def _expanded(starts: Ints, stops: Ints) -> Ints:
    """Return all numbers from each start to its stop, one interval after another."""
    counts = stops - starts
    expanded: Ints = np.arange(counts.sum())
    expanded += np.repeat(starts - np.cumsum(counts) + counts, counts)
    return expanded
