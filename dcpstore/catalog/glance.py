"""A fast path for the log of a repository on SQLite, without SQLAlchemy.

SQLAlchemy takes longer to import than all other work of `dcpstore log`. The query is that of the
view `history`. Invariant: this path raises nothing, and returns what `Catalog` would return, or
None if anything that it reads is unusual. Then the caller uses `Catalog`, which finds what is wrong
and reports it. Rows that a log does not show, such as labels, are not checked; `dcpstore verify`
checks everything.
"""

from __future__ import annotations

import math
import re
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from dcpstore.catalog.db.sqlite_file import CATALOG_FILE, open_file
from dcpstore.catalog.schema import revisions
from dcpstore.catalog.schema.views import query_of

__all__ = ["LogLine", "glance_at_log"]

_URL = re.compile(r"sqlite:///([^?#%]+)")  # without escaped characters and options
_TABLES = ("alembic_version", "repository", "version", "entry", "ref", "metric")
_KINDS = (int, int | None, str, int | None, str, str, str, int)
_BUSY_SECONDS = 1.0


class LogLine(NamedTuple):
    """The fields of a `Version` that a log shows."""

    number: int
    parent: int | None
    branch: str
    step: int | None
    tags: tuple[str, ...]
    message: str
    created_at: datetime
    nbytes: int
    metrics: dict[str, float]

    def __str__(self) -> str:
        return f"v{self.number}"


def glance_at_log(target: str, *, limit: int | None) -> list[LogLine] | None:
    """Return the log of a repository, newest first, or None if `Catalog` must be used.

    Args:
        target: as `dcpstore.open` takes it.
        limit: return at most so many.
    """
    file = _file_of(target)
    if file is None:
        return None
    try:
        with closing(open_file(file, mode="rw", timeout=_BUSY_SECONDS)) as connection:
            # For SQLite a limit of -1 means all rows.
            return _lines(connection, file.parent, -1 if limit is None else limit)
    except (sqlite3.Error, OSError, ValueError, TypeError):
        return None


def _file_of(target: str) -> Path | None:
    """Return the file of the catalog, if the target is a folder or a simple URL."""
    if "://" not in target:
        return Path(target, CATALOG_FILE).absolute() if target else None
    url = _URL.fullmatch(target)
    return Path(url[1]).absolute() if url else None


def _lines(connection: sqlite3.Connection, folder: Path, limit: int) -> list[LogLine] | None:
    """Return the lines, or None if the tables or the data folder are not as expected."""
    connection.execute("PRAGMA query_only = ON")
    connection.execute("BEGIN")
    tables = f"SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name IN {_TABLES}"
    if connection.execute(tables).fetchone() != (len(_TABLES),):
        return None
    revision = connection.execute("SELECT version_num FROM alembic_version").fetchall()
    if revision != [(revisions.HEAD,)]:
        return None
    ((data,),) = connection.execute("SELECT data_url FROM repository")
    if not data or "://" in data or not (folder / data).is_dir():
        return None
    most = -1 if limit is None else limit
    history, metrics = (query_of(view, "sqlite") for view in ("history", "metrics"))
    rows = connection.execute(
        "SELECT version, parent, branch, step, tags, message, created_at, nbytes"
        f" FROM ({history}) ORDER BY version DESC LIMIT ?",
        (most,),
    )
    lines = list(map(_line, rows))
    by_number = {line.number: line.metrics for line in lines}
    for number, name, value in connection.execute(
        f"SELECT version, name, value FROM ({metrics}) WHERE version >= ? ORDER BY name",
        (min(by_number, default=0),),
    ):
        if not isinstance(name, str) or not isinstance(value, float | None):
            raise TypeError
        by_number[number][name] = math.nan if value is None else value
    return lines


def _line(row: tuple[Any, ...]) -> LogLine:
    """Return the line of a row, without metrics; raise TypeError or ValueError if it is damaged."""
    if not all(map(isinstance, row, _KINDS)):
        raise TypeError
    number, parent, branch, step, tags, message, text, nbytes = row
    created_at = datetime.fromisoformat(text)
    if created_at.tzinfo is not None:
        raise ValueError
    names = tuple(tags.split(",")) if tags else ()
    return LogLine(
        number, parent, branch, step, names, message, created_at.replace(tzinfo=UTC), nbytes, {}
    )
