"""How commands print: aligned tables for people, JSON and CSV for programs.

Text from a repository reaches a terminal only with its control characters made visible. Tables are
cut to the terminal's width, and never where the output goes elsewhere.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

import click

from dcpstore.records import as_json

__all__ = [
    "Column",
    "counted",
    "human_bytes",
    "human_number",
    "human_time",
    "note",
    "print_csv",
    "print_json",
    "print_pairs",
    "print_table",
    "visible",
]

_GAP = "  "
_NARROWEST = 8  # cells to which a column shrinks
_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table; `shrinks` lets a narrow terminal cut it."""

    title: str
    right: bool = False
    shrinks: bool = False


def visible(text: str) -> str:
    r"""Return text with every character that does not print as an escape such as `\x1b`."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


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


def human_number(value: float) -> str:
    """Return a number with all its digits, and without a fraction where there is none."""
    return repr(value).removesuffix(".0")


def counted(count: int, noun: str) -> str:
    """Return `1 pack`, `2 packs`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def human_time(time: datetime, *, zone: bool = False) -> str:
    """Return a time in the local time zone."""
    with suppress(OverflowError):  # at the ends of the calendar a zone may lead out of it
        time = time.astimezone()
    return time.strftime("%Y-%m-%d %H:%M:%S %z" if zone else "%Y-%m-%d %H:%M")


def note(text: str) -> None:
    """Print a note on standard error; it is not part of the output."""
    click.echo(text, err=True)


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> None:
    """Print rows under the columns' titles."""
    # Not by `rich.table`: that takes 0.8 s for 1,000 rows of `dcpstore log`, and this 0.01 s.
    cells = [[visible(column.title) for column in columns]]
    cells += [[visible(cell) for cell in row] for row in rows]
    widths = [max(map(_cells, column)) for column in zip(*cells, strict=True)]
    if sys.stdout.isatty():
        _shrink(widths, columns, shutil.get_terminal_size().columns)
    lines = []
    for row in cells:
        padded = []
        for cell, width, column in zip(row, widths, columns, strict=True):
            shown = _cut(cell, width)
            space = " " * (width - _cells(shown))
            padded.append(space + shown if column.right else shown + space)
        lines.append(_GAP.join(padded).rstrip())
    click.echo("\n".join(lines))


def print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Print names with their values, one a line; the lines of a value stand below each other."""
    found = list(pairs)
    width = max(len(name) for name, _ in found)
    for name, value in found:
        for i, line in enumerate(value.split("\n")):
            click.echo(f"{'' if i else name:{width}}{_GAP}{visible(line)}".rstrip())


def print_json(value: object) -> None:
    """Print a record, or a list of them with one a line, as JSON in pure ASCII."""
    if isinstance(value, list):
        click.echo("[" + ",\n ".join(json.dumps(as_json(item)) for item in value) + "]")
    else:
        click.echo(json.dumps(as_json(value), indent=2))


def print_csv(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows as CSV with a line of titles; what is NULL is empty, bytes are in hex."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(titles)
    for row in rows:
        writer.writerow([value.hex() if isinstance(value, bytes) else value for value in row])
    shown = text.getvalue()
    if sys.stdout.isatty():  # a file gets the bytes as they are, a terminal never
        shown = "".join(visible(line.rstrip("\n")) + "\n" for line in shown.split("\n")[:-1])
    click.echo(shown, nl=False, color=True)  # or it would drop what looks like a colour


def _cells(text: str) -> int:
    """Return how many cells of a terminal a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # noqa: PLC0415 (most tables are ASCII)

    return cell_len(text)


def _cut(text: str, width: int) -> str:
    """Return a text that takes at most `width` cells, with an ellipsis where it was longer."""
    if _cells(text) <= width:
        return text
    from rich.cells import set_cell_size  # noqa: PLC0415 (most tables fit)

    return set_cell_size(text, width - 1) + "…"


def _shrink(widths: list[int], columns: Sequence[Column], limit: int) -> None:
    """Take cells from the widest columns that may shrink, until the row fits or none is left."""
    soft = [i for i, column in enumerate(columns) if column.shrinks]
    excess = sum(widths) + len(_GAP) * (len(widths) - 1) - limit
    while excess > 0 and soft:
        widest = max(soft, key=widths.__getitem__)
        if widths[widest] <= _NARROWEST:
            break
        widths[widest] -= 1
        excess -= 1
