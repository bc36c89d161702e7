"""Plots of how much layers changed: bars for two versions, a heat map for many.

They need matplotlib, which is an extra. Each plot has a figure of its own, so the global state of
`pyplot`, and with it a caller's own plots, is not touched.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dcpstore.errors import InvalidInputError
from dcpstore.history.diff import Diff

__all__ = ["check_plot", "plot_along", "plot_diff"]

_SUFFIXES = (".png", ".svg")
_LABEL_INCHES, _ROW_INCHES, _COLUMN_INCHES = 4.0, 0.22, 0.4
_MOST_INCHES = 200.0  # a larger image has more pixels than viewers open


def plot_diff(diff: Diff, path: str | os.PathLike[str], *, depth: int | None) -> None:
    """Draw the relative change of each layer, from a diff with statistics, into a file.

    Raises:
        InvalidInputError: no .png or .svg, nothing to draw, or matplotlib is missing.
    """
    target = check_plot(path)
    changes = _relative(diff, depth)
    if not changes:
        raise InvalidInputError(
            f"nothing to draw: no tensor changed from {diff.old} to {diff.new}."
        )
    names = sorted(changes)
    figure = _figure(6.0, len(names))
    axes = figure.add_subplot()
    axes.barh(range(len(names)), [changes[name] for name in names])
    axes.set_yticks(range(len(names)), [_plain(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("relative change (L2)")
    axes.set_title(f"{diff.old} to {diff.new}")
    figure.savefig(target)


def plot_along(diffs: Sequence[Diff], path: str | os.PathLike[str], *, depth: int | None) -> None:
    """Draw the relative change of each layer from version to version as a heat map.

    Raises:
        InvalidInputError: no .png or .svg, nothing to draw, or matplotlib is missing.
    """
    target = check_plot(path)
    changes = [_relative(diff, depth) for diff in diffs]
    names = sorted({name for change in changes for name in change})
    if not names:
        raise InvalidInputError("nothing to draw: no tensor changed between these versions.")
    figure = _figure(_COLUMN_INCHES * len(diffs) + 2, len(names))
    axes = figure.add_subplot()
    # A layer that did not change is an empty cell, for a logarithmic scale has no colour for 0.
    cells = [[change.get(name) or math.nan for change in changes] for name in names]
    shades = axes.imshow(cells, aspect="auto", interpolation="nearest", norm=_norm(cells))
    axes.set_yticks(range(len(names)), [_plain(name) for name in names])
    axes.set_xticks(range(len(diffs)), [str(diff.new) for diff in diffs], rotation=90)
    figure.colorbar(shades, label="relative change (L2)")
    figure.savefig(target)


def check_plot(path: str | os.PathLike[str]) -> Path:
    """Return the file to draw into; called before the measurement, which may take long.

    Raises:
        InvalidInputError: no .png or .svg, or its folder is missing.
    """
    target = Path(path)
    if target.suffix.lower() not in _SUFFIXES:
        raise InvalidInputError(f"cannot draw to {str(target)!r}; name a file .png or .svg.")
    if not target.parent.is_dir():
        raise InvalidInputError(f"cannot draw to {str(target)!r}: make its folder first.")
    return target


def _relative(diff: Diff, depth: int | None) -> dict[str, float]:
    """Return the relative changes of the measured layers, by name; infinite ones are left out."""
    found = (
        [(entry.fqn, entry.stats) for entry in diff.entries]
        if depth is None
        else [(module.name, module.stats) for module in diff.by_module(depth)]
    )
    return {
        name: stats.relative
        for name, stats in found
        if stats is not None and math.isfinite(stats.relative)
    }


# `Any`, for matplotlib is an extra and may be missing when mypy runs.
def _figure(width: float, rows: int) -> Any:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 (an extra)
    except ImportError:
        raise InvalidInputError(
            "drawing needs matplotlib; install it with 'pip install matplotlib'."
        ) from None
    height = min(_ROW_INCHES * rows + 1.5, _MOST_INCHES)
    size = (min(_LABEL_INCHES + width, _MOST_INCHES), height)
    return Figure(figsize=size, layout="constrained")


def _norm(cells: Sequence[Sequence[float]]) -> Any:
    from matplotlib.colors import LogNorm  # noqa: PLC0415 (an extra)

    known = [value for row in cells for value in row if not math.isnan(value)]
    if not known:
        return None
    return LogNorm(vmin=min(known), vmax=max(*known, min(known) * (1 + 1e-9)))


def _plain(name: str) -> str:
    """Return a name in which matplotlib does not see a formula."""
    return name.replace("$", r"\$")
