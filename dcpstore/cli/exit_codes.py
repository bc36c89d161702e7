"""What a failure is to the shell: one message on standard error, and a stable exit code."""

from __future__ import annotations

import json

import click

from dcpstore.cli.output import visible
from dcpstore.errors import (
    AlreadyExistsError,
    ConflictError,
    CorruptionError,
    InvalidInputError,
    NotFoundError,
    SchemaError,
)

__all__ = ["BROKEN_PIPE", "DAMAGE", "NoRepositoryError", "exit_code", "report"]

DAMAGE = 3
BROKEN_PIPE = 141  # as a shell shows death by SIGPIPE


class NoRepositoryError(NotFoundError):
    """There is no repository to open; other names that are not found lie inside one."""


_CODES: dict[type[Exception], int] = {
    NoRepositoryError: 10,
    InvalidInputError: 2,
    CorruptionError: DAMAGE,
    ConflictError: 11,
    AlreadyExistsError: 11,
    SchemaError: 12,
}


def exit_code(error: Exception) -> int:
    """Return the exit code for an error that ends a command."""
    return next((code for kind, code in _CODES.items() if isinstance(error, kind)), 1)


def report(error: Exception, *, as_json: bool) -> None:
    """Print an error's message on standard error; with `as_json` also as an object on one line."""
    message = "\n".join(visible(line) for line in str(error).split("\n"))
    click.echo(f"dcpstore: {message}", err=True)
    if as_json:
        shape = {"error": {"kind": type(error).__name__, "message": str(error)}}
        click.echo(json.dumps(shape), err=True)
