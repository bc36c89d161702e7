"""Runs of items that are worth a task of a thread: one large item, or many small ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

__all__ = ["in_batches"]

Item = TypeVar("Item")

_BATCH = 8 << 20  # bytes that one task takes on


def in_batches(
    items: Sequence[Item],
    nbytes: Callable[[Item], int],
    *,
    place: Callable[[Item], object] = lambda item: None,
) -> Iterator[Sequence[Item]]:
    """Yield all items in their order, in runs of about 8 MiB.

    Args:
        items: what there is to do.
        nbytes: of an item.
        place: what the items of a run have in common.
    """
    first = total = 0
    for i, item in enumerate(items):
        total += nbytes(item)
        is_last = i + 1 == len(items) or place(items[i + 1]) != place(item)
        if total >= _BATCH or is_last:
            yield items[first : i + 1]
            first, total = i + 1, 0
