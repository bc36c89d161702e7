"""The way to the database: our settings, connections, query plans, no password in an error."""

import multiprocessing
import sqlite3
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine

import dcpstore
from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.db.database import Database
from dcpstore.catalog.db.url import sqlite_url
from dcpstore.catalog.read.dedup import find_chunks, find_tensors
from dcpstore.catalog.read.entries import load_chunks, load_entries, load_plan
from dcpstore.catalog.read.log_filter import list_log
from dcpstore.catalog.read.ref_lookup import list_refs, resolve
from dcpstore.catalog.write.saves import abort_save, begin_save, commit_save
from dcpstore.errors import (
    ConflictError,
    CorruptionError,
    DcpstoreError,
    InvalidInputError,
    NotFoundError,
)
from dcpstore.records import ChunkRange

from .conftest import Save, chunk_digest, digest_of, make_content, make_draft

SECRET = "hunter2"


@pytest.fixture
def sqlite_catalog(tmp_path: Path) -> Any:
    with Catalog.make(sqlite_url(tmp_path / "catalog.db"), data_url="d") as catalog:
        yield catalog


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://ada:{SECRET}@127.0.0.1:1/db",
        f"postgresql+psycopg://ada:{SECRET}@127.0.0.1:1/db?connect_timeout=2",
        f"postgresql://127.0.0.1:1/db?user=ada&password={SECRET}",
        f"postgresql://127.0.0.1:1/db?password={SECRET}&nonsense=1",
        f"postgresql://ada:{SECRET}@127.0.0.1:port/db",
        f"mysql://ada:{SECRET}@127.0.0.1/db",
        f"sqlite://ada:{SECRET}@host/file.db",
        f"sqlite:///file.db?password={SECRET}",
        f"ada:{SECRET}@somewhere",
    ],
)
def test_no_password_in_an_error(url: str) -> None:
    with pytest.raises((NotFoundError, InvalidInputError)) as caught:
        Catalog.make(url, data_url="d")
    error: BaseException | None = caught.value
    while error is not None:
        assert SECRET not in f"{error!r} {error}"
        error = error.__cause__


def test_no_password_where_a_catalog_is_shown() -> None:
    for url in (
        f"postgresql://ada:{SECRET}@h:5/db?sslpassword={SECRET}&host=/run",
        f"postgresql://h/db?password={SECRET}",
    ):
        assert SECRET not in repr(Database(url))


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///", "nonsense", ""])
def test_invalid_urls_are_refused(url: str) -> None:
    with pytest.raises(InvalidInputError, match=r"sqlite:///folder/catalog\.db"):
        Catalog.make(url, data_url="d")


def test_settings_are_ours_alone(sqlite_catalog: Catalog, tmp_path: Path) -> None:
    expected = {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "busy_timeout": 60_000,
    }
    with sqlite_catalog.database.outside() as driver:
        for name, value in expected.items():
            assert driver.execute(f"PRAGMA {name}").fetchone() == (value,)
    other = create_engine(sqlite_url(tmp_path / "other.db"))
    with other.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 0
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "delete"
    other.dispose()


