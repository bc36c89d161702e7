"""A glance at the log of a repository on SQLite, for people who wait at a prompt.

SQLAlchemy takes longer to load than all the rest of `dcpstore log` takes. The query here is that of
the view `history`, on the tables themselves. Invariant: a glance raises nothing, and returns what
`Catalog` would; or None where what it looks at is not as it should be, and then the caller turns
to `Catalog`, which finds out what is wrong, and says so. What a log does not show, labels for
example, may be damaged all the same: `dcpstore verify` looks at everything.
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

_URL = re.compile(r"sqlite:///([^?#%]+)")  # in which no character stands for another
_TABLES = ("alembic_version", "repository", "version", "entry", "ref", "metric")
_KINDS = (int, int | None, str, int | None, str, str, str, int)
_BUSY_SECONDS = 1.0


class LogLine(NamedTuple):
    """What a log shows of a version; the fields are those of `Version`."""

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
    """Return the log of a repository, newest first, or None where only `Catalog` can tell.

    Args:
        target: as `dcpstore.open` takes it.
        limit: return so many at most.
    """
    file = _file_of(target)
    if file is None:
        return None
    try:
        with closing(open_file(file, mode="rw", timeout=_BUSY_SECONDS)) as connection:
            return _lines(connection, file.parent, -1 if limit is None else limit)
    except (sqlite3.Error, OSError, ValueError, TypeError):
        return None


def _file_of(target: str) -> Path | None:
    """Return the catalog's file where the target plainly names one."""
    if "://" not in target:
        return Path(target, CATALOG_FILE).absolute() if target else None
    url = _URL.fullmatch(target)
    return Path(url[1]).absolute() if url else None


def _lines(connection: sqlite3.Connection, folder: Path, limit: int) -> list[LogLine] | None:
    """Return the lines, or None where tables or the data folder are not as they should be."""
    connection.execute("PRAGMA query_only = ON")
    connection.execute("BEGIN")
    tables = f"SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name IN {_TABLES}"
    if connection.execute(tables).fetchone() != (len(_TABLES),):
        return None
    at = connection.execute("SELECT version_num FROM alembic_version").fetchall()
    if at != [(revisions.HEAD,)]:
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
    """Return the line of a row, without metrics; TypeError or ValueError where it is damaged."""
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
