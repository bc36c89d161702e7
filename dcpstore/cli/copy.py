"""`dcpstore copy`: versions from one repository to another."""

from __future__ import annotations

import click

from dcpstore import repository
from dcpstore.cli.output import counted, human_bytes, note, print_json, visible
from dcpstore.cli.session import Session, json_option, looking_for_repository

__all__ = ["copy"]


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.argument("refs", nargs=-1)
@json_option
def copy(session: Session, source: str, target: str, refs: tuple[str, ...]) -> None:
    """Copy the versions REFS (default: all, with every tag and branch) from SRC to DST.

    DST must be a repository; 'dcpstore init' makes one. Chunks that it holds are not written again.
    """
    with looking_for_repository():
        opened = repository.open(source, create=False)
    with opened as here:
        with looking_for_repository():
            other = repository.open(target, create=False)
        with other as there:
            report = here.copy_to(there, list(refs) or None)
    if session.json:
        print_json(report)
        return
    for old, new in report.copied:
        click.echo(f"v{old} is v{new} there")
    if report.present:
        note(f"there already: {counted(len(report.present), 'version')}")
    if report.refused:
        note(f"expired there, and not copied: {', '.join(f'v{n}' for n in report.refused)}")
    if report.left:
        left = visible(", ".join(report.left))
        note(f"refs that mean something else there, and stayed: {left}")
    written = human_bytes(report.nbytes_written)
    click.echo(f"copied {counted(len(report.copied), 'version')}, {written} written")
