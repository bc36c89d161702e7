"""The commands that keep a repository in order: expire, forget, gc and verify."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING

import click

from dcpstore.cli.completion import complete_branches, complete_refs
from dcpstore.cli.output import (
    Column,
    human_age,
    human_time,
    print_json,
    print_pairs,
    print_table,
    visible,
)
from dcpstore.cli.session import DAMAGE, Session, WholeNumber, repo_options
from dcpstore.core.display import counted, human_bytes, some_of
from dcpstore.core.durations import as_duration

if TYPE_CHECKING:
    from dcpstore.catalog.maintenance.retention import Best, Verdict
    from dcpstore.maintenance.verify import Damage, VerifyReport

__all__ = ["expire", "forget", "gc", "verify"]

_MIB = 1024 * 1024
_NAMED = 20  # versions that one line names
_SHOWN = 5  # FQNs and chunks of one damage that are listed

_TITLES = ("freed", "deleted", "condemned", "repacked")
_DRY_TITLES = ("would free", "would delete", "would condemn", "would repack")
_COLUMNS = (
    Column("VERSION", colour="yellow"),
    Column("BRANCH", shrinks=True, colour="cyan"),
    Column("STEP", right=True),
    Column("WHEN"),
    Column("AGE", extra=True, terminal=True),
    Column("KEPT BY", shrinks=True),
)


@click.command()
@click.option(
    "--keep-last",
    type=WholeNumber(1),
    metavar="N",
    help="Keep the N newest versions of each branch.",
)
@click.option(
    "--keep-every",
    type=WholeNumber(1),
    metavar="N",
    help="Keep versions whose step is a multiple of N.",
)
@click.option(
    "--keep-best",
    metavar="METRIC:N[:max]",
    help="Keep the N versions with the smallest METRIC, or with max the largest.",
)
@click.option(
    "--keep-tagged",
    is_flag=True,
    help="The rule to give if tags alone decide; tips and the newest version stay too.",
)
@click.option(
    "--keep-since",
    metavar="SPAN_OR_TIME",
    help="Keep versions of the last SPAN (7d, 24h), or since TIME.",
)
@click.option(
    "--branch",
    metavar="NAME",
    shell_complete=complete_branches,
    help="Apply the rules to versions saved to this branch; all others stay.",
)
@click.option("--dry-run", is_flag=True, help="Change nothing; print what would expire.")
@click.option(
    "--explain",
    is_flag=True,
    help="Also list every version with what keeps it; versions expire too, unless --dry-run is "
    "given.",
)
@repo_options
def expire(
    session: Session,
    *,
    keep_last: int | None,
    keep_every: int | None,
    keep_best: str | None,
    keep_tagged: bool,
    keep_since: str | None,
    branch: str | None,
    dry_run: bool,
    explain: bool,
) -> None:
    """Forget the versions that no rule keeps; gc then frees their bytes.

    Unlike 'forget', this cannot be undone. Branch tips, tagged versions and the newest version
    always stay.
    """
    with session.open() as repo:
        report = repo.expire(
            keep_last=keep_last,
            keep_every=keep_every,
            keep_best=None if keep_best is None else _best(keep_best),
            keep_tagged=keep_tagged,
            keep_since=None if keep_since is None else _since(keep_since),
            branch=branch,
            dry_run=dry_run,
        )
        if session.json:
            print_json([_shape(verdict) for verdict in report.verdicts])
            return
        if explain and report.verdicts:
            print_table(_COLUMNS, map(_row, report.verdicts))
        going = [f"v{number}" for number in report.expired]
        which = some_of(going, _NAMED) or "0 versions"
        if dry_run or not going:
            click.echo(f"{which} would expire" if dry_run else f"{which} expired")
        else:
            whose = "its" if len(going) == 1 else "their"
            click.echo(f"{which} expired; 'dcpstore gc' frees {whose} bytes")


@click.command()
@click.argument("refs", metavar="REF...", nargs=-1, required=True, shell_complete=complete_refs)
@click.option("--force", is_flag=True, help="Also forget tagged versions, and delete their tags.")
@click.option("--dry-run", is_flag=True, help="Change nothing; print what would be forgotten.")
@repo_options
def forget(session: Session, refs: tuple[str, ...], force: bool, dry_run: bool) -> None:
    """Forget the versions REF..., all or none; gc then frees their bytes.

    Until then 'undo' restores them. A branch whose tip is forgotten moves back to the nearest
    ancestor that stays.
    """
    with session.open() as repo:
        report = repo.forget(refs, force=force, dry_run=dry_run)
    if session.json:
        print_json(report)
        return
    would = "would be " if dry_run else ""
    for version in report.versions:
        click.echo(f"{version} {would or 'is '}forgotten")
    for ref in report.deleted:
        click.echo(f"{ref.kind} {visible(ref.name)} {would or 'is '}deleted; it was v{ref.version}")
    for ref in report.moved:
        click.echo(f"{ref.kind} {visible(ref.name)} {would or 'is '}v{ref.version}")


def _best(text: str) -> Best:
    parts = text.rsplit(":", 2)
    if len(parts) > 1 and parts[-1] in ("min", "max"):
        *name, count, mode = parts
    else:
        *name, count = text.rsplit(":", 1)
        mode = "min"
    if not name or not re.fullmatch("[0-9]{1,18}", count):
        raise click.BadParameter(
            f"{text!r} is not METRIC:N or METRIC:N:max.", param_hint="--keep-best"
        )
    return ":".join(name), int(count), mode


def _since(text: str) -> datetime | str:
    """Return a time if the text is one; else the text, as a span for the repository to parse."""
    try:
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        return text


def _row(verdict: Verdict) -> tuple[str, ...]:
    version = verdict.version
    return (
        str(version),
        version.branch,
        "-" if version.step is None else str(version.step),
        human_time(version.created_at),
        human_age(version.created_at),
        ", ".join(verdict.kept_by) or "nothing: it expires",
    )


def _shape(verdict: Verdict) -> dict[str, object]:
    return {
        "version": verdict.version.number,
        "uid": verdict.version.uid,
        "expired": not verdict.kept_by,
        "kept_by": verdict.kept_by,
    }


@click.command()
@click.option(
    "--grace",
    default="24h",
    show_default=True,
    help="How long condemned packs stay readable, such as 30m, 24h or 7d. With 0s they are deleted "
    "at once: a reader that still needs one fails.",
)
@click.option(
    "--lease",
    default="1h",
    show_default=True,
    help="How long a save without a report counts as running, such as 30m, 24h or 7d. With 0s "
    "every running save is given up, and fails.",
)
@click.option("--dry-run", is_flag=True, help="Change nothing; print what would be freed.")
@repo_options
def gc(session: Session, grace: str, lease: str, dry_run: bool) -> None:
    """Condemn packs that no version needs, and delete those whose grace time is over."""
    with session.open() as repo:
        report = repo.gc(grace=grace, lease=lease, dry_run=dry_run)
    if session.json:
        print_json(report)
        return
    others = counted(len(report.cleared), "other object")
    condemned = f"{counted(len(report.condemned), 'pack')}, {human_bytes(report.nbytes_condemned)}"
    freed, deleted, named, repacked = _DRY_TITLES if dry_run else _TITLES
    shown = [
        (freed, human_bytes(report.nbytes_freed)),
        (deleted, f"{counted(len(report.deleted), 'pack')}, {others}"),
        (named, condemned),
        (repacked, counted(len(report.repacked), "pack")),
    ]
    if report.crashed:
        saves = counted(len(report.crashed), "save")
        shown.append(("crashed", f"{saves} would be given up" if dry_run else f"{saves} given up"))
    if report.unknown:
        shown.append(("unknown", f"{counted(len(report.unknown), 'object')} not changed"))
    print_pairs(shown)
    if as_duration(grace, what="grace"):  # without a grace time they are deleted already
        click.echo(f"condemned packs are deleted by a gc after their grace time ({grace.strip()})")


@click.command()
@click.option("--deep", is_flag=True, help="Read every chunk and check its digest.")
@click.option("--resume", is_flag=True, help="Continue a --deep that was interrupted.")
@click.option(
    "--limit-mib",
    type=click.FloatRange(min=0, min_open=True),
    metavar="N",
    help="Read at most N MiB per second.",
)
@repo_options
@click.pass_context
def verify(
    ctx: click.Context, session: Session, deep: bool, resume: bool, limit_mib: float | None
) -> None:
    """Check for damage, and list the versions that it affects; exits with 3 if there is any."""
    with session.open() as repo:
        limit = None if limit_mib is None else limit_mib * _MIB
        report = repo.verify(deep=deep, resume=resume, limit=limit)
    if session.json:
        print_json(report)
    else:
        for line in _lines(report):
            click.echo(visible(line))
    if report.damaged:
        ctx.exit(DAMAGE)


def _lines(report: VerifyReport) -> Iterator[str]:
    for damage in report.damaged:
        yield from _described(damage)
    for hurt in report.versions:
        nearest = "none is intact"
        if hurt.nearest_intact is not None:
            nearest = f"the nearest intact version is v{hurt.nearest_intact}"
        yield f"v{hurt.version} is damaged; {nearest}"
    read = (
        f", {counted(report.chunks, 'chunk')} ({human_bytes(report.nbytes_read)})"
        if report.deep
        else ""
    )
    found = f"{len(report.damaged)} damaged" if report.damaged else "all intact"
    yield f"{counted(report.packs, 'pack')}, {counted(report.manifests, 'manifest')}{read}: {found}"


def _described(damage: Damage) -> Iterator[str]:
    where = "" if damage.kind == "catalog" else f" {damage.key}"
    yield f"{damage.kind}{where}: {damage.reason}"
    if damage.versions:
        yield f"  versions: {some_of([f'v{number}' for number in damage.versions], _SHOWN)}"
    if damage.fqns:
        yield f"  entries: {some_of(damage.fqns, _SHOWN)}"
    for chunk in damage.chunks[:_SHOWN]:
        yield (
            f"  chunk {chunk.ordinal} of part {chunk.part} at {chunk.offset}, length "
            f"{chunk.length}: {chunk.reason}"
        )
    if len(damage.chunks) > _SHOWN:
        yield f"  and {counted(len(damage.chunks) - _SHOWN, 'more chunk')}"
