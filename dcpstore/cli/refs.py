"""The commands that name versions, move the names, and revert that.

`tag` and `branch` list without a name; with one they create or delete it. `rollback` moves a branch
back, `undo` reverts the last operation, and `ops` lists the operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import click

from dcpstore.cli.completion import complete_branches, complete_refs, complete_tags
from dcpstore.cli.output import (
    Column,
    human_age,
    human_time,
    note,
    print_json,
    print_table,
    visible,
)
from dcpstore.cli.session import (
    Session,
    WholeNumber,
    limit_option,
    pager_option,
    repo_options,
)
from dcpstore.records import Operation, RefRecord

__all__ = ["branch", "ops", "rollback", "tag", "undo"]

_REFS = (Column("NAME", colour="green"), Column("VERSION", colour="yellow"))
_OPERATIONS = (
    Column("OP", right=True),
    Column("WHEN"),
    Column("AGE", extra=True, terminal=True),
    Column("WHO", shrinks=True),
    Column("WHAT"),
    Column("OF", shrinks=True, colour="green"),
    Column("FROM", colour="yellow"),
    Column("TO", colour="yellow"),
)


@click.command()
@click.argument("name", required=False, shell_complete=complete_tags)
@click.argument("ref", required=False, shell_complete=complete_refs)
@click.option("-d", "--delete", is_flag=True, help="Delete the tag; 'undo' restores it.")
@click.option("--move", is_flag=True, help="Move the tag if it exists; 'undo' moves it back.")
@repo_options
def tag(session: Session, name: str | None, ref: str | None, delete: bool, move: bool) -> None:
    """List the tags, or tag the version REF (default: the tip of main) as NAME."""
    if delete and (name is None or ref is not None or move):
        raise click.UsageError("--delete takes the NAME of one tag, and nothing else.")
    if move and name is None:
        raise click.UsageError("--move takes the NAME of a tag, and the REF to move it to.")
    with session.open() as repo:
        if delete and name is not None:
            _print_gone(session, repo.delete_tag(name))
        elif name is None:
            _print_refs(session, repo.tags(), none="no tags yet; 'dcpstore tag NAME' makes one.")
        else:
            _print_made(session, repo.tag(name, ref, move=move))


@click.command()
@click.argument("name", required=False, shell_complete=complete_branches)
@click.option(
    "--at",
    "at",
    metavar="REF",
    shell_complete=complete_refs,
    help="The version it begins at; default: the tip of main.",
)
@click.option("-d", "--delete", is_flag=True, help="Delete the branch; its versions stay.")
@repo_options
def branch(session: Session, name: str | None, at: str | None, delete: bool) -> None:
    """List the branches, or create the branch NAME."""
    if name is None and at is not None:
        raise click.UsageError(f"--at {at} needs the name of a new branch.")
    if delete and (name is None or at is not None):
        raise click.UsageError("--delete takes the NAME of one branch, and nothing else.")
    with session.open() as repo:
        if delete and name is not None:
            _print_gone(session, repo.delete_branch(name))
        elif name is None:
            _print_refs(session, repo.branches(), none="no branches yet; a save begins main.")
        else:
            _print_made(session, repo.branch(name, at=at))


@click.command()
@click.argument("ref", shell_complete=complete_refs)
@click.option(
    "--branch",
    metavar="NAME",
    default="main",
    show_default=True,
    shell_complete=complete_branches,
    help="Branch to move.",
)
@click.option("--force", is_flag=True, help="Allow a target that is not an ancestor of the tip.")
@click.option(
    "--expect-tip",
    metavar="TIP",
    shell_complete=complete_refs,
    help="Move it only if its tip is still TIP.",
)
@repo_options
def rollback(session: Session, ref: str, branch: str, force: bool, expect_tip: str | None) -> None:
    """Move a branch back to the version REF.

    No version is deleted, and 'undo' reverts the move.
    """
    with session.open() as repo:
        moved = repo.rollback(ref, branch=branch, force=force, expect_tip=expect_tip)
    if session.json:
        print_json(moved)
    else:
        click.echo(f"branch {visible(moved.name)} is v{moved.version}")


@click.command()
@click.option(
    "--expect",
    type=WholeNumber(1),
    metavar="OP",
    help="Undo only if OP is the last operation that can be undone.",
)
@repo_options
def undo(session: Session, expect: int | None) -> None:
    """Revert the last operation that is not undone yet; versions stay.

    An expire, or the copy of a version, cannot be undone; the message then says how to undo the
    operation before it. A gc is skipped.
    """
    with session.open() as repo:
        (newest,) = repo.operations(limit=1)
        done = repo.undo(expect=expect)
    if newest.kind == "gc" and expect is None:
        note("gc cannot be undone and was skipped; the operation before it is undone.")
    if session.json:
        print_json(done)
    elif done.target and done.old is None and done.new is None:
        click.echo(f"restored {done.target}")
    elif not done.target:
        click.echo(f"removed what was added to v{done.new}")
    elif done.new is None:
        click.echo(f"{visible(done.target)} is gone; it was v{done.old}")
    else:
        click.echo(f"{visible(done.target)} is v{done.new} again")


@click.command()
@limit_option
@pager_option
@repo_options
def ops(session: Session, limit: int | None, no_pager: bool) -> None:
    """List the operations on the repository, newest first.

    Each line says who did what, when, to which ref (OF), and what that named before and after
    (FROM, TO).
    """
    with session.open() as repo:
        done = repo.operations(limit=limit)
    if session.json:
        print_json(done)
    else:
        print_table(_OPERATIONS, map(_row, done), paged=not no_pager)


def _print_refs(session: Session, refs: Sequence[RefRecord], *, none: str) -> None:
    if session.json:
        print_json(refs)
    elif refs:
        print_table(_REFS, [(ref.name, f"v{ref.version}") for ref in refs])
    else:
        note(none)


def _print_made(session: Session, ref: RefRecord) -> None:
    if session.json:
        print_json(ref)
    else:
        click.echo(f"{ref.kind} {visible(ref.name)} is v{ref.version}")


def _print_gone(session: Session, ref: RefRecord) -> None:
    if session.json:
        print_json(ref)
    else:
        from dcpstore.catalog.read.ref_lookup import DEFAULT_BRANCH  # noqa: PLC0415 (SQLAlchemy)

        is_default = (ref.kind, ref.name) == ("branch", DEFAULT_BRANCH)
        back = "; 'dcpstore undo' restores it" if is_default else ""
        click.echo(f"deleted the {ref.kind} {visible(ref.name)}; it was v{ref.version}{back}")


def _row(operation: Operation) -> tuple[str, ...]:
    return (
        str(operation.number),
        human_time(operation.created_at),
        human_age(operation.created_at),
        operation.author or "-",
        operation.kind,
        operation.target or "-",
        "-" if operation.old is None else f"v{operation.old}",
        "-" if operation.new is None else f"v{operation.new}",
    )
