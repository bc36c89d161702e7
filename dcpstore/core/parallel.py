"""Work for a thread pool: items grouped into batches of about 8 MiB, and results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import TypeVar

__all__ = ["BATCH", "in_batches", "run_ahead"]

Item = TypeVar("Item")
Result = TypeVar("Result")

BATCH = 8 << 20  # bytes of one task: a smaller one costs more to hand over than it saves


def in_batches(
    items: Sequence[Item],
    nbytes: Callable[[Item], int],
    *,
    place: Callable[[Item], object] = lambda item: None,
    limit: int = BATCH,
) -> Iterator[Sequence[Item]]:
    """Yield all items in their order, in batches of `limit` bytes or a little more.

    Args:
        items: the work; a large item is a batch of its own.
        nbytes: returns the size of an item.
        place: returns what all items of a batch must have in common, such as their file.
        limit: bytes at which a batch ends.
    """
    first = total = 0
    for i, item in enumerate(items):
        total += nbytes(item)
        is_last = i + 1 == len(items) or place(items[i + 1]) != place(item)
        if total >= limit or is_last:
            yield items[first : i + 1]
            first, total = i + 1, 0


def run_ahead(
    pool: Executor, call: Callable[[Item], Result], items: Iterable[Item], *, ahead: int = 4
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with the result of `call`, in order; `pool` works `ahead` items ahead.

    At most so many results wait for the caller, which bounds their memory; and at most so many
    items wait in the pool, so that two callers can share it fairly.
    """
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(call, item)))
        if len(waiting) > ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()
