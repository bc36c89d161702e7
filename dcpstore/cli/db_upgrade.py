"""`dcpstore db-upgrade`: bring the catalog of an older dcpstore to the tables of this one."""

from __future__ import annotations

import click

from dcpstore.catalog import Catalog
from dcpstore.cli.output import print_json
from dcpstore.cli.session import Session, looking_for_repository, repo_options
from dcpstore.places import locate

__all__ = ["db_upgrade"]


@click.command("db-upgrade")
@repo_options
def db_upgrade(session: Session) -> None:
    """Upgrade the catalog to the schema of this dcpstore; back it up first."""
    # Not by opening the repository: an older one does not open.
    url, _ = locate(session.target)
    with looking_for_repository():
        before, after = Catalog.upgrade(url)
    if session.json:
        print_json({"before": before, "after": after})
    elif before == after:
        click.echo(f"the schema is {after} already")
    else:
        click.echo(f"upgraded the schema {before} -> {after}")
