"""The file of a catalog on SQLite: its name, and how it is opened.

Apart from `database`, so that the fast log need not import SQLAlchemy.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Literal
from urllib.parse import quote

__all__ = ["CATALOG_FILE", "is_at_rest", "open_file"]

CATALOG_FILE = "catalog.db"  # in the folder of a repository


def is_at_rest(file: Path) -> bool:
    """Tell whether a catalog lies where this process cannot write, and no other one has it open.

    In WAL mode SQLite keeps two files beside the catalog, even for a reader. On a read-only mount
    it cannot make them; but where there is no log of changes, the catalog itself is all there is.
    """
    if not os.path.isfile(file) or os.access(file.parent, os.W_OK):
        return False
    try:
        return not os.path.getsize(f"{file}-wal")
    except OSError:  # there is none
        return True


def open_file(
    file: Path, *, mode: Literal["ro", "rw", "rwc"], timeout: float
) -> sqlite3.Connection:
    """Return SQLite's own connection, outside of a transaction.

    Args:
        file: the catalog's file.
        mode: "ro" to read, "rw" to write too, "rwc" to create it if it is missing.
        timeout: seconds to wait for a lock of another process.
    """
    # Immutable: read the file without locks and without files beside it.
    how = "ro&immutable=1" if mode != "rwc" and is_at_rest(file) else mode
    return sqlite3.connect(
        f"file:{quote(os.fsencode(str(file)))}?mode={how}",
        uri=True,
        timeout=timeout,
        isolation_level=None,  # `Database` sends BEGIN itself, for sqlite3 would send it late
        check_same_thread=False,  # a pool gives a connection to one thread at a time
    )
