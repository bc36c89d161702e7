"""A repository with a history on each database, and ways to run commands on it."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

import psycopg
import pytest
from click.testing import CliRunner, Result

from dcpstore.catalog.catalog import Catalog
from dcpstore.cli.app import commands
from tests.cli.history import save_example
from tests.soundness import Place

Run = Callable[..., Result]


@pytest.fixture
def empty(place: Place) -> str:
    """The URL of a repository without versions."""
    place.open().close()
    return place.url


@pytest.fixture
def catalog(empty: str) -> Iterator[Catalog]:
    """The catalog of the repository at `empty`, to fill it."""
    with Catalog.open(empty) as opened:
        yield opened


@pytest.fixture
def target(empty: str, catalog: Catalog) -> str:
    """The URL of a repository with three versions, one of them tagged."""
    with catalog.keep_connection():
        save_example(catalog)
    return empty


@pytest.fixture
def run() -> Run:
    """Run a command in this process, on the repository that `repo=` says."""

    def run(*args: str, repo: str | None = None, stdin: str | None = None) -> Result:
        runner = CliRunner(env={"DCPSTORE_REPO": repo})
        return runner.invoke(commands, args, input=stdin)

    return run


def run_process(
    *args: str, repo: str | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "dcpstore", *args],
        env=process_environment(repo),
        text=True,
        check=False,
        timeout=60,
        **({"capture_output": True} | options),
    )


def process_environment(repo: str | None) -> dict[str, str]:
    """Return an environment in which a process finds that repository, or none."""
    inherited = {key: value for key, value in os.environ.items() if key != "DCPSTORE_REPO"}
    return inherited | ({} if repo is None else {"DCPSTORE_REPO": repo})


def ask_database(url: str, query: str) -> list[tuple[Any, ...]]:
    """Return the rows of a query on the database itself, past dcpstore; a change is committed."""
    if url.startswith("sqlite:///"):
        connection = sqlite3.connect(unquote(url.removeprefix("sqlite:///")))
        try:
            with connection:
                return connection.execute(query).fetchall()
        finally:
            connection.close()
    with psycopg.connect(url) as postgres:
        cursor = postgres.execute(query)
        return cursor.fetchall() if cursor.description else []
