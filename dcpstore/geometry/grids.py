"""Chunk grids: how a tensor is cut into chunks, with a grid line at every shard boundary.

So no two ranks write the same chunk. Because a grid is regular, the box of a chunk follows from its
ordinal (row-major, as in Zarr), and a box becomes a few ranges of ordinals.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from dcpstore.geometry.boxes import Box

__all__ = ["Grid", "cover", "lay_grids", "lay_parts", "lay_regular"]

# Bytes above which a chunk of a sharded tensor is halved along a dimension. With few boxes chunks
# become small, so that a load on more ranks reads little that it does not need. With many the boxes
# are small themselves, and chunks multiply with ranks: then none is cut to less than 1 MiB.
_TILE = 256 << 10
_TILE_OF_MANY = (2 << 20) - 1
_MANY = 8  # boxes


@dataclass(frozen=True, slots=True)
class Grid:
    """A regular chunk grid over a part of a tensor; all in elements.

    The part begins at `offsets` of the tensor and has `shape`. All cells have `chunk_shape`; the
    last one of a dimension may reach past the part (padded, as in Zarr).
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]

    @property
    def box(self) -> Box:
        """The part in coordinates of its tensor."""
        return Box(self.offsets, self.shape)

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of cells in each dimension."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.chunk_shape, strict=True))

    @property
    def size(self) -> int:
        """The number of cells."""
        return 1 if self.is_one_cell else math.prod(self.counts)

    @property
    def is_one_cell(self) -> bool:
        """Whether the part is one cell without padding, as for most tensors: a quick test."""
        return self.shape == self.chunk_shape

    def cell(self, ordinal: int) -> Box:
        """Return the box of a chunk, clipped to the part, in coordinates of the tensor."""
        if self.is_one_cell:
            return self.box
        index = []
        for count in reversed(self.counts):  # row-major: the last dimension changes fastest
            ordinal, i = divmod(ordinal, count)
            index.append(i)
        starts = tuple(i * c for i, c in zip(reversed(index), self.chunk_shape, strict=True))
        return Box(
            tuple(o + s for o, s in zip(self.offsets, starts, strict=True)),
            tuple(
                min(c, n - s) for c, n, s in zip(self.chunk_shape, self.shape, starts, strict=True)
            ),
        )

    def index(self, ordinal: int) -> tuple[int, ...]:
        """Return the cell's index in each dimension, as in Zarr's chunk keys."""
        return tuple(
            (o - origin) // c
            for o, origin, c in zip(
                self.cell(ordinal).offsets, self.offsets, self.chunk_shape, strict=True
            )
        )

    def ranges(self, box: Box) -> Iterator[tuple[int, int]]:
        """Yield the (first, last) ordinals, both included, of the cells that intersect `box`.

        Inner dimensions that `box` spans completely make the ranges longer, not more.
        """
        shared = self.box.intersect(box)
        if shared is None:
            return
        counts = self.counts
        firsts = [
            (o - p) // c
            for o, p, c in zip(shared.offsets, self.offsets, self.chunk_shape, strict=True)
        ]
        lasts = [
            (s - 1 - p) // c
            for s, p, c in zip(shared.stops, self.offsets, self.chunk_shape, strict=True)
        ]
        split = len(counts)  # dimensions from `split` on are spanned completely
        while split and lasts[split - 1] - firsts[split - 1] + 1 == counts[split - 1]:
            split -= 1
        inner = math.prod(counts[split:])
        # The dimension before `split` makes one range; each index of those before it another one.
        lead = max(split - 1, 0)
        for prefix in itertools.product(
            *(range(f, last + 1) for f, last in zip(firsts[:lead], lasts[:lead], strict=True))
        ):
            row = 0
            for i, count in zip(prefix, counts, strict=False):
                row = row * count + i
            if split:
                first = (row * counts[lead] + firsts[lead]) * inner
                last = (row * counts[lead] + lasts[lead] + 1) * inner - 1
            else:
                first, last = 0, inner - 1
            yield first, last

    def fits(self, shape: Sequence[int], steps: Sequence[int]) -> bool:
        """Tell whether the grid covers a tensor of `shape`, with a line at every step."""
        return self.shape == tuple(shape) and all(
            step % c == 0 for step, c in zip(steps, self.chunk_shape, strict=True)
        )

    def holds_whole_cells(self, box: Box) -> bool:
        """Tell whether the intersection of `box` and the part begins and ends on grid lines."""
        shared = self.box.intersect(box)
        if shared is None:
            return True
        inside = shared.relative_to(self.box)
        return all(
            start % c == 0 and (stop % c == 0 or stop == n)
            for start, stop, c, n in zip(
                inside.offsets, inside.stops, self.chunk_shape, self.shape, strict=True
            )
        )


def cover(grids: Sequence[Grid], shape: tuple[int, ...]) -> bool:
    """Tell whether grids, which do not overlap, cover every element of a tensor of `shape`.

    They do not if one rank saved for itself: then they hold only that rank's boxes.
    """
    if len(grids) == 1 and grids[0].shape == shape:  # the common case, faster
        return True
    return sum(math.prod(grid.shape) for grid in grids) == math.prod(shape)


