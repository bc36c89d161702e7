"""`dcpstore rebuild`: a lost catalog comes back from the data folder."""

from __future__ import annotations

import click

from dcpstore.cli.failures import DAMAGE
from dcpstore.cli.output import counted, note, print_json, visible
from dcpstore.cli.session import Session, json_option, looking_for_repository
from dcpstore.upkeep.rebuild import rebuild as rebuild_catalog

__all__ = ["rebuild"]


@click.command()
@click.argument("data", metavar="DATA")
@click.option(
    "--into",
    required=True,
    metavar="PATH_OR_URL",
    help="Where the catalog is to be: a folder, or an empty database.",
)
@json_option
@click.pass_context
def rebuild(ctx: click.Context, session: Session, data: str, into: str) -> None:
    """Make a new catalog for the data folder DATA of a repository whose catalog is lost.

    Exits with 3 if something in the folder is damaged, after restoring the rest.
    """
    with looking_for_repository():
        report = rebuild_catalog(data, into)
    if session.json:
        print_json(report)
    else:
        for problem in report.problems:
            note(visible(problem))
        for uid in report.unfinished:
            note(f"manifest of {visible(uid)}: no finished operation made it; left out")
        if report.lost:
            note(f"lost versions: {', '.join(f'v{number}' for number in report.lost)}")
        if report.moved_refs:
            note(f"refs that named them: {visible(', '.join(report.moved_refs))}")
        count = counted(len(report.versions), "version")
        click.echo(f"rebuilt {count} from {counted(report.operations, 'operation')}")
    if report.problems or report.lost:
        ctx.exit(DAMAGE)
