"""`dcpstore verify`: is everything intact; exit code 3 if not."""

from __future__ import annotations

from collections.abc import Iterator

import click

from dcpstore.cli.failures import DAMAGE
from dcpstore.cli.output import counted, human_bytes, print_json, visible
from dcpstore.cli.session import Session, repo_options
from dcpstore.upkeep.verify import Damage, VerifyReport

__all__ = ["verify"]

_MIB = 1024 * 1024
_SHOWN = 5  # FQNs and chunks of one damage that are listed


@click.command()
@click.option("--deep", is_flag=True, help="Read every chunk and check its digest.")
@click.option("--resume", is_flag=True, help="Go on with a --deep that was broken off.")
@click.option(
    "--limit-mib",
    type=click.FloatRange(min=0, min_open=True),
    metavar="N",
    help="Read at most N MiB a second.",
)
@repo_options
@click.pass_context
def verify(
    ctx: click.Context, session: Session, deep: bool, resume: bool, limit_mib: float | None
) -> None:
    """Look for damage, and say which versions it touches; exit with 3 if there is any."""
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
        yield f"  versions: {_some([f'v{number}' for number in damage.versions])}"
    if damage.fqns:
        yield f"  entries: {_some(damage.fqns)}"
    for chunk in damage.chunks[:_SHOWN]:
        yield (
            f"  chunk {chunk.ordinal} of part {chunk.part} at {chunk.offset}, length "
            f"{chunk.length}: {chunk.reason}"
        )
    if len(damage.chunks) > _SHOWN:
        yield f"  and {len(damage.chunks) - _SHOWN} more chunks"


def _some(names: tuple[str, ...] | list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
