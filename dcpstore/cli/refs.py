"""`dcpstore tag` and `dcpstore branch`: without a name they list, with one they make or delete."""

from __future__ import annotations

from collections.abc import Sequence

import click

from dcpstore.cli.output import Column, note, print_json, print_table, visible
from dcpstore.cli.session import Session, repo_options
from dcpstore.records import RefRecord

__all__ = ["branch", "tag"]

_COLUMNS = (Column("NAME"), Column("VERSION"))


@click.command()
@click.argument("name", required=False)
@click.argument("ref", required=False)
@click.option("-d", "--delete", is_flag=True, help="Remove the tag; 'undo' brings it back.")
@click.option(
    "--move", is_flag=True, help="Move the tag NAME, if there is one; 'undo' moves it back."
)
@repo_options
def tag(session: Session, name: str | None, ref: str | None, delete: bool, move: bool) -> None:
    """List the tags, or call the version REF (default: the tip of main) NAME."""
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
@click.argument("name", required=False)
@click.option("--at", "at", metavar="REF", help="Where it begins; default: the tip of main.")
@click.option("-d", "--delete", is_flag=True, help="Remove the branch and none of its versions.")
@repo_options
def branch(session: Session, name: str | None, at: str | None, delete: bool) -> None:
    """List the branches, or begin the branch NAME."""
    if name is None and at is not None:
        raise click.UsageError(f"--at {at} says where, but no branch is named.")
    if delete and (name is None or at is not None):
        raise click.UsageError("--delete takes the NAME of one branch, and nothing else.")
    with session.open() as repo:
        if delete and name is not None:
            _print_gone(session, repo.delete_branch(name))
        elif name is None:
            _print_refs(session, repo.branches(), none="no branches yet; a save begins main.")
        else:
            _print_made(session, repo.branch(name, at=at))


def _print_refs(session: Session, refs: Sequence[RefRecord], *, none: str) -> None:
    if session.json:
        print_json(refs)
    elif refs:
        print_table(_COLUMNS, [(ref.name, f"v{ref.version}") for ref in refs])
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
        click.echo(f"deleted the {ref.kind} {visible(ref.name)}; it was v{ref.version}")
