"""Draw a Mermaid flowchart as SVG, without a browser and without Mermaid.

It knows what our pages use: `flowchart TD`, and lines `a --> b`. Each node stands one row above the
highest node that it points to, so every arrow goes down.
"""

from __future__ import annotations

import re
from html import escape

ROW = 64  # pixels from row to row
HEIGHT = 28  # of a node
GAP = 14  # between the nodes of a row
LETTER = 7.3  # width of a letter
ROUNDS = 24  # passes that order the rows


def draw(chart: str) -> str:
    """Return the HTML of a drawing of `chart`."""
    head, *lines = chart.strip().splitlines()
    arrows = [re.fullmatch(r"\s*([\w.]+) --> ([\w.]+)", line) for line in lines]
    if head != "flowchart TD" or not all(arrows):
        raise ValueError(f"can only draw 'flowchart TD' with lines 'a --> b': {chart[:60]!r}")
    edges = [(found[1], found[2]) for found in arrows if found]
    rows = _rows(edges)
    places = _places(rows, edges)
    width = max(x + w for x, _, w in places.values()) + 2
    height = ROW * (len(rows) - 1) + HEIGHT + 4
    parts = [_arrow(places[above], places[below]) for above, below in edges]
    parts += [_node(name, *place) for name, place in places.items()]
    size = f'viewBox="-2 -2 {width + 4:.0f} {height}" width="{width + 4:.0f}"'
    label = f'role="img" aria-label="Drawing of {len(places)} nodes and the arrows between them"'
    return f'<div class="drawing"><svg {size} {label}>{"".join(parts)}</svg></div>\n'


def _rows(edges: list[tuple[str, str]]) -> list[list[str]]:
    """Return the nodes by row, from the top."""
    names = list(dict.fromkeys(name for edge in edges for name in edge))
    level = dict.fromkeys(names, 0)
    for _ in names:
        for above, below in edges:
            level[above] = max(level[above], level[below] + 1)
    top = max(level.values())
    return [[name for name in names if level[name] == top - row] for row in range(top + 1)]


def _places(
    rows: list[list[str]], edges: list[tuple[str, str]]
) -> dict[str, tuple[float, float, float]]:
    """Return left, top and width of each node; each row is ordered by its neighbours' centres."""
    linked: dict[str, list[str]] = {}
    for above, below in edges:
        linked.setdefault(above, []).append(below)
        linked.setdefault(below, []).append(above)
    widths = {name: LETTER * len(name) + 18 for row in rows for name in row}
    total = max(sum(widths[name] + GAP for name in row) for row in rows)
    centre: dict[str, float] = {}

    def spread(row: list[str]) -> None:
        used = sum(widths[name] for name in row)
        gap = (total - used) / (len(row) + 1)
        x = 0.0
        for name in row:
            x += gap
            centre[name] = x + widths[name] / 2
            x += widths[name]

    for row in rows:
        spread(row)
    for turn in range(ROUNDS):
        for row in rows if turn % 2 else rows[::-1]:
            wanted = {n: sum(centre[o] for o in linked[n]) / len(linked[n]) for n in row}
            row.sort(key=wanted.__getitem__)
            spread(row)
    return {
        name: (centre[name] - widths[name] / 2, float(ROW * number), widths[name])
        for number, row in enumerate(rows)
        for name in row
    }


def _arrow(above: tuple[float, float, float], below: tuple[float, float, float]) -> str:
    x1, y1 = above[0] + above[2] / 2, above[1] + HEIGHT
    x2, y2 = below[0] + below[2] / 2, below[1] - 5
    bend = min(ROW * 0.6, (y2 - y1) / 2)
    tip = f"M{x2 - 3.5:.1f} {y2 - 2:.1f}L{x2:.1f} {y2 + 5:.1f}L{x2 + 3.5:.1f} {y2 - 2:.1f}Z"
    line = f"M{x1:.1f} {y1:.1f}C{x1:.1f} {y1 + bend:.1f} {x2:.1f} {y2 - bend:.1f} {x2:.1f} {y2:.1f}"
    return f'<path class="line" d="{line}"/><path class="tip" d="{tip}"/>'


def _node(name: str, x: float, y: float, width: float) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{HEIGHT}" rx="4"/>'
        f'<text x="{x + width / 2:.1f}" y="{y + HEIGHT / 2 + 4.5:.1f}">{escape(name)}</text>'
    )
