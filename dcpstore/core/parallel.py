"""Runs of items that are worth a task of a thread: one large item, or many small ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import TypeVar

__all__ = ["BATCH", "in_batches", "run_ahead"]

Item = TypeVar("Item")
Result = TypeVar("Result")

BATCH = 8 << 20  # bytes that one task takes on


def in_batches(
    items: Sequence[Item],
    nbytes: Callable[[Item], int],
    *,
    place: Callable[[Item], object] = lambda item: None,
    most: int = BATCH,
) -> Iterator[Sequence[Item]]:
    """Yield all items in their order, in runs of `most` bytes or a little more.

    Args:
        items: what there is to do.
        nbytes: of an item.
        place: what the items of a run have in common.
        most: bytes at which a run ends.
    """
    first = total = 0
    for i, item in enumerate(items):
        total += nbytes(item)
        is_last = i + 1 == len(items) or place(items[i + 1]) != place(item)
        if total >= most or is_last:
            yield items[first : i + 1]
            first, total = i + 1, 0


def run_ahead(
    pool: Executor, call: Callable[[Item], Result], items: Iterable[Item], *, ahead: int = 4
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with what `call` makes of it, in order; `pool` works `ahead` items ahead.

    No more results wait for the caller than that, which bounds their memory, and no more items wait
    in the pool, so that two who share it get on together.
    """
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(call, item)))
        if len(waiting) > ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()
