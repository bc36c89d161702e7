"""`dcpstore show`: all that is known of one version, its entries aside."""

from __future__ import annotations

from collections.abc import Iterator

import click

from dcpstore.cli.output import (
    human_bytes,
    human_number,
    human_time,
    print_json,
    print_pairs,
    visible,
)
from dcpstore.cli.session import Session, repo_options
from dcpstore.records import Version

__all__ = ["show"]


@click.command()
@click.argument("ref", required=False)
@repo_options
def show(session: Session, ref: str | None) -> None:
    """Tell all about the version REF; default: the tip of main."""
    with session.open() as repo:
        version = repo.show(ref)
    if session.json:
        print_json(version)
    else:
        print_pairs(_pairs(version))


def _pairs(version: Version) -> Iterator[tuple[str, str]]:
    yield "version", str(version)
    yield "uid", version.uid
    yield "parent", "-" if version.parent is None else f"v{version.parent}"
    yield "branch", version.branch
    yield "step", "-" if version.step is None else str(version.step)
    yield "tags", ", ".join(version.tags) or "-"
    yield "when", human_time(version.created_at, zone=True)
    yield "author", visible(version.author) or "-"
    yield "ranks", str(version.ranks)
    yield (
        "bytes",
        f"{human_bytes(version.nbytes)} in all, {human_bytes(version.nbytes_reused)} of them "
        f"reused; {human_bytes(version.nbytes_written)} written",
    )
    seconds = [f"{phase} {value:.2f}" for phase, value in version.seconds.items()]
    yield "seconds", ", ".join(map(visible, seconds)) or "-"
    metrics = [f"{visible(name)} {human_number(value)}" for name, value in version.metrics.items()]
    yield "metrics", "\n".join(metrics) or "-"
    labels = [f"{visible(name)} {visible(value)}" for name, value in version.labels.items()]
    yield "labels", "\n".join(labels) or "-"
    yield "message", version.message or "-"