def lay_grids(
    shape: Sequence[int],
    itemsize: int,
    boxes: Sequence[Box],
    *,
    target: int,
    parent: Sequence[Grid] = (),
) -> tuple[Grid, ...]:
    """Return the grids of a tensor of `shape` that is written as `boxes`, which tile it.

    The grids of the parent version are kept if they fit, so that unchanged chunks are reused.
    Otherwise the tensor gets one grid at the origin if the boundaries are regular; if not, each box
    is a part with its own grid.

    Args:
        shape: of the tensor, in elements.
        itemsize: bytes of one element.
        boxes: what the ranks write, without overlap.
        target: raw bytes of a chunk; exceeded only where a dimension cannot be divided.
        parent: the grids of the same FQN, shape and dtype in the parent version.
    """
    covers = parent and cover(parent, tuple(shape))
    if covers and all(grid.holds_whole_cells(box) for box in boxes for grid in parent):
        return tuple(parent)
    live = {box for box in boxes if box.volume}  # empty boxes have no boundary
    steps = tuple(_step(n, dim, live) for dim, n in enumerate(shape))
    grid = lay_regular(tuple(shape), itemsize, steps, pieces=len(live), target=target)
    return lay_parts(itemsize, list(live), target=target) if grid is None else (grid,)


@lru_cache(4096)
def lay_regular(
    shape: tuple[int, ...], itemsize: int, steps: tuple[int, ...], *, pieces: int, target: int
) -> Grid | None:
    """Return one grid at the origin, or None if the boundaries are too irregular for one.

    Results are cached: thousands of tensors have only a few different grids.

    Args:
        shape: of the tensor, in elements.
        itemsize: bytes of one element.
        steps: by dimension, the largest step such that all inner boundaries are multiples of it; 0
            without an inner boundary.
        pieces: how many boxes with elements are written.
        target: raw bytes of a chunk, as for `lay_grids`.
    """
    origin = (0,) * len(shape)
    if not pieces:
        return Grid(origin, shape, tuple(max(n, 1) for n in shape))
    cells = math.prod(-(-n // (step or n)) for n, step in zip(shape, steps, strict=True))
    if cells > 2 * pieces:  # boundaries at unrelated offsets: the grid would be far too fine
        return None
    most = _TILE if pieces < _MANY else _TILE_OF_MANY
    cuts = _tile(shape, steps, itemsize, most) if pieces > 1 else steps
    return Grid(origin, shape, _chunk_shape(shape, cuts, itemsize, target))


def lay_parts(itemsize: int, boxes: Sequence[Box], *, target: int) -> tuple[Grid, ...]:
    """Return one grid for each box that holds an element, sorted by box."""
    return tuple(
        Grid(
            box.offsets,
            box.sizes,
            _chunk_shape(box.sizes, [0] * len(box.sizes), itemsize, target),
        )
        for box in sorted(set(boxes))
        if box.volume
    )


def _step(n: int, dim: int, boxes: Iterable[Box]) -> int:
    """Return the largest step that divides all inner boundaries of a dimension; 0 without any."""
    cuts = {cut for box in boxes for cut in (box.offsets[dim], box.offsets[dim] + box.sizes[dim])}
    return math.gcd(*(cuts - {0, n}))


def _tile(shape: Sequence[int], steps: Sequence[int], itemsize: int, most: int) -> list[int]:
    """Return smaller steps: a shard cut into up to four along each dimension, the longest first.

    A load on two or four times as many ranks, or by columns after a save by rows, then reads few
    bytes that it does not need. Only what has more than `most` bytes is cut: smaller tiles cost
    more than they save.
    """
    extents = [step or n for n, step in zip(shape, steps, strict=True)]
    cut = list(steps)
    for _ in range(2):  # at most two halvings a dimension: a quarter of a shard
        for dim in sorted(range(len(extents)), key=lambda dim: -extents[dim]):
            if itemsize * math.prod(extents) > most and extents[dim] % 2 == 0:
                extents[dim] //= 2
                cut[dim] = extents[dim]
    return cut


def _chunk_shape(
    shape: Sequence[int], steps: Sequence[int], itemsize: int, target: int
) -> tuple[int, ...]:
    """Return the cell: the steps, cut from the first dimension on until it has `target` bytes.

    Leading dimensions are cut first, so that a cell of a row-major tensor stays contiguous.
    """
    extents = [step or n for n, step in zip(shape, steps, strict=True)]
    for dim, step in enumerate(steps):
        rest = itemsize * math.prod(extents) // extents[dim]
        if rest * extents[dim] <= target:
            break
        most = max(target // rest, 1)
        if not step:
            n = shape[dim]
            # No boundary to keep, so any size will do: halve and let the last cell be padded.
            halvings = (-(-n // most) - 1).bit_length()
            extents[dim] = -(-n // 2**halvings)
        else:
            extents[dim] = _divisor(step, most)
    return tuple(extents)


def _divisor(step: int, most: int) -> int:
    """Return the divisor of `step` to cut by: the largest `step / 2**n` that is at most `most`.

    If halving ends too early, at an odd number, it is the largest divisor up to `most`. If that is
    less than an eighth of `most`, it is the whole step: a few chunks that are too large are better
    than very many small ones.
    """
    halved = step
    while halved > most and halved % 2 == 0:
        halved //= 2
    if halved <= most:
        return halved
    divisors = {d for i in range(1, math.isqrt(step) + 1) if step % i == 0 for d in (i, step // i)}
    best = max(d for d in divisors if d <= most)
    return best if best * 8 >= most else step
