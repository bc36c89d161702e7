"""The commands that create or upgrade a catalog: init and db-upgrade."""

from __future__ import annotations

from typing import get_args

import click

from dcpstore import repository
from dcpstore.catalog.location import locate
from dcpstore.catalog.schema.lifecycle import upgrade_schema
from dcpstore.cli.output import human_bytes, print_json, visible
from dcpstore.cli.session import Session, json_option, looking_for_repository, repo_options
from dcpstore.errors import AlreadyExistsError, NotFoundError
from dcpstore.records import ChunkDefaults, CodecSetting

__all__ = ["db_upgrade", "init"]

_DEFAULTS = ChunkDefaults()
_MIB = 1024 * 1024


@click.command()
@click.argument("target", metavar="PATH_OR_URL")
@click.option(
    "--data",
    metavar="PATH_OR_URL",
    help="Where the chunks are stored; default: beside the catalog, if that is in a folder.",
)
@click.option(
    "--chunk-mib",
    type=click.IntRange(1, 1024),
    default=_DEFAULTS.nbytes // _MIB,
    show_default=True,
    help="About how large a chunk is, in MiB.",
)
@click.option(
    "--codec",
    type=click.Choice(get_args(CodecSetting)),
    default=_DEFAULTS.codec,
    show_default=True,
    help="How chunks are encoded; auto chooses by dtype.",
)
@json_option
def init(session: Session, target: str, data: str | None, chunk_mib: int, codec: str) -> None:
    """Make a new repository in a folder, or in the database of a URL."""
    _refuse_existing(target)
    if data is None and "://" in target:
        raise click.UsageError("a repository by URL needs --data, the place of its chunks.")
    chunk = ChunkDefaults(nbytes=chunk_mib * _MIB, codec=codec)
    with looking_for_repository(), repository.make(target, data=data, chunk=chunk) as made:
        about = made.about
        place = made.storage.url
    if session.json:
        print_json(about)
    else:
        size = human_bytes(about.chunk.nbytes)
        click.echo(f"made repository {about.uid}")
        click.echo(f"data in {visible(place)}; chunks of {size}, codec {about.chunk.codec}")


def _refuse_existing(target: str) -> None:
    try:
        with repository.open(target, create=False) as existing:
            uid = existing.about.uid
    except NotFoundError:
        return
    where = "the database" if "://" in target else repr(target)  # a URL may hold a password
    raise AlreadyExistsError(
        f"{where} is already a repository ({uid}). Use it as it is, or give another place."
    )


@click.command("db-upgrade")
@repo_options
def db_upgrade(session: Session) -> None:
    """Upgrade the catalog to the schema of this dcpstore; back it up first."""
    # Without opening the repository, for an older one does not open.
    url, _ = locate(session.target)
    with looking_for_repository():
        before, after = upgrade_schema(url)
    if session.json:
        print_json({"before": before, "after": after})
    elif before == after:
        click.echo(f"the schema is {after} already")
    else:
        click.echo(f"upgraded the schema {before} -> {after}")
