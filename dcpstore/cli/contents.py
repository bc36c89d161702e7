"""`dcpstore show`, `ls` and `references`: one version, its entries, and where their chunks lie."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from dcpstore.cli.completion import complete_refs
from dcpstore.cli.output import (
    Column,
    human_age,
    human_time,
    note,
    print_json,
    print_pairs,
    print_table,
    visible,
)
from dcpstore.cli.session import Session, repo_options
from dcpstore.core.display import human_bytes, human_number
from dcpstore.formats.composition import (
    ComposedEntry,
    Entry,
    fold_entries,
    matching_entries,
    shape_text,
)
from dcpstore.formats.json_fields import value_tree
from dcpstore.records import EntryRecord, Version

__all__ = ["ls", "references", "show"]

_WILD = frozenset("*?[")  # a ref never contains one of these
_COLUMNS = (
    Column("FQN"),
    Column("KIND"),
    Column("DTYPE"),
    Column("SHAPE"),
    Column("BYTES OR VALUE", shrinks=True),
)
_LONG = (Column("CHUNKS", right=True), Column("CODEC"), Column("DIGEST"))


@click.command()
@click.argument("ref", required=False, shell_complete=complete_refs)
@repo_options
def show(session: Session, ref: str | None) -> None:
    """Show the version REF in detail; default: the tip of main."""
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
    age = f" ({human_age(version.created_at)})" if sys.stdout.isatty() else ""
    yield "when", human_time(version.created_at, zone=True) + age
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


@click.command()
@click.argument("args", nargs=-1, metavar="[REF] [GLOB]...", shell_complete=complete_refs)
@click.option("--long", "-l", is_flag=True, help="Add chunks, codec and content digest.")
@repo_options
def ls(session: Session, args: tuple[str, ...], long: bool) -> None:
    """List the entries of the version REF (default: the tip of main) whose FQN a GLOB matches.

    In a GLOB, * matches any characters, dots too, and ? matches one. A name also matches
    everything below it. A first argument with *, ? or [ is a GLOB, not a REF. A tensor that is made
    of other tensors is one entry, with its parts below it.
    """
    named = bool(args) and not _WILD & set(args[0])
    ref, globs = (args[0], args[1:]) if named else (None, args)
    with session.open() as repo:
        version = repo.show(ref)
        entries = repo.entries(version.number)
    chosen = _chosen(fold_entries(entries), globs, where=str(version))
    if session.json:
        print_json([_shape(entry) for entry in chosen])
    elif chosen:
        columns = (*_COLUMNS[:-1], *_LONG[:2], _COLUMNS[-1], _LONG[2]) if long else _COLUMNS
        print_table(columns, [row for entry in chosen for row in _rows(entry, long=long)])
    else:
        note(f"{version} holds no entries.")


@click.command()
@click.argument("ref", required=False, shell_complete=complete_refs)
@click.option(
    "--output",
    "-o",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write it to this file, not to standard output.",
)
@click.option("--data", metavar="PATH_OR_URL", help="Where its readers find the data folder.")
@repo_options
def references(session: Session, ref: str | None, output: Path | None, data: str | None) -> None:
    """Write the kerchunk reference of the version REF (default: the tip of main).

    Plain Zarr and fsspec read the version with it, without dcpstore. It is JSON, and right until
    'dcpstore gc' moves chunks.
    """
    with session.open() as repo:
        version = repo.show(ref)
        reference = json.dumps(repo.references(version, data=data))
    if output is None:
        click.echo(reference)
        return
    output.write_text(reference)
    if session.json:
        print_json({"version": version.number, "path": str(output), "nbytes": len(reference)})
    else:
        size = human_bytes(len(reference))
        click.echo(f"wrote the reference of {version} to {visible(str(output))}: {size}")


def _chosen(entries: Sequence[Entry], globs: Sequence[str], *, where: str) -> list[Entry]:
    """Return the entries that match any glob; each glob must match one, as in a shell's ls."""
    found = {one.fqn for glob in globs for one in matching_entries(entries, glob, where=where)}
    return [one for one in entries if not globs or one.fqn in found]


def _shape(entry: Entry) -> dict[str, object]:
    """Return the fields of an entry, its value as JSON instead of JSON in a text."""
    if isinstance(entry, ComposedEntry):
        return {
            "fqn": entry.fqn,
            "path": entry.path,
            "kind": entry.composition.kind,
            "tensor": None,
            "value": entry.composition.to_json(),
            "nbytes": entry.nbytes,
            "parts": {entry.part_name(part): _shape(part) for part in entry.parts},
        }
    return {
        "fqn": entry.fqn,
        "path": entry.path,
        "kind": entry.kind,
        "tensor": entry.tensor,
        "value": None if entry.value is None else value_tree(entry.fqn, entry.value),
    }


def _rows(entry: Entry, *, long: bool) -> list[tuple[str, ...]]:
    """Return the row of an entry; below a composed tensor those of its parts."""
    if not isinstance(entry, ComposedEntry):
        return [_row(entry, long=long)]
    is_a = entry.composition
    head = (entry.fqn, is_a.kind, is_a.dtype, shape_text(is_a.shape), *(("", "") if long else ()))
    rows = [(*head, human_bytes(entry.nbytes), *(("",) if long else ()))]
    for part in entry.parts:
        _, *rest = _row(part, long=long)
        rows.append((f"  {entry.part_name(part)}", *rest))
    return rows


def _row(entry: EntryRecord, *, long: bool) -> tuple[str, ...]:
    tensor = entry.tensor
    if tensor is None:
        start, end, extra = ("", ""), entry.value or "", ("", "", "")
    else:
        start, end = (tensor.dtype, shape_text(tensor.shape)), human_bytes(tensor.nbytes)
        extra = (str(sum(part.size for part in tensor.parts)), tensor.codec, tensor.digest)
    if not long:
        return (entry.fqn, entry.kind, *start, end)
    return (entry.fqn, entry.kind, *start, *extra[:2], end, extra[2])
