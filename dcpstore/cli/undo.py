"""`dcpstore rollback`, `undo` and `ops`: move a branch back, take back, and see what was done."""

from __future__ import annotations

import click

from dcpstore.cli.output import Column, human_time, print_json, print_table, visible
from dcpstore.cli.session import Session, repo_options
from dcpstore.records import Operation

__all__ = ["ops", "rollback", "undo"]

_MOST = 1_000_000_000
_COLUMNS = (
    Column("OP", right=True),
    Column("WHEN"),
    Column("WHO", shrinks=True),
    Column("WHAT"),
    Column("OF", shrinks=True),
    Column("FROM"),
    Column("TO"),
)


@click.command()
@click.argument("ref")
@click.option("--branch", default="main", show_default=True, help="Branch to move.")
@click.option("--force", is_flag=True, help="Allow a target that is not an ancestor of the tip.")
@click.option("--expect-tip", metavar="REF", help="Only if the branch is still there.")
@repo_options
def rollback(session: Session, ref: str, branch: str, force: bool, expect_tip: str | None) -> None:
    """Move a branch back to the version REF; deletes nothing, and 'undo' moves it forth."""
    with session.open() as repo:
        moved = repo.rollback(ref, branch=branch, force=force, expect_tip=expect_tip)
    if session.json:
        print_json(moved)
    else:
        click.echo(f"branch {visible(moved.name)} is v{moved.version}")


@click.command()
@click.option(
    "--expect", type=click.IntRange(1), metavar="OP", help="Only if it is this operation."
)
@repo_options
def undo(session: Session, expect: int | None) -> None:
    """Take back the last operation that is not undone; versions stay."""
    with session.open() as repo:
        done = repo.undo(expect=expect)
    if session.json:
        print_json(done)
    elif done.target and done.old is None and done.new is None:
        click.echo(f"brought back {done.target}")
    elif not done.target:
        click.echo(f"took back what was added to v{done.new}")
    elif done.new is None:
        click.echo(f"{visible(done.target)} is gone; it was v{done.old}")
    else:
        click.echo(f"{visible(done.target)} is v{done.new} again")


@click.command()
@click.option("-n", "--limit", type=click.IntRange(1, _MOST), help="Print so many at most.")
@repo_options
def ops(session: Session, limit: int | None) -> None:
    """List what was done to the repository, newest first: by whom, when, from where to where."""
    with session.open() as repo:
        done = repo.operations(limit=limit)
    if session.json:
        print_json(done)
    else:
        print_table(_COLUMNS, map(_row, done))


def _row(operation: Operation) -> tuple[str, ...]:
    return (
        str(operation.number),
        human_time(operation.created_at),
        operation.author or "-",
        operation.kind,
        operation.target or "-",
        "-" if operation.old is None else f"v{operation.old}",
        "-" if operation.new is None else f"v{operation.new}",
    )
