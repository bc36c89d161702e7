"""Boxes: n-dimensional rectangles of a global tensor, and whether some of them overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import add, sub
from types import EllipsisType

__all__ = ["Box", "find_overlap"]


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """An n-d rectangle, `offsets` and `sizes` in elements; a 0-d box holds one element."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """Return the box that covers a tensor of `shape`."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def stops(self) -> tuple[int, ...]:
        """The first offset past the box in each dimension."""
        return tuple(map(add, self.offsets, self.sizes))

    @property
    def volume(self) -> int:
        """The number of elements inside."""
        return math.prod(self.sizes)

    @property
    def slices(self) -> tuple[slice | EllipsisType, ...]:
        """The box as an index into the global tensor.

        Without dimensions it is `...`, because numpy returns a scalar for `()`, not a view.
        """
        return tuple(map(slice, self.offsets, self.stops)) or (...,)

    def intersect(self, other: Box) -> Box | None:
        """Return the box that both share, or None if they share no element."""
        if self.sizes == other.sizes and self.offsets == other.offsets:  # the common case, faster
            return self if self.volume else None
        starts = tuple(map(max, self.offsets, other.offsets))
        sizes = tuple(
            min(mine, theirs) - start
            for mine, theirs, start in zip(self.stops, other.stops, starts, strict=True)
        )
        return Box(starts, sizes) if all(size > 0 for size in sizes) else None

    def relative_to(self, origin: Box) -> Box:
        """Return this box in coordinates whose zero is the first element of `origin`."""
        return Box(tuple(map(sub, self.offsets, origin.offsets)), self.sizes)


def find_overlap(boxes: Sequence[Box]) -> tuple[int, int] | None:
    """Return the indices of two boxes that share an element, or None if no two do.

    It sweeps along the dimension with the most distinct offsets, so that a grid of n boxes takes
    about n log n steps and not n squared.
    """
    live = [i for i, box in enumerate(boxes) if box.volume]
    if len(live) < 2:
        return None
    dims = range(len(boxes[live[0]].offsets))
    sweep = max(dims, key=lambda d: len({boxes[i].offsets[d] for i in live}), default=None)
    if sweep is None:  # two boxes without dimensions are the same element
        return live[0], live[1]
    active: list[int] = []  # boxes that reach past the current start
    for i in sorted(live, key=lambda i: boxes[i].offsets[sweep]):
        start = boxes[i].offsets[sweep]
        active = [j for j in active if boxes[j].stops[sweep] > start]
        for j in active:
            if boxes[i].intersect(boxes[j]) is not None:
                return min(i, j), max(i, j)
        active.append(i)
    return None
