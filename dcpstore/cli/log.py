"""`dcpstore log`: the history, newest first, as the view `history` has it."""

from __future__ import annotations

import click

from dcpstore.cli.output import (
    Column,
    human_bytes,
    human_time,
    note,
    print_json,
    print_table,
)
from dcpstore.cli.session import Session, repo_options
from dcpstore.records import Version

__all__ = ["log"]

_MOST = 1_000_000_000  # more would not fit the number types of every database
_COLUMNS = (
    Column("VERSION"),
    Column("BRANCH", shrinks=True),
    Column("STEP", right=True),
    Column("TAGS", shrinks=True),
    Column("WHEN"),
    Column("BYTES", right=True),
    Column("MESSAGE", shrinks=True),
)


@click.command()
@click.argument("ref", required=False)
@click.option("-n", "--limit", type=click.IntRange(1, _MOST), help="Print so many at most.")
@repo_options
def log(session: Session, ref: str | None, limit: int | None) -> None:
    """List versions, newest first: all of them, or REF and its ancestors."""
    with session.open() as repo:
        versions = repo.log(ref, limit=limit)
    if session.json:
        print_json(versions)
    elif versions:
        print_table(_COLUMNS, map(_row, versions))
    else:
        note("no versions yet; dcpstore.save makes the first.")


def _row(version: Version) -> tuple[str, ...]:
    return (
        str(version),
        version.branch,
        "-" if version.step is None else str(version.step),
        ",".join(version.tags) or "-",
        human_time(version.created_at),
        human_bytes(version.nbytes),
        version.message,
    )
