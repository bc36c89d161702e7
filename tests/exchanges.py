"""Counts what this process sends in each exchange with the other ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

from dcpstore.collectives import RankGroup

Sent = dict[str, list[int]]  # by step: the bytes of each message


@contextmanager
def counted() -> Iterator[Sent]:
    """Yield what this process sends inside the block, by the step of the exchange.

    Each gather adds the bytes that this rank sends to the coordinator. On the coordinator each
    scatter adds those of all answers together, and each broadcast those of the one answer.
    """
    sent: Sent = {}
    gather, scatter, broadcast = RankGroup.gather, RankGroup.scatter, RankGroup.broadcast

    def gather_counted(ranks: RankGroup, value: bytes, *, step: str) -> list[bytes] | None:
        sent.setdefault(step, []).append(len(value))
        return gather(ranks, value, step=step)

    def scatter_counted(ranks: RankGroup, values: Sequence[bytes] | None, *, step: str) -> bytes:
        if values is not None:
            sent.setdefault(f"{step}, answers", []).append(sum(map(len, values)))
        return scatter(ranks, values, step=step)

    def broadcast_counted(ranks: RankGroup, value: bytes | None, *, step: str) -> bytes:
        if value is not None:
            sent.setdefault(f"{step}, answers", []).append(len(value))
        return broadcast(ranks, value, step=step)

    with (
        patch.object(RankGroup, "gather", gather_counted),
        patch.object(RankGroup, "scatter", scatter_counted),
        patch.object(RankGroup, "broadcast", broadcast_counted),
    ):
        yield sent
