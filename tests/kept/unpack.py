"""Puts a kept repository in place, from its archive."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import psycopg

__all__ = ["unpack"]


def unpack(archive: str, data: Path, *, url: str) -> None:
    """Extract an archive of this folder, such as "0002/sqlite.tar.gz", into a data folder.

    On Postgres its catalog is written into the empty database of `url`.
    """
    with tarfile.open(Path(__file__).parent / archive) as files:
        files.extractall(data, filter="data")
    dump = data / "catalog.sql"
    if dump.exists():
        text = re.sub(r"(?m)^\\.*$", "", dump.read_text())  # without psql's own commands
        dump.unlink()
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(text.encode())
            connection.execute("UPDATE public.repository SET data_url = %s", [str(data)])
