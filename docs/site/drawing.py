"""Draw a Mermaid flowchart as SVG, without a browser and without Mermaid.

It knows what our pages use: `flowchart TD`, and lines `a --> b`. Each node stands one row above the
highest node that it points to, so every arrow goes down. An arrow that passes rows has a place in
each of them, so it goes past the nodes and not behind them.
"""

from __future__ import annotations

import re
from html import escape
from itertools import pairwise

ROW = 64  # pixels from row to row
HEIGHT = 28  # of a node
LETTER = 7.3  # width of a letter
LANE = 12  # width of the place of an arrow in a row that it passes
ROUNDS = 24  # passes that order the rows

# A node has a name; the place of an arrow in a row has its two ends and the row.
Spot = str | tuple[str, str, int]


def draw(chart: str) -> str:
    """Return the HTML of a drawing of `chart`."""
    head, *lines = chart.strip().splitlines()
    arrows = [re.fullmatch(r"\s*([\w.]+) --> ([\w.]+)", line) for line in lines]
    if head != "flowchart TD" or not all(arrows):
        raise ValueError(f"can only draw 'flowchart TD' with lines 'a --> b': {chart[:60]!r}")
    edges = [(found[1], found[2]) for found in arrows if found]
    row_of = _row_of(edges)
    ways = [_way(above, below, row_of) for above, below in edges]
    rows = _rows(row_of, ways)
    centre, total = _ordered(rows, ways)
    parts = [_arrow([(centre[spot], _row(spot, row_of)) for spot in way]) for way in ways]
    parts += [_node(name, centre[name], row) for name, row in row_of.items()]
    height = ROW * (len(rows) - 1) + HEIGHT + 4
    size = f'viewBox="-2 -2 {total + 4:.0f} {height}" width="{total + 4:.0f}"'
    label = f'role="img" aria-label="Drawing of {len(row_of)} nodes and the arrows between them"'
    return f'<div class="drawing"><svg {size} {label}>{"".join(parts)}</svg></div>\n'


def _row_of(edges: list[tuple[str, str]]) -> dict[str, int]:
    """Return the row of each node, counted from the top."""
    level = {name: 0 for edge in edges for name in edge}
    for _ in level:
        for above, below in edges:
            level[above] = max(level[above], level[below] + 1)
    top = max(level.values())
    return {name: top - height for name, height in level.items()}


def _row(spot: Spot, row_of: dict[str, int]) -> int:
    return row_of[spot] if isinstance(spot, str) else spot[2]


def _way(above: str, below: str, row_of: dict[str, int]) -> list[Spot]:
    """Return the spots of an arrow, from its beginning to its end."""
    passed: list[Spot] = [(above, below, row) for row in range(row_of[above] + 1, row_of[below])]
    return [above, *passed, below]


def _rows(row_of: dict[str, int], ways: list[list[Spot]]) -> list[list[Spot]]:
    rows: list[list[Spot]] = [[] for _ in range(max(row_of.values()) + 1)]
    for spot in dict.fromkeys([*row_of, *(spot for way in ways for spot in way)]):
        rows[_row(spot, row_of)].append(spot)
    return rows


def _width(spot: Spot) -> float:
    return LETTER * len(spot) + 18 if isinstance(spot, str) else LANE


def _ordered(rows: list[list[Spot]], ways: list[list[Spot]]) -> tuple[dict[Spot, float], float]:
    """Order each row by where its neighbours are; return the centres, and the width of all."""
    linked: dict[Spot, list[Spot]] = {}
    for way in ways:
        for above, below in pairwise(way):
            linked.setdefault(above, []).append(below)
            linked.setdefault(below, []).append(above)
    total = max(sum(_width(spot) + LANE for spot in row) + LANE for row in rows)
    centre: dict[Spot, float] = {}

    def spread(row: list[Spot]) -> None:
        gap = (total - sum(map(_width, row))) / (len(row) + 1)
        x = 0.0
        for spot in row:
            centre[spot] = x + gap + _width(spot) / 2
            x += gap + _width(spot)

    def wanted(spot: Spot) -> float:
        return sum(centre[other] for other in linked[spot]) / len(linked[spot])

    for row in rows:
        spread(row)
    for turn in range(ROUNDS):
        for row in rows if turn % 2 else rows[::-1]:
            row.sort(key=wanted)
            spread(row)
    return centre, total


def _arrow(points: list[tuple[float, int]]) -> str:
    (x, row), *others = points
    y = row * ROW + HEIGHT
    line = f"M{x:.1f} {y}"
    for number, (to_x, to_row) in enumerate(others):
        is_end = number == len(others) - 1
        to_y = to_row * ROW - (5 if is_end else 0)
        middle = (y + to_y) / 2
        line += f"C{x:.1f} {middle:.1f} {to_x:.1f} {middle:.1f} {to_x:.1f} {to_y}"
        if not is_end:
            to_y += HEIGHT
            line += f"V{to_y}"
        x, y = to_x, to_y
    tip = f"M{x - 3.5:.1f} {y - 2}L{x:.1f} {y + 5}L{x + 3.5:.1f} {y - 2}Z"
    return f'<path class="line" d="{line}"/><path class="tip" d="{tip}"/>'


def _node(name: str, centre: float, row: int) -> str:
    width = _width(name)
    place = f'x="{centre - width / 2:.1f}" y="{row * ROW}" width="{width:.1f}" height="{HEIGHT}"'
    text = f'x="{centre:.1f}" y="{row * ROW + HEIGHT / 2 + 4.5:.1f}"'
    return f'<rect {place} rx="4"/><text {text}>{escape(name)}</text>'
