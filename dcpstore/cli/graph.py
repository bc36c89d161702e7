"""Lines that join each version to its parent, beside a log that is printed newest first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from dcpstore.catalog.glance import LogLine

if TYPE_CHECKING:
    from dcpstore.records import Version

__all__ = ["draw_graph"]


def draw_graph(
    versions: Sequence[Version | LogLine],
) -> Iterator[tuple[str, Version | LogLine | None]]:
    """Yield the lines of a graph: each version with its star, and what joins the lanes between.

    Versions come by number, downwards, so a parent comes below its children. A lane whose parent is
    not among them ends where it would have come; below the last one it goes on.
    """
    lanes: list[int] = []  # the version that each lane leads down to
    shown = {version.number for version in versions}
    for version in versions:
        for lane in _ended(lanes, version.number, shown):
            yield from _without(lanes, lane, into=None)
        mine = [i for i, number in enumerate(lanes) if number == version.number]
        for left, lane in reversed(list(pairwise(mine))):
            yield from _without(lanes, lane, into=left)
        if not mine:
            mine = [len(lanes)]
            lanes.append(version.number)
        star = ["*" if i == mine[0] else "|" for i in range(len(lanes))]
        yield " ".join(star), version
        if version.parent is None:
            yield from _without(lanes, mine[0], into=None)
        else:
            lanes[mine[0]] = version.parent


def _ended(lanes: Sequence[int], number: int, shown: set[int]) -> list[int]:
    """Return the lanes, the last one first, that lead to a version which is left out here."""
    gone = [i for i, wanted in enumerate(lanes) if wanted > number and wanted not in shown]
    return gone[::-1]


def _without(lanes: list[int], lane: int, *, into: int | None) -> Iterator[tuple[str, None]]:
    """Take a lane away, and yield the line in which it joins another or the rest closes up."""
    last = len(lanes) - 1
    del lanes[lane]
    if into is None and lane == last:
        return
    marks = [" "] * (2 * last + 1)
    for i in range(lane):
        marks[2 * i] = "|"
    for i in range(lane if into is not None else lane + 1, last + 1):
        marks[2 * i - 1] = "/"
    if into is not None:
        for at in range(2 * into + 1, 2 * lane - 1, 2):
            marks[at] = "_"
    yield "".join(marks).rstrip(), None
