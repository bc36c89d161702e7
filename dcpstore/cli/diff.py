"""`dcpstore diff`: what changed between two versions, or along a branch from each to the next."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import click

from dcpstore.cli.completion import complete_branches, complete_refs
from dcpstore.cli.output import (
    Column,
    note,
    print_json,
    print_table,
    visible,
)
from dcpstore.cli.session import Session, WholeNumber, repo_options
from dcpstore.core.display import human_bytes
from dcpstore.errors import InvalidInputError
from dcpstore.formats.composition import composition_of, describe_entry, is_mark
from dcpstore.formats.json_fields import value_tree
from dcpstore.records import EntryRecord

if TYPE_CHECKING:
    from dcpstore.history import Diff, EntryDiff, ModuleDiff, TensorStats
    from dcpstore.repository import Repository

__all__ = ["diff"]

DIFFERENT = 1  # as diff(1) exits
_COUNTS = ("added", "removed", "changed", "retyped", "reshaped", "unchanged")
_STATS: dict[str, Callable[[TensorStats], float]] = {
    "l2": lambda stats: stats.l2,
    "relative": lambda stats: stats.relative,
    "max": lambda stats: stats.max_abs,
    "cosine": lambda stats: stats.cosine,
    "share": lambda stats: stats.share_changed,
    "nan": lambda stats: stats.nan_new,
    "inf": lambda stats: stats.inf_new,
}
_ENTRY = ("change", "fqn", "old", "new", "bytes", "shared")
_SUMS = (*_COUNTS, "bytes", "shared")
_MODULE = ("module", *_SUMS)
_ALONG = ("versions", *_SUMS)
_COLOURS = {"added": "green", "removed": "red", "changed": "yellow"} | dict.fromkeys(
    ("retyped", "reshaped"), "magenta"
)
_TEXTS = ("change", "fqn", "old", "new", "module", "versions")

Cells = dict[str, object]  # a row by column, before it is printed


def _complete_columns(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    columns = _columns(
        depth=ctx.params.get("depth"),
        along=ctx.params.get("along"),
        stats=bool(ctx.params.get("stats") or ctx.params.get("plot")),
    )
    return [column for column in columns if column.startswith(incomplete)]


@click.command(
    help=f"""Show what changed from version A to B; B defaults to the tip of main.

    Exits with 1 if anything changed.

    BYTES is the size of a tensor in B (in A, if it was removed), and SHARED how many of these bytes
    A has too, so that they are stored once.

    --sort takes a column of the table: {", ".join(_ENTRY)}; with --depth {", ".join(_MODULE)}; with
    --along {_ALONG[0]} in the place of {_MODULE[0]}. --stats adds {", ".join(_STATS)}.

    With --along, A and B are the first and the last version to compare; both are optional.
    """
)
@click.argument("refs", nargs=-1, metavar="[A] [B]", shell_complete=complete_refs)
@click.option(
    "--stats", is_flag=True, help="Measure how each changed tensor changed (reads chunks)."
)
@click.option(
    "--depth", type=WholeNumber(1, 1000), help="Sum up by module: the first N parts of the FQN."
)
@click.option(
    "--sort",
    metavar="COLUMN",
    shell_complete=_complete_columns,
    help="Sort by a column of the table, numbers from the largest.",
)
@click.option("--all", "show_all", is_flag=True, help="Also list what is unchanged.")
@click.option(
    "--along",
    metavar="BRANCH",
    shell_complete=complete_branches,
    help="Compare each version of BRANCH with the next.",
)
@click.option("--plot", metavar="PATH", help="Draw the relative change to a .png or .svg file.")
@repo_options
def diff(
    session: Session,
    *,
    refs: tuple[str, ...],
    stats: bool,
    depth: int | None,
    sort: str | None,
    show_all: bool,
    along: str | None,
    plot: str | None,
) -> None:
    """Show what changed between two versions; its help, with the columns, is above."""
    if len(refs) > 2 or (not refs and along is None):
        raise click.UsageError("name the versions A and B to compare, or --along a branch.")
    stats = stats or plot is not None
    has_depth = along is None or plot is not None or session.json
    _check_along(along, show_all=show_all, depth=depth, has_depth=has_depth)
    columns = _columns(depth=depth, along=along, stats=stats)
    _check_sort(sort, columns)
    if plot is not None:
        from dcpstore.history.plots import check_plot  # noqa: PLC0415 (few draw)

        check_plot(plot)
    with session.open() as repo:
        if along is None:
            diffs = [repo.diff(refs[0], refs[1] if len(refs) > 1 else None, stats=stats)]
        else:
            diffs = _diffs_along(repo, along, refs, stats=stats)
    if plot is not None:
        from dcpstore.history.plots import plot_along, plot_diff  # noqa: PLC0415

        if along is None:
            plot_diff(diffs[0], plot, depth=depth)
        else:
            plot_along(diffs, plot, depth=depth)
        note(f"the plot is in {visible(plot)}")
    if session.json:
        shapes = [_shape(one, depth) for one in diffs]
        print_json(shapes[0] if along is None else shapes)
    elif along is None:
        rows = _rows(diffs[0], depth=depth, sort=sort, stats=stats, show_all=show_all)
        _print_rows(rows, columns, sort)
        click.echo(diffs[0].summary())
    elif rows := _rows_along(diffs, stats=stats):
        _print_rows(rows, columns, sort)
    else:
        note("there is only one version, so nothing to compare.")
    sys.stdout.flush()  # here, where a closed pipe still ends the command quietly
    if any(diffs):
        click.get_current_context().exit(DIFFERENT)


def _diffs_along(repo: Repository, branch: str, refs: Sequence[str], *, stats: bool) -> list[Diff]:
    """Return the diffs of the versions of a branch, each from the one that is left before it."""
    last = repo.show(refs[1]) if len(refs) > 1 else repo.show(branch)
    line = sorted(version.number for version in repo.log(branch))  # what expired is not there
    first = repo.show(refs[0] if refs else line[0])
    for end in (first, last):
        if end.number not in line:
            raise InvalidInputError(
                f"{end} is not an ancestor of {branch!r}; 'dcpstore log {branch}' lists them."
            )
    if first.number > last.number:
        raise InvalidInputError(
            f"{first} comes after {last} on {branch!r}; name the earlier version first."
        )
    asked = [number for number in line if first.number <= number <= last.number]
    return [repo.diff(old, new, stats=stats) for old, new in pairwise(asked)]


def _check_along(along: str | None, *, show_all: bool, depth: int | None, has_depth: bool) -> None:
    """Refuse options that --along does not use; a plot and JSON have a depth, the table has not."""
    if along is not None and show_all:
        raise click.UsageError("--all lists entries, and --along sums them up; leave out one.")
    if depth is not None and not has_depth:
        raise click.UsageError("with --along, --depth is only for --plot and --json; leave it out.")


def _check_sort(sort: str | None, columns: Sequence[str]) -> None:
    if sort is not None and sort not in columns:
        raise click.UsageError(
            f"there is no column {sort!r} here; sort by one of {', '.join(columns)}."
        )


def _columns(*, depth: int | None, along: str | None, stats: bool) -> tuple[str, ...]:
    """Return the columns that a call prints."""
    own = _ALONG if along is not None else _ENTRY if depth is None else _MODULE
    return (*own, *(_STATS if stats else ()))


def _rows(
    diff: Diff, *, depth: int | None, sort: str | None, stats: bool, show_all: bool
) -> list[Cells]:
    if depth is None:
        entries = [entry for entry in diff.entries if show_all or entry.change != "unchanged"]
        return [
            _entry_cells(one) | _stats_cells(one.stats, stats)
            for entry in entries
            for one in (entry, *_changed_parts(entry, sort))
        ]
    modules = [
        module
        for module in diff.by_module(depth)
        if show_all or any(getattr(module, count) for count in _COUNTS[:-1])
    ]
    return [_module_cells(module) | _stats_cells(module.stats, stats) for module in modules]


def _rows_along(diffs: Sequence[Diff], *, stats: bool) -> list[Cells]:
    rows = []
    for diff in diffs:
        (whole,) = diff.by_module(0) or (None,)
        if whole is not None:
            cells = _module_cells(whole) | _stats_cells(whole.stats, stats)
            rows.append(cells | {"versions": f"{diff.old} -> {diff.new}"})
    return rows


def _print_rows(rows: list[Cells], columns: Sequence[str], sort: str | None) -> None:
    if sort is not None:
        rows = sorted(rows, key=lambda row: _rank(row[sort]))
    if not rows:
        return
    print_table(
        [
            Column(
                c.upper(),
                right=c not in _TEXTS,
                shrinks=c in ("fqn", "module", "old", "new"),
                colours=_COLOURS if c == "change" else {},
            )
            for c in columns
        ],
        [[_text(column, row[column]) for column in columns] for row in rows],
    )


def _rank(value: object) -> tuple[int, object]:
    """Return a sort key: numbers first, the largest first, then texts, then missing values."""
    if isinstance(value, int | float) and not math.isnan(value):
        return 0, -value
    return (1, value) if isinstance(value, str) else (2, 0)


def _text(column: str, value: object) -> str:
    if value is None:
        return "-"
    if column in ("bytes", "shared") and isinstance(value, int):
        return human_bytes(value)
    if column == "share" and isinstance(value, float):
        return f"{value:.2%}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _changed_parts(entry: EntryDiff, sort: str | None) -> list[EntryDiff]:
    """Return the parts that changed, to be listed below the tensor that is made of them."""
    if sort is not None:  # sorting would move them away from their tensor
        return []
    changed = (part for part in entry.parts if part.change != "unchanged")
    return [replace(part, fqn=f"  {part.fqn}") for part in changed]


def _entry_cells(entry: EntryDiff) -> Cells:
    return {
        "change": entry.change,
        "fqn": entry.fqn,
        "old": None if entry.old is None else describe_entry(entry.old),
        "new": None if entry.new is None else describe_entry(entry.new),
        "bytes": entry.nbytes,
        "shared": entry.nbytes_shared,
    }


def _module_cells(module: ModuleDiff) -> Cells:
    counts: Cells = {count: getattr(module, count) for count in _COUNTS}
    sizes = {"bytes": module.nbytes, "shared": module.nbytes_shared}
    return {"module": module.name} | counts | sizes


def _stats_cells(stats: TensorStats | None, asked: bool) -> Cells:
    if not asked:
        return {}
    return {name: None if stats is None else read(stats) for name, read in _STATS.items()}


def _shape(diff: Diff, depth: int | None) -> dict[str, object]:
    """Return a diff as JSON shows it: entries, or modules where a depth is given."""
    head: dict[str, object] = {
        "old": diff.old.number,
        "new": diff.new.number,
        "nbytes": diff.nbytes,
        "nbytes_shared": diff.nbytes_shared,
    }
    if depth is None:
        return head | {"entries": list(map(_entry_shape, diff.entries))}
    return head | {
        "modules": [
            {"module": module.name}
            | {count: getattr(module, count) for count in _COUNTS}
            | {"nbytes": module.nbytes, "nbytes_shared": module.nbytes_shared}
            | {"stats": _stats_shape(module.stats)}
            for module in diff.by_module(depth)
        ]
    }


def _entry_shape(entry: EntryDiff) -> dict[str, object]:
    return {
        "fqn": entry.fqn,
        "change": entry.change,
        "old": _side_shape(entry.old),
        "new": _side_shape(entry.new),
        "nbytes_shared": entry.nbytes_shared,
        "stats": _stats_shape(entry.stats),
    } | ({"parts": list(map(_entry_shape, entry.parts))} if entry.parts else {})


def _side_shape(entry: EntryRecord | None) -> dict[str, object] | None:
    if entry is None:
        return None
    tensor = entry.tensor
    return {
        "kind": composition_of(entry).kind if is_mark(entry) else entry.kind,
        "dtype": None if tensor is None else tensor.dtype,
        "shape": None if tensor is None else tensor.shape,
        "digest": None if tensor is None else tensor.digest,
        "value": None if entry.value is None else value_tree(entry.fqn, entry.value),
    }


def _stats_shape(stats: TensorStats | None) -> dict[str, object] | None:
    if stats is None:
        return None
    derived = {name: read(stats) for name, read in _STATS.items() if name not in ("nan", "inf")}
    counted = asdict(stats)
    kept = ("elements", "compared", "changed", "nan_old", "nan_new", "inf_old", "inf_new")
    return derived | {name: counted[name] for name in kept}
