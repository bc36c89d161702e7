"""What suites share: two databases (SQLite and a real Postgres server), and real gloo ranks."""

import importlib
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from dcpstore.catalog.db.url import sqlite_url
from dcpstore.catalog.maintenance.journal import journal_again
from dcpstore.core.uids import new_uid
from dcpstore.repository import Repository
from tests import servers
from tests.ranks import RankPool
from tests.soundness import Place, assert_sound


def pytest_configure(config: pytest.Config) -> None:
    if metadata.version("torch").startswith(("2.8.", "2.9.")):  # they warn of what they do
        for message in ("TypedStorage is deprecated", "Converting a tensor with requires_grad"):
            config.addinivalue_line("filterwarnings", f"ignore:{message}:UserWarning")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if params.get("database_url") == "postgres" and item.get_closest_marker("slow_on_postgres"):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    if "torch" in sys.modules:  # then some test will load the rest
        importlib.import_module("dcpstore.api")
    importlib.import_module("tests.frozen")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Any]:
    """A Postgres server of this test session alone, stopped at its end."""
    with servers.postgres_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database: no file yet on SQLite, a database of its own on Postgres.

    Where there is a `place`, it holds a repository, copied in a fifth of the time that it takes to
    make one.
    """
    is_made = "place" in request.fixturenames
    said = (new_uid(), str(tmp_path / "data"))
    if is_made:
        (tmp_path / "data").mkdir()
    if request.param == "sqlite":
        file = tmp_path / "catalog.db"
        if is_made:
            shutil.copy(request.getfixturevalue("made_file"), file)
            with closing(sqlite3.connect(file)) as own, own:
                own.execute("UPDATE repository SET uid = ?, data_url = ?", said)
        yield sqlite_url(file)
        return
    server = request.getfixturevalue("postgres_server")
    like = request.getfixturevalue("made_database") if is_made else "template1"
    with servers.new_database(server, like=like) as url:
        if is_made:
            with psycopg.connect(url) as connection:
                connection.execute("UPDATE repository SET uid = %s, data_url = %s", said)
        yield url


@pytest.fixture(scope="session")
def made_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file that holds a repository."""
    folder = tmp_path_factory.mktemp("made")
    _make(Place(sqlite_url(folder / "catalog.db"), str(folder / "data")))
    return folder / "catalog.db"


@pytest.fixture(scope="session")
def made_database(postgres_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a Postgres database that holds a repository, and that nobody is connected to."""
    with servers.new_database(postgres_server) as url:
        _make(Place(url, str(tmp_path_factory.mktemp("made"))))
        yield conninfo_to_dict(url)["dbname"]


def _make(place: Place) -> None:
    """Make a repository whose copies, each with its own data, have their journal to write yet."""
    with place.open() as made:
        journal_again(made.catalog, 1)


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Two real ranks, shared by the tests of a session."""
    yield from _ranks(2, tmp_path_factory)


@pytest.fixture(scope="session")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Four real ranks, shared by the tests of a session."""
    yield from _ranks(4, tmp_path_factory)


def _ranks(size: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    pool = RankPool(size, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


@pytest.fixture
def place(database_url: str, tmp_path: Path) -> Place:
    """Where a new repository of this test is, on each database."""
    return Place(database_url, str(tmp_path / "data"))


@pytest.fixture
def repo(place: Place) -> Iterator[Repository]:
    """A new repository, on each database; it must be sound when the test ends."""
    with place.open() as repository:
        yield repository
        assert_sound(repository)
