"""What every command shares: which repository, JSON or text, and how a failure ends.

Opening a repository never creates one; only `init` does. A failure is one message on standard error
and a stable exit code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Concatenate, ParamSpec

import click

from dcpstore.cli.output import (
    visible,
)
from dcpstore.errors import (
    AlreadyExistsError,
    ConflictError,
    CorruptionError,
    DcpstoreError,
    InvalidInputError,
    NotFoundError,
    SchemaError,
)

if TYPE_CHECKING:
    from dcpstore.repository import Repository

__all__ = [
    "BROKEN_PIPE",
    "DAMAGE",
    "NoRepositoryError",
    "Session",
    "WholeNumber",
    "color_option",
    "exit_code",
    "json_option",
    "limit_option",
    "looking_for_repository",
    "open_existing",
    "pager_option",
    "repo_options",
    "report",
    "report_json",
]

DAMAGE = 3
BROKEN_PIPE = 141  # as a shell shows death by SIGPIPE
_MOST = 1_000_000_000  # more would not fit the number types of every database


class WholeNumber(click.IntRange):
    """A whole number in a range; click would call what is not one "not a valid integer range"."""

    name = "number"

    def convert(
        self, value: str | int, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Return the number, or end the command with its message."""
        try:
            number = int(value)
        except ValueError:
            self.fail(f"{value!r} is not a whole number.", param, ctx)
        return int(super().convert(number, param, ctx))


limit_option = click.option(
    "-n", "--limit", type=WholeNumber(1, _MOST), help="Print at most this many."
)
pager_option = click.option("--no-pager", is_flag=True, help="Print a long list without a pager.")


def _choose_colours(ctx: click.Context, option: click.Parameter, value: str | None) -> None:
    if value in ("always", "never"):
        ctx.color = value == "always"


color_option = click.option(
    "--color",
    type=click.Choice(("auto", "always", "never")),
    expose_value=False,
    callback=_choose_colours,
    help="When to use colours; auto: on a terminal, unless NO_COLOR is set.",
)

# What messages say to users of Python, and what is left of it for those of a shell.
_PYTHON = (
    (re.compile(r"(?:\w+=[^\s()]+|\w+\([^()]*\)|\w+_\w+) \((--[a-z][^()]*)\)"), r"\1"),
    (re.compile(r"\(\w+, (--[a-z-]+)\)"), r"(\1)"),
    (re.compile(r", or give a timedelta"), ""),
)

P = ParamSpec("P")
_Command = Callable[Concatenate["Session", P], None]


class NoRepositoryError(NotFoundError):
    """There is no repository to open; other `NotFoundError`s are about names inside one."""

    kind = "no_repository"


_CODES: dict[type[Exception], int] = {
    NoRepositoryError: 10,
    InvalidInputError: 2,
    CorruptionError: DAMAGE,
    ConflictError: 11,
    AlreadyExistsError: 11,
    SchemaError: 12,
}


@dataclass(slots=True)
class Session:
    """One run of the command line."""

    repo: str | None
    json: bool = False

    @property
    def target(self) -> str:
        """The repository that was named, not opened yet."""
        if not self.repo:
            raise click.UsageError("no repository is named; pass --repo, or set DCPSTORE_REPO.")
        return self.repo

    @contextmanager
    def open(self) -> Iterator[Repository]:
        """Yield the repository, opened, with one connection for the whole block."""
        with open_existing(self.target) as opened, opened.catalog.keep_connection():
            yield opened


def open_existing(target: str) -> Repository:
    """Open a repository, and never make one.

    Raises:
        NoRepositoryError: there is none.
    """
    from dcpstore import repository  # noqa: PLC0415 (loads SQLAlchemy)

    with looking_for_repository():
        return repository.open(target, create=False)


@contextmanager
def looking_for_repository() -> Iterator[None]:
    """Turn a `NotFoundError` of the block into a `NoRepositoryError`."""
    try:
        yield
    except NotFoundError as error:
        raise NoRepositoryError(str(error)) from error


def json_option(command: _Command[P]) -> Callable[P, None]:
    """Give a command the session as its first argument, and the options --json and --color."""

    def remember(ctx: click.Context, option: click.Parameter, value: bool) -> None:
        _session(ctx).json = value

    return click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        callback=remember,
        help="Print JSON; the last line of standard error is then the error as JSON.",
    )(color_option(click.pass_obj(command)))


def repo_options(command: _Command[P]) -> Callable[P, None]:
    """Give a command the session as its first argument, and the options of every command."""

    def remember(ctx: click.Context, option: click.Parameter, value: str | None) -> None:
        if value is not None:
            _session(ctx).repo = value

    return click.option(
        "--repo",
        "-r",
        metavar="PATH_OR_URL",
        expose_value=False,
        callback=remember,
        help="The repository; default: $DCPSTORE_REPO.",
    )(json_option(command))


def _session(ctx: click.Context) -> Session:
    session = ctx.find_object(Session)
    assert session is not None, "the group makes it before any command parses"
    return session


def exit_code(error: Exception) -> int:
    """Return the exit code for an error that ends a command."""
    return next((code for kind, code in _CODES.items() if isinstance(error, kind)), 1)


def report(error: Exception, *, as_json: bool) -> None:
    """Print an error's message on standard error; with `as_json` also as an object on one line."""
    text = _for_shell(str(error))
    message = "\n".join(visible(line) for line in text.split("\n"))
    click.echo(f"dcpstore: {message}", err=True)
    if as_json:
        kind = error.kind if isinstance(error, DcpstoreError) else "os_error"
        report_json(kind, text)


def _for_shell(message: str) -> str:
    """Return a message without the ways to write in Python what it also names an option for."""
    for pattern, option in _PYTHON:
        message = pattern.sub(option, message)
    return message


def report_json(kind: str, message: str) -> None:
    """Print an error on standard error as an object on one line."""
    click.echo(json.dumps({"error": {"kind": kind, "message": message}}), err=True)
