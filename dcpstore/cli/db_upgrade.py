"""`dcpstore db-upgrade`: bring the catalog of an older dcpstore to the tables of this one."""

from __future__ import annotations

from pathlib import Path

import click

from dcpstore.catalog import Catalog, sqlite_url
from dcpstore.cli.output import print_json
from dcpstore.cli.session import Session, looking_for_repository, repo_options

__all__ = ["db_upgrade"]


@click.command("db-upgrade")
@repo_options
def db_upgrade(session: Session) -> None:
    """Upgrade the catalog to the schema of this dcpstore; back it up first."""
    target = session.target
    # Not by opening the repository: an older one does not open.
    url = target if "://" in target else sqlite_url(Path(target).absolute() / "catalog.db")
    with looking_for_repository():
        before, after = Catalog.upgrade(url)
    if session.json:
        print_json({"before": before, "after": after})
    elif before == after:
        click.echo(f"the schema is {after} already")
    else:
        click.echo(f"upgraded the schema {before} -> {after}")
