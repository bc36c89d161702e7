"""What every command is given: which repository, and whether a person or a program reads.

Opening never creates; only `init` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Concatenate, ParamSpec

import click

from dcpstore.cli.exit_codes import NoRepositoryError
from dcpstore.errors import NotFoundError

if TYPE_CHECKING:
    from dcpstore.repository import Repository

__all__ = ["Session", "json_option", "looking_for_repository", "repo_options"]

P = ParamSpec("P")
_Command = Callable[Concatenate["Session", P], None]


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
        """Yield the repository, opened."""
        from dcpstore import repository  # noqa: PLC0415 (loads SQLAlchemy)

        with looking_for_repository():
            opened = repository.open(self.target, create=False)
        with opened, opened.catalog.keep_connection():
            yield opened


@contextmanager
def looking_for_repository() -> Iterator[None]:
    """Let what is not found here count as a missing repository."""
    try:
        yield
    except NotFoundError as error:
        raise NoRepositoryError(str(error)) from error


def json_option(command: _Command[P]) -> Callable[P, None]:
    """Give a command the session as its first argument, and the option --json."""

    def remember(ctx: click.Context, option: click.Parameter, value: bool) -> None:
        _session(ctx).json = value

    return click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        callback=remember,
        help="Print JSON, and errors also as JSON on standard error.",
    )(click.pass_obj(command))


def repo_options(command: _Command[P]) -> Callable[P, None]:
    """Give a command what `json_option` does, and the option --repo."""

    def remember(ctx: click.Context, option: click.Parameter, value: str | None) -> None:
        if value is not None:
            _session(ctx).repo = value

    return click.option(
        "--repo",
        metavar="PATH_OR_URL",
        expose_value=False,
        callback=remember,
        help="The repository; default: $DCPSTORE_REPO.",
    )(json_option(command))


def _session(ctx: click.Context) -> Session:
    session = ctx.find_object(Session)
    assert session is not None, "the group makes it before any command parses"
    return session
