"""`dcpstore expire` and `dcpstore forget`: let versions go, by rules or by name."""

from __future__ import annotations

import re
from datetime import datetime

import click

from dcpstore.cli.output import Column, counted, human_time, print_json, print_table, visible
from dcpstore.cli.session import Session, repo_options
from dcpstore.retention import Best, Verdict

__all__ = ["expire", "forget"]

_COLUMNS = (
    Column("VERSION"),
    Column("BRANCH", shrinks=True),
    Column("STEP", right=True),
    Column("WHEN"),
    Column("KEPT BY", shrinks=True),
)


@click.command()
@click.option("--keep-last", type=click.IntRange(1), metavar="N", help="The N newest of a branch.")
@click.option(
    "--keep-every", type=click.IntRange(1), metavar="N", help="Those whose step is a multiple of N."
)
@click.option(
    "--keep-best",
    metavar="METRIC:N[:max]",
    help="The N with the smallest METRIC, or with max the largest.",
)
@click.option("--keep-tagged", is_flag=True, help="No other rule: what is tagged stays anyway.")
@click.option(
    "--keep-since", metavar="SPAN_OR_TIME", help="Those of the last SPAN (7d, 24h), or since TIME."
)
@click.option("--branch", help="Look only at versions that were saved to this branch.")
@click.option("--dry-run", is_flag=True, help="Change nothing, and say what would expire.")
@click.option("--explain", is_flag=True, help="List every version with what keeps it.")
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

    Branch tips, tagged versions and the newest version always stay.
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
    what = counted(len(report.expired), "version")
    click.echo(f"{what} would expire" if dry_run else f"{what} expired")


@click.command()
@click.argument("refs", metavar="REF...", nargs=-1, required=True)
@click.option("--force", is_flag=True, help="Tagged versions too; their tags are deleted.")
@click.option("--dry-run", is_flag=True, help="Change nothing, and say what would be forgotten.")
@repo_options
def forget(session: Session, refs: tuple[str, ...], force: bool, dry_run: bool) -> None:
    """Forget the versions REF..., all or none; gc then frees their bytes.

    Until then 'undo' brings them back. A branch whose tip is forgotten moves back to the nearest
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
    """Return a time, where the text is one; a span is left to the repository."""
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
        ", ".join(verdict.kept_by) or "nothing: it goes",
    )


def _shape(verdict: Verdict) -> dict[str, object]:
    return {
        "version": verdict.version.number,
        "uid": verdict.version.uid,
        "expired": not verdict.kept_by,
        "kept_by": verdict.kept_by,
    }
