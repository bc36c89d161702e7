"""`dcpstore import` and `dcpstore export`, which load torch when they run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from dcpstore.cli.completion import complete_branches, complete_refs
from dcpstore.cli.output import (
    print_json,
    visible,
)
from dcpstore.cli.session import Session, repo_options
from dcpstore.core.display import counted, human_bytes

__all__ = ["export", "import_"]

_DTYPE = click.option(
    "--dtype", metavar="DTYPE", help="Convert floating-point tensors, e.g. to bf16, fp16 or fp32."
)
_TENSORS_ONLY = click.option("--tensors-only", is_flag=True, help="Leave the values out.")
_PICKLE = click.option(
    "--allow-pickle",
    is_flag=True,
    help="Allow pickles, which can run any code; only if you trust their author.",
)


class _Path(click.Path):
    """A path that is not empty, as a shell variable that is not set would give."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        if not value:
            self.fail("the path is empty.", param, ctx)
        return super().convert(value, param, ctx)


def _as_renames(
    ctx: click.Context, param: click.Parameter, given: tuple[str, ...]
) -> dict[str, str] | None:
    """Return the new names by the old ones; None where none is given."""
    odd = [one for one in given if not all(one.partition("="))]
    if odd:
        raise click.BadParameter(f"{odd[0]!r} is not OLD=NEW, such as model.w=w.", ctx, param)
    return dict(one.split("=", 1) for one in given) or None


@click.command("import")
@click.argument("source", nargs=-1, required=True, type=_Path())
@click.option(
    "--branch",
    metavar="NAME",
    default="main",
    show_default=True,
    shell_complete=complete_branches,
    help="Branch to save to.",
)
@click.option("--tag", "tags", metavar="NAME", multiple=True, help="Tag the version (repeatable).")
@click.option("--step", type=int, help="Step of the version in the training run.")
@click.option("--message", "-m", default="", help="Message of the version.")
@_DTYPE
@_TENSORS_ONLY
@_PICKLE
@repo_options
def import_(
    session: Session,
    *,
    source: tuple[Path, ...],
    branch: str,
    tags: tuple[str, ...],
    step: int | None,
    message: str,
    dtype: str | None,
    tensors_only: bool,
    allow_pickle: bool,
) -> None:
    """Save a checkpoint of another format as a new version.

    SOURCE is a DCP folder, a file of torch.save, or safetensors files, their index or folder. The
    repository must exist; 'dcpstore init' makes one.
    """
    with session.open() as repo:
        from dcpstore.convert import import_any  # noqa: PLC0415 (loads torch)

        version = import_any(
            source,
            repo,
            branch=branch,
            tags=tags,
            step=step,
            message=message,
            dtype=dtype,
            tensors_only=tensors_only,
            allow_pickle=allow_pickle,
        )
    if session.json:
        print_json(version)
    else:
        sizes = f"{human_bytes(version.nbytes)}, {human_bytes(version.nbytes_reused)} reused"
        click.echo(f"imported {version} on branch {visible(version.branch)}: {sizes}")


@click.command()
@click.argument("ref", shell_complete=complete_refs)
@click.argument("dest", type=_Path())
@click.option(
    "--format",
    "form",
    type=click.Choice(("dcp", "torch", "safetensors", "zarr")),
    required=True,
    help="Format to write.",
)
@click.option(
    "--include",
    metavar="NAME",
    multiple=True,
    help="Export only this entry, all below it, or what a glob matches (repeatable).",
)
@click.option(
    "--exclude", metavar="NAME", multiple=True, help="Leave these entries out (repeatable)."
)
@click.option(
    "--strip-prefix",
    metavar="TEXT",
    default="",
    help="Remove this prefix from names, e.g. 'model.'.",
)
@click.option(
    "--rename",
    metavar="OLD=NEW",
    multiple=True,
    callback=_as_renames,
    help="Export an entry under another name (repeatable).",
)
@click.option(
    "--max-shard-size",
    metavar="SIZE",
    help="Largest size of a safetensors file in a folder, e.g. 500MB or 2GiB; default: 5GB.",
)
@_DTYPE
@_TENSORS_ONLY
@_PICKLE
@repo_options
def export(
    session: Session,
    *,
    ref: str,
    dest: Path,
    form: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    strip_prefix: str,
    rename: dict[str, str] | None,
    max_shard_size: str | None,
    dtype: str | None,
    tensors_only: bool,
    allow_pickle: bool,
) -> None:
    """Write the version REF in another format to DEST, which must be new."""
    if max_shard_size is not None and form != "safetensors":
        raise click.UsageError(f"--max-shard-size is for safetensors, not for {form}.")
    if allow_pickle and form not in ("dcp", "torch"):
        raise click.UsageError(f"--allow-pickle is for dcp and torch; {form} contains no pickles.")
    with session.open() as repo:
        from dcpstore import convert  # noqa: PLC0415 (loads torch)

        writers: dict[str, Callable[..., convert.Exported]] = {
            "dcp": partial(convert.export_dcp, allow_pickle=allow_pickle),
            "torch": partial(convert.export_torch, allow_pickle=allow_pickle),
            "safetensors": partial(
                convert.export_safetensors,
                max_shard_size="5GB" if max_shard_size is None else max_shard_size,
            ),
            "zarr": convert.export_zarr,
        }
        done = writers[form](
            repo,
            ref,
            dest,
            dtype=dtype,
            tensors_only=tensors_only,
            include=include or None,
            exclude=exclude,
            strip_prefix=strip_prefix,
            rename=rename,
        )
    if session.json:
        print_json(done)
    else:
        held = f"{counted(done.tensors, 'tensor')} and {counted(done.values, 'value')}"
        size = f"{human_bytes(done.nbytes)} in {counted(done.files, 'file')}"
        click.echo(f"exported {done.version} to {visible(done.path)}: {held}, {size}")
