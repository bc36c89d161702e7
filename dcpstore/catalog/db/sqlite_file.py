"""The file of a catalog on SQLite: where it lies, and how it is opened; without SQLAlchemy."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Literal
from urllib.parse import quote

__all__ = ["CATALOG_FILE", "open_file"]

CATALOG_FILE = "catalog.db"  # in the folder of a repository


def open_file(
    file: Path, *, mode: Literal["ro", "rw", "rwc"], timeout: float
) -> sqlite3.Connection:
    """Return SQLite's own connection, outside of a transaction.

    Args:
        file: the catalog's file.
        mode: read it, or write too, or make it where it is missing.
        timeout: seconds to wait for others who lock it.
    """
    return sqlite3.connect(
        f"file:{quote(os.fsencode(str(file)))}?mode={mode}",
        uri=True,
        timeout=timeout,
        isolation_level=None,  # we say BEGIN ourselves, and which
        check_same_thread=False,  # a pool lends a connection to one thread at a time
    )
