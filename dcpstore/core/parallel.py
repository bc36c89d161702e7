"""Runs of items that are worth a task of a thread: one large item, or many small ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import TypeVar

__all__ = ["in_batches", "run_ahead"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_BATCH = 8 << 20  # bytes that one task takes on
_AHEAD = 4  # results that may wait for who asks, which bounds their memory


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


def run_ahead(
    pool: Executor, call: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with what `call` makes of it, in order; `pool` works a few items ahead.

    No more wait in the pool than that, so that two who share it get on together.
    """
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(call, item)))
        if len(waiting) > _AHEAD:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()