def connections(catalog: Catalog, count: int) -> list[int]:
    """Return the processes of the `count` sessions that a catalog has on its server.

    One that was closed is seen there for a moment more, hence we look until there are so many.
    """
    query = (
        "SELECT pid FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    until = time.monotonic() + 30
    with catalog.database.read_only() as other:
        while len(found := other.exec_driver_sql(query).scalars().all()) != count:
            assert time.monotonic() < until, f"{found}, not {count} of them"
            other.rollback()  # a transaction sees the sessions as of one moment
            time.sleep(0.01)
    return list(found)


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_a_server_holds_a_connection_only_while_it_is_kept(catalog: Catalog) -> None:
    list_refs(catalog)
    connections(catalog, 0)
    with catalog.keep_connection():
        begin_save(catalog, make_draft("u"))
        kept = connections(catalog, 1)
        with catalog.keep_connection():
            list_refs(catalog)
        abort_save(catalog, "u", "no more")
        assert connections(catalog, 1) == kept
    connections(catalog, 0)


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_a_kept_connection_that_the_server_ended_is_replaced(catalog: Catalog) -> None:
    with catalog.keep_connection():
        begin_save(catalog, make_draft("u"))
        (ended,) = connections(catalog, 1)
        with catalog.database.read_only() as other:
            other.exec_driver_sql(f"SELECT pg_terminate_backend({ended})")
        connections(catalog, 0)
        assert commit_save(catalog, "u", make_content("u", {"w": "W"})).value.number == 1
        connections(catalog, 1)


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_a_forked_process_connects_for_itself(catalog: Catalog, save: Save) -> None:
    def ask() -> None:
        theirs.send((list_log(catalog), connections(catalog, 2)))

    save()
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    with catalog.keep_connection():
        expected = list_log(catalog)
        with warnings.catch_warnings():  # other tests' threads run, and the child does not ask them
            warnings.simplefilter("ignore", DeprecationWarning)
            child = context.Process(target=ask)
            child.start()
        assert ours.poll(60)
        received, both = ours.recv()
        child.join()
        assert child.exitcode == 0
        assert received == list_log(catalog) == expected
        assert set(connections(catalog, 1)) < set(both)


def test_foreign_keys_hold(catalog: Catalog, save: Save) -> None:
    save()
    for table in ("version", "tensor", "pack", "plan"):
        with pytest.raises(ConflictError), catalog.database.write() as connection:
            connection.exec_driver_sql(f"DELETE FROM {table}")


def test_locked_database_is_a_conflict(sqlite_catalog: Catalog, tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "catalog.db")
    database = Database(url, busy_seconds=0.1, retry_seconds=0.0)
    other = sqlite3.connect(tmp_path / "catalog.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with (
        Catalog(database, sqlite_catalog.repository) as impatient,
        pytest.raises(ConflictError, match="locked by another process for more than 0 seconds"),
    ):
        begin_save(impatient, make_draft("u"))
    other.execute("ROLLBACK")
    other.close()


@pytest.mark.parametrize("create", [True, False])
def test_a_file_whose_folder_cannot_be_read(tmp_path: Path, create: bool) -> None:
    with pytest.raises(DcpstoreError, match=r"cannot look for the catalog .*too long"):
        dcpstore.open(tmp_path / ("x" * 300), create=create)


def test_damaged_file_is_corruption(sqlite_catalog: Catalog, tmp_path: Path) -> None:
    sqlite_catalog.close()
    path = tmp_path / "catalog.db"
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(CorruptionError, match=r"is damaged .*malformed"):
        Catalog.open(sqlite_url(path))


def test_no_query_scans_a_whole_table(sqlite_catalog: Catalog) -> None:
    """Reads SQLite's plan of each statement; few rows here, but its plans do not depend on them."""
    catalog = sqlite_catalog
    begin_save(catalog, make_draft("u", step=1, tags=("t",), metrics={"m": 1.0}))
    commit_save(catalog, "u", make_content("u", {"w": "W"}))
    (entry,) = load_entries(catalog, 1, ["w"])
    assert entry.tensor is not None
    statements: list[str] = []
    with catalog.database.traced(statements.append):
        for ref in (None, "v1", "t", "main~0@step=1"):
            resolve(catalog, ref)
        list_log(catalog, 1)
        load_entries(catalog, 1)
        load_entries(catalog, 1, ["w"])
        load_chunks(catalog, [ChunkRange(entry.tensor.id, 0, 0, 2)])
        find_chunks(catalog, [chunk_digest("W", 0, 0)], "none")
        find_tensors(catalog, [digest_of("W")])
        load_plan(catalog, 1)
        begin_save(catalog, make_draft("u2"))
        commit_save(catalog, "u2", make_content("u2", {"w": "W", "v": "V"}))
    plans: dict[str, list[str]] = {}
    with catalog.database.outside() as driver:
        for statement in ";\n".join(statements).split(";\n"):  # some are sent together
            if statement.startswith(("SELECT", "WITH", "UPDATE", "DELETE")):
                values = [None] * statement.count("?")
                rows = driver.execute(f"EXPLAIN QUERY PLAN {statement}", values).fetchall()
                plans[statement] = [row[3] for row in rows]
    assert len(plans) > 15
    fine = {"SCAN each VIRTUAL TABLE INDEX 1:", "SCAN ancestor", "SCAN up", "SCAN CONSTANT ROW"}
    fine.add("SCAN pack USING INDEX ix_pack_damage")  # which has damaged packs only
    fine.add("SCAN sqlite_sequence")  # of one row
    fine |= {"SCAN extra LEFT-JOIN", "SCAN named"}  # of one version, and of the names of one save
    for statement, steps in plans.items():
        scans = {s for s in steps if s.startswith("SCAN")} - fine - {"SCAN repository"}
        # A subquery is read whole, but what it reads is a step too.
        scans = {scan for scan in scans if not scan.startswith("SCAN (subquery-")}
        assert not scans, f"{scans} in {statement}"
        # A chunk or an entry is found by its whole key, never by walking what shares half of it.
        for step in steps:
            if step.startswith("SEARCH chunk"):
                assert any(f"({key}=?" in step for key in ("tensor", "<expr>", "pack")), (
                    f"{step} in {statement}"
                )
