"""What is measured and noted of versions: the best one by a metric, metrics and labels to add."""

from __future__ import annotations

from collections.abc import Sequence

import click

from dcpstore.cli.completion import complete_branches, complete_refs
from dcpstore.cli.output import (
    print_json,
    visible,
)
from dcpstore.cli.session import Session, repo_options
from dcpstore.core.display import human_metrics, human_number

__all__ = ["best", "label", "metric", "named_texts"]


@click.command()
@click.argument("metric")
@click.option("--max", "largest", is_flag=True, help="The largest value is the best.")
@click.option(
    "--branch",
    metavar="NAME",
    shell_complete=complete_branches,
    help="Only versions saved to this branch.",
)
@repo_options
def best(session: Session, metric: str, largest: bool, branch: str | None) -> None:
    """Show the version with the smallest value of METRIC, or with --max the largest.

    Of equal values the earliest version wins; NaN is ignored.
    """
    with session.open() as repo:
        version = repo.best(metric, mode="max" if largest else "min", branch=branch)
    if session.json:
        print_json(version)
    else:
        step = "" if version.step is None else f", step {version.step}"
        value = human_number(version.metrics[metric])
        click.echo(f"{version} (branch {visible(version.branch)}{step}): {visible(metric)} {value}")


@click.command()
@click.argument("ref", shell_complete=complete_refs)
@click.argument("pairs", metavar="NAME=NUMBER...", nargs=-1, required=True)
@repo_options
def metric(session: Session, ref: str, pairs: tuple[str, ...]) -> None:
    """Add metrics to the version REF, such as those of a later evaluation.

    A metric that is there with another value is not changed (exit code 11). 'undo' removes what
    was added.
    """
    values: dict[str, float] = {}
    for name, text in named_texts(pairs, form="NAME=NUMBER", hint="NAME=NUMBER...").items():
        try:
            values[name] = float(text)
        except ValueError as error:
            raise click.BadParameter(
                f"{text!r} is not a number, for the metric {name!r}.", param_hint="'NAME=NUMBER...'"
            ) from error
    with session.open() as repo:
        version = repo.add_metrics(ref, values)
    if session.json:
        print_json(version)
    else:
        click.echo(f"{version} has the metrics {visible(human_metrics(version.metrics))}")


@click.command()
@click.argument("ref", shell_complete=complete_refs)
@click.argument("pairs", metavar="NAME=TEXT...", nargs=-1, required=True)
@repo_options
def label(session: Session, ref: str, pairs: tuple[str, ...]) -> None:
    """Add labels to the version REF.

    A label that is there with another text is not changed (exit code 11). 'undo' removes what was
    added.
    """
    texts = named_texts(pairs, form="NAME=TEXT", hint="NAME=TEXT...")
    with session.open() as repo:
        version = repo.add_labels(ref, texts)
    if session.json:
        print_json(version)
    else:
        shown = ", ".join(f"{name}={text}" for name, text in version.labels.items())
        click.echo(f"{version} has the labels {visible(shown)}")


def named_texts(pairs: Sequence[str], *, form: str, hint: str) -> dict[str, str]:
    """Return the texts of arguments such as `lr=3e-4`, by name; each name has one text."""
    texts: dict[str, str] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise click.BadParameter(f"{pair!r} is not {form}.", param_hint=f"'{hint}'")
        if texts.setdefault(name, text) != text:
            raise click.BadParameter(
                f"{name!r} is given with two different texts.", param_hint=f"'{hint}'"
            )
    return texts
