"""The commands by name, and how any of them ends.

A command's module is loaded when the command is used, so that slow imports of one command do not
slow down the others. Only this module prints errors and chooses exit codes.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from io import TextIOWrapper
from keyword import iskeyword
from typing import Literal, NoReturn, TextIO

import click

from dcpstore.cli import INTERRUPTED
from dcpstore.cli.session import BROKEN_PIPE, Session, color_option, exit_code, report, report_json
from dcpstore.errors import DcpstoreError, NotFoundError

__all__ = ["commands", "run"]

# Module and one line of help of each command, in the order of the help, which loads none of them.
_COMMANDS = {
    "init": ("repositories", "Make a new repository."),
    "log": ("log", "List versions, newest first."),
    "status": ("status", "List the saves that are running, with their progress."),
    "show": ("contents", "Show one version in detail."),
    "ls": ("contents", "List the entries of a version."),
    "best": ("metrics", "Show the version with the best value of a metric."),
    "diff": ("diff", "Show what changed between two versions."),
    "tag": ("refs", "List, set, move or delete tags."),
    "branch": ("refs", "List, create or delete branches."),
    "metric": ("metrics", "Add metrics to a version."),
    "label": ("metrics", "Add labels to a version."),
    "rollback": ("refs", "Move a branch back to an earlier version."),
    "undo": ("refs", "Revert the last operation."),
    "ops": ("refs", "List the operations on the repository, newest first."),
    "sql": ("sql", "Run a read-only SQL query on the catalog."),
    "doctor": ("doctor", "Check the installation and a repository."),
    "db-upgrade": ("repositories", "Upgrade the catalog to this dcpstore's schema."),
    "import": ("bridges", "Save a checkpoint of another format as a new version."),
    "export": ("bridges", "Write a version in another format."),
    "references": ("contents", "Write the reference by which plain Zarr reads a version."),
    "expire": ("maintain", "Forget the versions that no retention rule keeps."),
    "forget": ("maintain", "Forget the named versions."),
    "gc": ("maintain", "Free the packs that no version needs."),
    "verify": ("maintain", "Check the repository for damage."),
    "rebuild": ("repositories", "Make a new catalog from a data folder."),
    "copy": ("repositories", "Copy versions to another repository."),
    "completion": ("completion", "Print the script that completes commands in a shell."),
}


_AS_JSON = "dcpstore.as_json"  # whether the arguments have --json


class _Commands(click.Group):
    """The group of all commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, in the order of the table."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load one command."""
        if cmd_name not in _COMMANDS:
            return None
        module = import_module(f"dcpstore.cli.{_COMMANDS[cmd_name][0]}")
        name = cmd_name.replace("-", "_")
        command = getattr(module, f"{name}_" if iskeyword(name) else name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands; click's own would load each of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command; the error for an unknown one names those that are spelled like it."""
        name = args[0]
        close = [] if name in _COMMANDS else NotFoundError.nearest(name, _COMMANDS, cutoff=0.6)
        if close:
            ctx.fail(f"no command {name!r}. Did you mean {' or '.join(map(repr, close))}?")
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the options before the command; what completes a line has a session from here."""
        if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
            ctx.color = False  # --color is read after this, so it can say otherwise
        options = args[: args.index("--")] if "--" in args else args
        ctx.meta[_AS_JSON] = "--json" in options  # a wrong option is an error before it is read
        try:
            rest = super().parse_args(ctx, args)
        except click.UsageError as error:
            _end_usage(ctx, error)
        ctx.obj = Session(repo=ctx.params["repo"])
        return rest

    def invoke(self, ctx: click.Context) -> object:
        """Run a command; every failure becomes a message and an exit code here."""
        session = ctx.ensure_object(Session)
        try:
            result: object = super().invoke(ctx)
            sys.stdout.flush()  # here, where a closed pipe still ends the command quietly
            return result
        except BrokenPipeError:
            _leave_pipe(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except click.UsageError as error:
            _end_usage(ctx, error)
        except (DcpstoreError, OSError) as error:
            report(error, as_json=session.json)
            ctx.exit(exit_code(error))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--repo",
    "-r",
    metavar="PATH_OR_URL",
    envvar="DCPSTORE_REPO",
    show_envvar=True,
    help="The repository; every command that opens one also has this option.",
)
@color_option
@click.version_option(package_name="dcpstore", message="dcpstore %(version)s")
def commands(repo: str | None) -> None:
    """Look at and change a repository of model checkpoints.

    A REF is a version (12 or v12), a tag, a branch, main~3 or main@step=1000.
    """


def _end_usage(ctx: click.Context, error: click.UsageError) -> NoReturn:
    """End a command that was used wrongly; with --json the last line of the message is JSON."""
    if not ctx.meta[_AS_JSON] or isinstance(error, click.exceptions.NoArgsIsHelpError):
        raise error
    error.show()
    report_json("usage", error.format_message())
    ctx.exit(error.exit_code)


def run() -> None:
    """Run the command that the process was given, and exit with its code."""
    sys.stdin = _ready(sys.stdin, "r", "surrogateescape")
    sys.stdout = _ready(sys.stdout, "w", "backslashreplace")
    sys.stderr = _ready(sys.stderr, "w", "backslashreplace")
    try:
        commands(prog_name="dcpstore")
    except OSError as error:  # --help and --version print before there is a command
        report(error, as_json=False)
        sys.exit(exit_code(error))


def _ready(stream: TextIO | None, mode: Literal["r", "w"], errors: str) -> TextIO:
    """Return a stream that takes characters which its encoding lacks.

    One that was closed before the process began is None; /dev/null takes its place.
    """
    if stream is None:
        return open(os.devnull, mode)
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors=errors)
    return stream


def _leave_pipe(ctx: click.Context) -> NoReturn:
    """Exit, after redirecting standard output, so that Python's last flush does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    ctx.exit(BROKEN_PIPE)
