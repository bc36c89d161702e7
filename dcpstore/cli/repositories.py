"""The commands about whole repositories: made, upgraded, restored and copied."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import get_args

import click

from dcpstore.cli.output import (
    note,
    print_json,
    visible,
)
from dcpstore.cli.session import (
    DAMAGE,
    NoRepositoryError,
    Session,
    json_option,
    looking_for_repository,
    open_existing,
    repo_options,
)
from dcpstore.core.display import counted, human_bytes, human_duration
from dcpstore.errors import AlreadyExistsError
from dcpstore.records import ChunkDefaults, CodecSetting, UpgradePlan
from dcpstore.storage.urls import OBJECT_STORES

__all__ = ["copy", "db_upgrade", "init", "rebuild"]

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
    if target.startswith(tuple(f"{scheme}://" for scheme in OBJECT_STORES)):
        raise click.UsageError(
            "an object store holds the chunks, and the catalog is in a folder or a database: "
            "'dcpstore init PATH_OR_URL --data URL'."
        )
    _refuse_existing(target)
    if data is None and "://" in target:
        raise click.UsageError("a repository by URL needs --data, the place of its chunks.")
    chunk = ChunkDefaults(nbytes=chunk_mib * _MIB, codec=codec)
    from dcpstore import repository  # noqa: PLC0415 (loads SQLAlchemy)

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
        with open_existing(target) as existing:
            uid = existing.about.uid
    except NoRepositoryError:
        return
    where = "the database" if "://" in target else repr(target)  # a URL may hold a password
    raise AlreadyExistsError(
        f"{where} is already a repository ({uid}). Use it as it is, or give another place."
    )


@click.command("db-upgrade")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Change nothing; print what would be converted, and about how long it takes.",
)
@repo_options
def db_upgrade(session: Session, dry_run: bool) -> None:
    """Upgrade the catalog to the schema of this dcpstore; back it up first.

    It may be interrupted: until it has ended, the older dcpstore can use the catalog, and the next
    'db-upgrade' goes on where this one was.
    """
    from dcpstore.catalog.location import locate  # noqa: PLC0415 (loads SQLAlchemy)
    from dcpstore.catalog.schema.lifecycle import plan_upgrade, upgrade_schema  # noqa: PLC0415

    # Without opening the repository, for an older one does not open.
    url, _ = locate(session.target)
    with looking_for_repository():
        plan = plan_upgrade(url) if dry_run else UpgradePlan(*upgrade_schema(url))
    if session.json:
        print_json(plan if dry_run else {"before": plan.before, "after": plan.after})
    elif plan.before == plan.after:
        click.echo(f"the schema is {plan.after} already")
    elif dry_run:
        _show_plan(plan)
    else:
        click.echo(f"upgraded the schema {plan.before} -> {plan.after}")


def _show_plan(plan: UpgradePlan) -> None:
    click.echo(f"would upgrade the schema {plan.before} -> {plan.after}")
    click.echo(
        f"to convert: {counted(plan.versions, 'version')}, {plan.entries} entries, "
        f"{counted(plan.tensors, 'tensor')}, {counted(plan.chunks, 'chunk')}"
    )
    duration = human_duration(timedelta(seconds=math.ceil(plan.seconds)))
    click.echo(
        f"makes about {counted(plan.rows, 'row')}, {human_bytes(plan.nbytes)}; takes about "
        f"{duration}, estimated from the newest versions"
    )


@click.command()
@click.argument("data", metavar="DATA")
@click.option(
    "--into",
    required=True,
    metavar="PATH_OR_URL",
    help="Where to create the catalog: a folder, or an empty database.",
)
@json_option
@click.pass_context
def rebuild(ctx: click.Context, session: Session, data: str, into: str) -> None:
    """Make a new catalog for the data folder DATA of a repository whose catalog is lost.

    Exits with 3 if something in the folder is damaged, after restoring the rest.
    """
    from dcpstore.maintenance.rebuild import rebuild as rebuild_catalog  # noqa: PLC0415 (SQLAlchemy)

    with looking_for_repository():
        report = rebuild_catalog(data, into)
    if session.json:
        print_json(report)
    else:
        for problem in report.problems:
            note(visible(problem))
        for uid in report.unfinished:
            note(f"manifest of {visible(uid)}: no finished operation created it; skipped")
        if report.lost:
            note(f"lost versions: {', '.join(f'v{number}' for number in report.lost)}")
        if report.moved_refs:
            note(f"refs that named them: {visible(', '.join(report.moved_refs))}")
        count = counted(len(report.versions), "version")
        click.echo(f"rebuilt {count} from {counted(report.operations, 'operation')}")
    if report.problems or report.lost:
        ctx.exit(DAMAGE)


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.argument("refs", nargs=-1)
@json_option
def copy(session: Session, source: str, target: str, refs: tuple[str, ...]) -> None:
    """Copy the versions REFS (default: all, with every tag and branch) from SRC to DST.

    DST must be a repository; 'dcpstore init' makes one. Chunks that it holds are not written again.
    """
    with open_existing(source) as here, open_existing(target) as there:
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
        note(
            f"refs that are something else there, not changed: {left}; to name the copies, use "
            "'dcpstore branch NEW --at vN --repo DST' or 'dcpstore tag NEW vN --repo DST'"
        )
    written = human_bytes(report.nbytes_written)
    click.echo(f"copied {counted(len(report.copied), 'version')}, {written} written")
