"""`dcpstore status`: the running saves, and the progress of each of their ranks."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import click

from dcpstore.cli.output import (
    Column,
    human_time,
    print_json,
    print_table,
)
from dcpstore.cli.session import Session, repo_options
from dcpstore.core.display import human_bytes
from dcpstore.core.durations import as_duration
from dcpstore.records import RankProgress, RunningSave

__all__ = ["status"]

_COLUMNS = (
    Column("SAVE", shrinks=True, colour="yellow"),
    Column("BRANCH", shrinks=True, colour="cyan"),
    Column("STEP", right=True),
    Column("BEGAN"),
    Column("LEASE"),
    Column("RANK", right=True),
    Column("PHASE"),
    Column("DONE", right=True),
    Column("OF", right=True),
    Column("SINCE"),
)


@click.command()
@click.option(
    "--lease",
    default="1h",
    show_default=True,
    help="How long a save without a report counts as running.",
)
@repo_options
def status(session: Session, lease: str) -> None:
    """List the running saves, with each rank's phase and bytes.

    A save reports its progress every ten seconds. One without a report for longer than the lease
    has crashed or lost its database; gc then clears it.
    """
    patience = as_duration(lease, what="lease")
    with session.open() as repo:
        running = repo.status()
    if session.json:
        print_json(running)
    elif running:
        now = datetime.now(UTC)
        print_table(_COLUMNS, (row for save in running for row in _rows(save, now, patience)))
    else:
        click.echo("no save is running")


def _rows(save: RunningSave, now: datetime, patience: timedelta) -> Iterator[tuple[str, ...]]:
    """Yield a line for each rank that has reported; a save without reports also gets one."""
    silent = max(now - save.touched_at, timedelta())
    lease = "lapsed" if silent > patience else f"alive, {round(silent.total_seconds())} s ago"
    step = "-" if save.step is None else str(save.step)
    first: tuple[str, ...] = (save.uid, save.branch, step, human_time(save.started_at), lease)
    if not save.progress:
        yield (*first, "-", "-", "-", "-", "-")
    for one in save.progress:
        yield (*first, *_rank_cells(one))
        first = ("",) * len(first)


def _rank_cells(one: RankProgress) -> tuple[str, ...]:
    return (
        str(one.rank),
        one.phase,
        human_bytes(one.nbytes),
        human_bytes(one.total),
        human_time(one.since),
    )
