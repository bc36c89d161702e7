"""`dcpstore log`: the history, newest first, with lines from each version to its parent."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import pairwise
from typing import TYPE_CHECKING

import click

from dcpstore.catalog.glance import LogLine, glance_at_log
from dcpstore.cli.completion import complete_branches, complete_refs
from dcpstore.cli.metrics import named_texts
from dcpstore.cli.output import (
    Column,
    human_age,
    human_time,
    note,
    print_json,
    print_table,
)
from dcpstore.cli.session import Session, limit_option, pager_option, repo_options
from dcpstore.core.display import human_bytes, human_metrics

if TYPE_CHECKING:
    from dcpstore.records import Version
    from dcpstore.repository import Repository

__all__ = ["draw_graph", "log"]

_COLUMNS = (
    Column("VERSION", colour="yellow"),
    Column("BRANCH", shrinks=True, colour="cyan"),
    Column("STEP", right=True),
    Column("TAGS", shrinks=True, colour="green"),
    Column("WHEN"),
    Column("AGE", extra=True, terminal=True),
    Column("BYTES", right=True, extra=True),
    Column("METRICS", shrinks=True),
    Column("MESSAGE", shrinks=True),
)
_GRAPH = (Column(""), *_COLUMNS)


def draw_graph(
    versions: Sequence[Version | LogLine],
) -> Iterator[tuple[str, Version | LogLine | None]]:
    """Yield the lines of a graph: each version with its star, and between them how lanes join.

    Versions are sorted by number, the largest first, so a parent is below its children. A lane
    whose parent is left out ends where the parent would be; below the last version it goes on.
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


@click.command()
@click.argument("ref", required=False, shell_complete=complete_refs)
@limit_option
@click.option("--graph", is_flag=True, help="Draw which version came from which.")
@click.option(
    "--where",
    multiple=True,
    metavar="METRIC<NUMBER",
    help="Filter by metric, e.g. 'val_loss<2.5' (repeatable).",
)
@click.option(
    "--steps",
    metavar="FIRST:LAST",
    help="Filter by step, both ends included; either may be left out, e.g. '1000:'.",
)
@click.option("--since", metavar="TIME", help="Saved at this time or later (ISO, local time).")
@click.option("--until", metavar="TIME", help="Saved at this time or before.")
@click.option("--label", multiple=True, metavar="NAME=TEXT", help="Filter by label (repeatable).")
@click.option("--tag", metavar="GLOB", help="Filter by tag; * and ? are wildcards.")
@click.option(
    "--branch",
    metavar="NAME",
    shell_complete=complete_branches,
    help="Filter by the branch it was saved to.",
)
@click.option(
    "--metric", "metrics", multiple=True, metavar="NAME", help="Show only this metric (repeatable)."
)
@pager_option
@repo_options
def log(
    session: Session,
    *,
    ref: str | None,
    limit: int | None,
    graph: bool,
    where: tuple[str, ...],
    steps: str | None,
    since: str | None,
    until: str | None,
    label: tuple[str, ...],
    tag: str | None,
    branch: str | None,
    metrics: tuple[str, ...],
    no_pager: bool,
) -> None:
    """List versions, newest first: all of them, or REF and its ancestors."""
    given = (steps, since, until, tag, branch)
    is_filtered = bool(where or label) or any(one is not None for one in given)
    versions: Sequence[Version | LogLine] | None = None
    if ref is None and not is_filtered and not session.json:
        versions = glance_at_log(session.target, limit=limit)
    if versions is None:
        with session.open() as repo:
            versions = repo.log(
                ref,
                limit=limit,
                where=where,
                steps=(None, None) if steps is None else _steps(steps),
                since=None if since is None else _time(since, "--since"),
                until=None if until is None else _time(until, "--until"),
                labels=named_texts(label, form="NAME=TEXT", hint="--label"),
                tag=tag,
                branch=branch,
            )
    unseen = set(metrics).difference(*(version.metrics for version in versions))
    if versions and unseen:  # an older version may have it
        with session.open() as repo:
            _check_metrics(repo, sorted(unseen))
    if session.json:
        print_json(versions)
    elif versions and graph:
        rows = (_graph_row(line, metrics) for line in draw_graph(versions))
        print_table(_GRAPH, rows, paged=not no_pager)
    elif versions:
        rows = (_row(version, metrics) for version in versions)
        print_table(_COLUMNS, rows, paged=not no_pager)
    elif is_filtered:
        note("no version matches the filters.")
    else:
        note("no versions yet; dcpstore.save makes the first.")


def _check_metrics(repo: Repository, names: Sequence[str]) -> None:
    """Raise NotFoundError for a metric that no version has."""
    from dcpstore.catalog.read.log_filter import check_metrics  # noqa: PLC0415 (loads SQLAlchemy)

    check_metrics(repo.catalog, names)


def _steps(text: str) -> tuple[int | None, int | None]:
    match = re.fullmatch(r"([0-9]{1,18})?:([0-9]{1,18})?", text)
    if match is None:
        raise click.BadParameter(f"{text!r} is not FIRST:LAST.", param_hint="'--steps'")
    first, last = (None if end is None else int(end) for end in match.groups())
    return first, last


def _time(text: str, option: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise click.BadParameter(
            f"{text!r} is not a time; write 2026-03-01 or 2026-03-01T10:04.",
            param_hint=f"'{option}'",
        ) from error


def _graph_row(
    line: tuple[str, Version | LogLine | None], metrics: Sequence[str]
) -> tuple[str, ...]:
    graph, version = line
    return (graph, *(("",) * len(_COLUMNS) if version is None else _row(version, metrics)))


def _row(version: Version | LogLine, metrics: Sequence[str]) -> tuple[str, ...]:
    return (
        str(version),
        version.branch,
        "-" if version.step is None else str(version.step),
        ",".join(version.tags) or "-",
        human_time(version.created_at),
        human_age(version.created_at),
        human_bytes(version.nbytes),
        human_metrics(version.metrics, metrics) or "-",
        version.message,
    )
