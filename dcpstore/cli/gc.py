"""`dcpstore gc`: free the bytes that nothing reaches."""

from __future__ import annotations

import click

from dcpstore.cli.output import counted, human_bytes, print_json, print_pairs
from dcpstore.cli.session import Session, repo_options

__all__ = ["gc"]


@click.command()
@click.option(
    "--grace", default="24h", show_default=True, help="How long what is condemned stays readable."
)
@click.option(
    "--lease", default="1h", show_default=True, help="How long a silent save counts as running."
)
@click.option("--dry-run", is_flag=True, help="Change nothing, and say what would be freed.")
@repo_options
def gc(session: Session, grace: str, lease: str, dry_run: bool) -> None:
    """Condemn packs that nothing reaches, and delete those whose grace time is over."""
    with session.open() as repo:
        report = repo.gc(grace=grace, lease=lease, dry_run=dry_run)
    if session.json:
        print_json(report)
        return
    shown = [("would free" if dry_run else "freed", human_bytes(report.nbytes_freed))]
    shown.append(
        ("deleted", f"{counted(len(report.deleted), 'pack')}, {len(report.cleared)} other objects")
    )
    condemned = f"{counted(len(report.condemned), 'pack')}, {human_bytes(report.nbytes_condemned)}"
    shown.append(("condemned", condemned))
    shown.append(("repacked", counted(len(report.repacked), "pack")))
    if report.crashed:
        shown.append(("crashed", f"{counted(len(report.crashed), 'save')} given up"))
    if report.unknown:
        shown.append(("unknown", f"{len(report.unknown)} objects left alone"))
    print_pairs(shown)
