"""`dcpstore completion`: what a shell offers when a line is completed with the Tab key.

Click completes commands and options; here are the refs, which a repository must be asked for. A
shell that completes a line never sees an error: without a repository nothing is offered.
"""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem, get_completion_class

from dcpstore.cli.session import Session
from dcpstore.errors import DcpstoreError

__all__ = ["complete_branches", "complete_refs", "complete_tags", "completion"]

_SHELLS = ("bash", "zsh", "fish")


def complete_refs(
    ctx: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return the tags and branches that begin like this."""
    return _refs(ctx, incomplete, kinds=("branch", "tag"))


def complete_tags(
    ctx: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return the tags that begin like this."""
    return _refs(ctx, incomplete, kinds=("tag",))


def complete_branches(
    ctx: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return the branches that begin like this."""
    return _refs(ctx, incomplete, kinds=("branch",))


def _refs(ctx: click.Context, incomplete: str, *, kinds: tuple[str, ...]) -> list[CompletionItem]:
    try:
        with ctx.ensure_object(Session).open() as repo:
            refs = [*repo.branches(), *repo.tags()]
    except (DcpstoreError, OSError, click.UsageError):  # a message would land in the line
        return []
    return [
        CompletionItem(ref.name, help=f"{ref.kind} of v{ref.version}")
        for ref in refs
        if ref.kind in kinds and ref.name.startswith(incomplete)
    ]


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that completes commands, options and refs with the Tab key.

    \b
    bash: eval "$(dcpstore completion bash)"       in ~/.bashrc (bash 4.4 or newer)
    zsh:  eval "$(dcpstore completion zsh)"        in ~/.zshrc, after compinit
    fish: dcpstore completion fish | source        in ~/.config/fish/config.fish
    """
    found = get_completion_class(shell)
    assert found is not None, "click has these three"
    group = ctx.find_root().command
    made = found(group, {}, "dcpstore", "_DCPSTORE_COMPLETE")
    click.echo(made.source_template % made.source_vars())
