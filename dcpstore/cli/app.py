"""The commands by name, and how any of them ends.

A command's module is loaded when the command is used, so that one which needs much costs the others
nothing. Nothing below this module prints an error or chooses an exit code.
"""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches
from importlib import import_module
from io import TextIOWrapper
from keyword import iskeyword
from typing import Literal, NoReturn, TextIO

import click

from dcpstore.cli import INTERRUPTED
from dcpstore.cli.exit_codes import BROKEN_PIPE, exit_code, report
from dcpstore.cli.session import Session
from dcpstore.errors import DcpstoreError

__all__ = ["commands", "run"]

# In the order in which the help lists them; a module is named where several commands share one.
_MODULES = {
    "init": "setup",
    "log": "log",
    "status": "status",
    "show": "contents",
    "ls": "contents",
    "diff": "diff",
    "tag": "refs",
    "branch": "refs",
    "rollback": "undo",
    "undo": "undo",
    "ops": "undo",
    "sql": "sql",
    "db-upgrade": "setup",
    "import": "bridges",
    "export": "bridges",
    "expire": "maintain",
    "forget": "maintain",
    "gc": "maintain",
    "verify": "maintain",
    "rebuild": "maintain",
    "copy": "maintain",
}


class _Commands(click.Group):
    """The group of all commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, in the order of the table."""
        return list(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load one command."""
        if cmd_name not in _MODULES:
            return None
        module = import_module(f"dcpstore.cli.{_MODULES[cmd_name]}")
        name = cmd_name.replace("-", "_")
        command = getattr(module, f"{name}_" if iskeyword(name) else name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command; the error for an unknown one names those that are spelled like it."""
        name = args[0]
        close = [] if name in _MODULES else get_close_matches(name, _MODULES)
        if close:
            ctx.fail(f"no command {name!r}. Did you mean {' or '.join(map(repr, close))}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Run a command; every failure becomes a message and an exit code here."""
        session = ctx.obj = Session(repo=ctx.params["repo"])
        try:
            result: object = super().invoke(ctx)
            sys.stdout.flush()  # here, where a closed pipe is still quiet
            return result
        except BrokenPipeError:
            _leave_pipe(ctx)
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        except (DcpstoreError, OSError) as error:
            report(error, as_json=session.json)
            ctx.exit(exit_code(error))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--repo",
    metavar="PATH_OR_URL",
    envvar="DCPSTORE_REPO",
    show_envvar=True,
    help="The repository; every command that opens one takes it too.",
)
@click.version_option(package_name="dcpstore", message="dcpstore %(version)s")
def commands(repo: str | None) -> None:
    """Look at and change a repository of model checkpoints.

    A REF is a version (12 or v12), a tag, a branch, main~3 or main@step=1000.
    """


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

    One that was closed before the process began is None: it leads nowhere then.
    """
    if stream is None:
        return open(os.devnull, mode)
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors=errors)
    return stream


def _leave_pipe(ctx: click.Context) -> NoReturn:
    """Exit, after making sure that Python's last flush of what remains finds no closed pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    ctx.exit(BROKEN_PIPE)
