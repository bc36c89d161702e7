"""How values are shown to people: bytes, numbers and counts in words, and tables in a notebook.

The HTML takes its colours from the notebook, so it is readable on light and on dark. Every title,
name and value in it is escaped: what a repository holds never becomes markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from html import escape

__all__ = [
    "counted",
    "exact_time",
    "html_pairs",
    "html_table",
    "human_bytes",
    "human_duration",
    "human_metrics",
    "human_number",
    "some_of",
]

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_SPANS = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
_LINE = "border-bottom: 1px solid rgba(128, 128, 128, 0.35)"
_CELL = f"padding: 0.15em 0.8em 0.15em 0; vertical-align: top; {_LINE}"


def human_bytes(count: int) -> str:
    """Return a number of bytes in the unit that suits it: `512 B`, `1.4 GiB`."""
    if count < 1024:
        return f"{count} B"
    size = float(count)
    for unit in _UNITS:
        size /= 1024
        if size < 1023.95 or unit == _UNITS[-1]:  # what rounds to 1024.0 belongs to the next
            break
    return f"{size:.1f} {unit}"


def human_duration(duration: timedelta) -> str:
    """Return a duration in its two largest units: `34 s`, `2 h 5 min`."""
    rest = round(duration.total_seconds())
    parts = []
    for unit, size in _SPANS:
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def human_number(value: float) -> str:
    """Return a number with all its digits, and without a fraction where there is none."""
    return repr(value).removesuffix(".0")


def human_metrics(metrics: Mapping[str, float], names: Sequence[str] = ()) -> str:
    """Return metrics in one line, all or those of `names`: `train_loss=1.72, val_loss=1.87`.

    Fractions have six significant digits, so that a line stays short.
    """
    shown = {name: metrics[name] for name in names or metrics if name in metrics}
    return ", ".join(
        f"{name}={human_number(value) if float(value).is_integer() else f'{value:.6g}'}"
        for name, value in shown.items()
    )


def counted(count: int, noun: str) -> str:
    """Return `1 pack`, `2 packs`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def exact_time(time: datetime) -> str:
    """Return a time to the second, with its zone: `2026-03-01 10:04:00+00:00`."""
    return time.isoformat(sep=" ", timespec="seconds")


def some_of(names: Sequence[str], most: int) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def html_pairs(title: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Return a title, and names with their values, as HTML; values that are empty are left out."""
    rows = "".join(
        f'<tr><th style="text-align: left; {_CELL}">{escape(name)}</th>'
        f'<td style="text-align: left; white-space: pre-wrap; {_CELL}">{escape(value)}</td></tr>'
        for name, value in pairs
        if value
    )
    return f"{_title(title)}{_table(rows)}"


def html_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, below: str = ""
) -> str:
    """Return a title, a table and a line below it as HTML."""
    head = "".join(f'<th style="text-align: left; {_CELL}">{escape(name)}</th>' for name in columns)
    body = "".join(
        "<tr>"
        + "".join(f'<td style="text-align: left; {_CELL}">{escape(cell)}</td>' for cell in row)
        + "</tr>"
        for row in rows
    )
    end = f"<div>{escape(below)}</div>" if below else ""
    return f"{_title(title)}{_table(f'<tr>{head}</tr>{body}')}{end}"


def _title(title: str) -> str:
    return f'<div style="font-weight: bold; margin-bottom: 0.3em">{escape(title)}</div>'


def _table(rows: str) -> str:
    # "inherit" because notebooks give tables their own colours, dark on dark in some themes.
    style = "border-collapse: collapse; color: inherit; background: inherit; font-size: inherit"
    return f'<table style="{style}"><tbody>{rows}</tbody></table>'
