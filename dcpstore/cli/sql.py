"""`dcpstore sql`: one query, on a connection that cannot write."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence

import click

from dcpstore.catalog.schema.views import VIEWS
from dcpstore.cli.output import (
    Column,
    note,
    print_csv,
    print_json,
    print_table,
)
from dcpstore.cli.session import Session, repo_options
from dcpstore.errors import InvalidInputError
from dcpstore.records import Row

__all__ = ["sql"]

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')


@click.command(
    help=f"""Print the rows of a QUERY in SQL; - reads it from standard input.

    The views to query are {", ".join(list(VIEWS)[:-1])} and {list(VIEWS)[-1]}.
    """
)
@click.argument("query")
@click.option(
    "-p",
    "--param",
    "params",
    multiple=True,
    metavar="NAME=VALUE",
    help='Value of :NAME in the query; what looks like a number is one, unless "quoted".',
)
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@repo_options
def sql(session: Session, query: str, params: tuple[str, ...], as_csv: bool) -> None:
    """Print the rows of a query; its help, which names the views, is above."""
    if as_csv and session.json:
        raise click.UsageError("--csv and --json exclude each other; choose one.")
    pairs = [_param(text) for text in params]
    values = dict(pairs)
    if len(values) < len(pairs):
        raise click.BadParameter("a name is given twice.", param_hint="'-p'")
    with session.open() as repo:
        from dcpstore.catalog.read.user_sql import (  # noqa: PLC0415 (SQLAlchemy)
            query_table,
            unused_parameters,
        )

        text = _utf8(sys.stdin.read() if query == "-" else query)
        if unused := unused_parameters(text, values):
            named = ", ".join(f":{name}" for name in unused)
            raise click.BadParameter(f"the query has no {named}.", param_hint="'-p'")
        columns, rows = query_table(repo.catalog, text, values)
    if session.json:
        print_json([_object(row) for row in rows])
    elif as_csv:
        print_csv(columns, rows)
    elif not rows:
        note("no rows.")
    else:
        print_table(_columns(columns, rows), [[_text(value) for value in row] for row in rows])


def _param(text: str) -> tuple[str, object]:
    name, equals, value = _utf8(text).partition("=")
    if not equals or not name.isidentifier():
        raise click.BadParameter(f"{text!r} is not NAME=VALUE.", param_hint="'-p'")
    if _NUMBER.fullmatch(value) or _QUOTED.fullmatch(value):
        try:
            return name, json.loads(value)
        except ValueError as error:
            raise click.BadParameter(f"{text!r}: {error}.", param_hint="'-p'") from error
    return name, value


def _utf8(text: str) -> str:
    """Return text that a database takes; the shell may pass bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidInputError(f"{text!r} is not UTF-8; write it in UTF-8.") from None
    return text


def _object(row: Row) -> dict[str, object]:
    found = dict(row.items())
    if len(found) < len(row.columns):
        raise InvalidInputError(
            f"two columns have one name ({', '.join(row.columns)}), which a JSON object cannot "
            "hold; rename one with AS."
        )
    return found


def _columns(names: Sequence[str], rows: Sequence[Row]) -> list[Column]:
    """Return the columns, those of numbers to the right."""
    return [
        Column(name, right=all(isinstance(row[i], int | float | None) for row in rows))
        for i, name in enumerate(names)
    ]


def _text(value: object) -> str:
    if value is None:
        return ""
    return value.hex() if isinstance(value, bytes) else str(value)
