"""A database that fails: retried if that is safe, otherwise reported by an error of ours."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import psycopg
import pytest
from sqlalchemy import Connection

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.db.database import Database
from dcpstore.catalog.db.db_errors import UnknownOutcomeError
from dcpstore.catalog.db.transactions import writes
from dcpstore.catalog.db.url import sqlite_url
from dcpstore.catalog.maintenance.journal import mark_journaled, unjournaled
from dcpstore.catalog.read.entries import load_entries
from dcpstore.catalog.read.log_filter import list_log
from dcpstore.catalog.read.ref_lookup import list_refs, resolve
from dcpstore.catalog.read.user_sql import query_rows
from dcpstore.catalog.write.operations import list_operations
from dcpstore.catalog.write.refs import make_ref
from dcpstore.catalog.write.saves import (
    abort_save,
    begin_save,
    commit_copy,
    commit_save,
    touch_save,
)
from dcpstore.errors import ConflictError, CorruptionError, DcpstoreError, NotFoundError
from tests.proxy import Proxy, proxied
from tests.servers import new_database

from .conftest import make_content, make_draft

What = Literal["answer", "request"]


@pytest.fixture
def postgres_url(postgres_server: Any) -> Iterator[str]:
    with new_database(postgres_server) as url:
        yield url


@pytest.fixture
def proxy(postgres_url: str) -> Iterator[Proxy]:
    with proxied(postgres_url) as between:
        yield between


@pytest.fixture
def behind(proxy: Proxy) -> Iterator[Catalog]:
    """A catalog behind a proxy, with one version."""
    with Catalog.make(proxy.url, data_url="file:///data") as catalog:
        begin_save(catalog, make_draft("first"))
        commit_save(catalog, "first", make_content("first", {"w": "W"}))
        yield catalog


def lose_next(proxy: Proxy, what: What) -> None:
    proxy.lose, proxy.what = proxy.commits + 1, what


@pytest.fixture(params=["answer", "request"])
def what(request: pytest.FixtureRequest) -> What:
    lost: What = request.param
    return lost


def test_a_save_whose_commit_was_lost_is_committed_once(
    behind: Catalog, proxy: Proxy, what: What
) -> None:
    lose_next(proxy, what)
    begin_save(behind, make_draft("u", tags=("t",), metrics={"m": 1.0}))
    lose_next(proxy, what)
    version = commit_save(behind, "u", make_content("u", {"w": "V"})).value
    assert (version.number, version.tags, version.metrics) == (2, ("t",), {"m": 1.0})
    assert list_log(behind) == [version, resolve(behind, "v1")]
    assert [o.kind for o in list_operations(behind)] == ["tag", "save", "save", "init"]


def test_an_idempotent_change_is_retried(behind: Catalog, proxy: Proxy, what: What) -> None:
    begin_save(behind, make_draft("u"))
    lose_next(proxy, what)
    touch_save(behind, "u")
    lose_next(proxy, what)
    abort_save(behind, "u", "given up")
    lose_next(proxy, what)
    mark_journaled(behind, 1)
    rows = query_rows(behind, "SELECT status, error FROM version WHERE uid = 'u'", {})
    assert rows == [("aborted", "given up")]
    assert [entry["operation"] for entry in unjournaled(behind)] == [2]


def test_an_unknown_outcome_is_reported(behind: Catalog, proxy: Proxy, what: What) -> None:
    lose_next(proxy, what)
    with pytest.raises(UnknownOutcomeError, match=r"not known: look with 'dcpstore ops'"):
        make_ref(behind, "best", "tag", version=1, author="ada")
    assert [ref.name for ref in list_refs(behind, "tag")] == (["best"] if what == "answer" else [])


def test_a_copy_whose_commit_was_lost_is_committed_once(
    behind: Catalog, proxy: Proxy, what: What
) -> None:
    begin_save(behind, make_draft("temporary"))
    lose_next(proxy, what)
    version = commit_copy(
        behind,
        "temporary",
        make_draft("origin"),
        make_content("temporary", {"w": "V"}),
        parent=None,
    )
    assert (version.number, version.uid) == (2, "origin")
    assert [v.uid for v in list_log(behind)] == ["origin", "first"]


def test_a_slow_server_is_waited_for(behind: Catalog, proxy: Proxy) -> None:
    proxy.delay = 0.05
    begin_save(behind, make_draft("u"))
    assert commit_save(behind, "u", make_content("u", {"w": "V"})).value.number == 2


def test_a_server_that_ends_all_sessions(behind: Catalog, postgres_url: str) -> None:
    """As one does that stops: amid a transaction, before its commit."""
    attempts = []

    def work(connection: Connection) -> int:
        connection.exec_driver_sql("UPDATE repository SET last_operation = last_operation + 1")
        attempts.append(1)
        if len(attempts) == 1:
            with psycopg.connect(postgres_url) as other:
                other.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
        return int(connection.exec_driver_sql("SELECT last_operation FROM repository").scalar_one())

    before = list_operations(behind)[0].number
    assert writes()(work)(behind) == before + 1
    assert len(attempts) == 2


def test_a_deadlock_is_retried(behind: Catalog) -> None:
    both = threading.Barrier(2)
    attempts = []

    def work(connection: Connection, first: str, second: str) -> None:
        attempts.append(first)
        for table in (first, second):
            connection.exec_driver_sql(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
            if len(attempts) <= 2 and table == first:
                both.wait(20)

    other = threading.Thread(target=writes()(work), args=(behind, "ref", "metric"))
    other.start()
    writes()(work)(behind, "metric", "ref")
    other.join(30)
    assert not other.is_alive()
    assert len(attempts) == 3


def test_a_server_without_a_free_connection(behind: Catalog, postgres_url: str) -> None:
    role = f"few_{uuid.uuid4().hex[:8]}"
    url = postgres_url.replace("postgres:@", f"{role}@")
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 1")
        admin.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
        holder = psycopg.connect(url)
        threading.Timer(0.5, holder.close).start()
        with Catalog.open(url) as catalog:  # waits for the holder
            assert len(list_log(catalog)) == 1
        with (
            psycopg.connect(url),
            Catalog(Database(url, retry_seconds=0.3), behind.repository) as impatient,
            pytest.raises(DcpstoreError, match=r"no connection left .*max_connections"),
        ):
            list_log(impatient)
        admin.execute(f"DROP OWNED BY {role}")
        admin.execute(f"DROP ROLE {role}")


def test_a_lock_that_is_not_released(behind: Catalog, postgres_url: str, proxy: Proxy) -> None:
    with (
        psycopg.connect(postgres_url) as other,
        Catalog(Database(proxy.url, busy_seconds=0.2), behind.repository) as impatient,
    ):
        other.execute("SELECT * FROM repository FOR UPDATE")
        with pytest.raises(ConflictError, match="locked by another process"):
            make_ref(impatient, "best", "tag", version=1, author="ada")
    assert make_ref(behind, "best", "tag", version=1, author="ada").value.version == 1


def test_a_server_that_goes_away_shows_no_password(behind: Catalog, proxy: Proxy) -> None:
    with Catalog(Database(proxy.url, retry_seconds=0.3), behind.repository) as impatient:
        assert len(list_log(impatient)) == 1
        proxy.close()
        calls: list[Callable[[], Any]] = [
            lambda: list_log(impatient),
            lambda: begin_save(impatient, make_draft("u")),
        ]
        for call in calls:
            with pytest.raises(NotFoundError, match="cannot connect to the catalog"):
                call()


WITHOUT_FILES = """
import gc, os, resource, sys
from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.read.log_filter import list_log

with Catalog.open(sys.argv[1]) as catalog:
    list_log(catalog)  # imports the driver
with Catalog.open(sys.argv[1]) as catalog:
    catalog.database.close()  # the next statement opens a connection
    gc.collect()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, hard))
    held = []
    try:
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        os.close(held.pop())  # the driver's socket takes it, and then the driver needs another one
    try:
        list_log(catalog)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
"""


def test_a_process_that_may_open_no_file_says_so(behind: Catalog, postgres_url: str) -> None:
    """In a process of its own, in which nothing else opens or closes files."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_FILES, postgres_url],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert re.search(r"DcpstoreError: .*Too many open files.*ulimit -n", done.stderr), done.stderr


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Catalog]:
    with Catalog.make(sqlite_url(tmp_path / "c.db"), data_url="d") as catalog:
        begin_save(catalog, make_draft("first"))
        commit_save(catalog, "first", make_content("first", {"w": "W"}))
        yield catalog


def test_a_full_disk_changes_nothing(file: Catalog) -> None:
    with file.database.outside() as driver:
        (pages,) = driver.execute("PRAGMA page_count").fetchone()
        driver.execute(f"PRAGMA max_page_count = {pages}")
    begin_save(file, make_draft("u"))
    with pytest.raises(DcpstoreError, match=r"no space is left .*Nothing was changed; free some"):
        commit_save(file, "u", make_content("u", {f"w{i}": f"{i}" for i in range(200)}))
    assert len(list_log(file)) == 1
    with file.database.outside() as driver:
        driver.execute("PRAGMA max_page_count = 1000000")
    assert commit_save(file, "u", make_content("u", {"w": "V"})).value.number == 2


def test_a_busy_file_is_read_again(file: Catalog, tmp_path: Path) -> None:
    # In this mode a reader is refused at once, whatever its timeout.
    other = sqlite3.connect(tmp_path / "c.db", isolation_level=None, check_same_thread=False)
    file.close()
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    threading.Timer(0.3, other.close).start()
    assert len(list_log(file)) == 1


# A row's column, and what does not belong there.
DAMAGES = [
    ("version", "labels", "{not json"),
    ("version", "seconds", "]"),
    ("version", "created_at", "yesterday"),
    ("layout", "shape", "[1,"),
    ("layout", "shape", '["a"]'),
    ("layout", "shape", "7"),
    ("layout", "shape", "[1,2,3]"),
    ("layout", "parts", "{}"),
    ("layout", "parts", "[[[0], [7], [null]]]"),
    ("layout", "parts", "[[[0], [7], [0]]]"),
    ("layout", "parts", "[[[0], [7]]]"),
    ("fqn", "path", "w"),
    ("fqn", "path", "7"),
    ("fqn", "path", "[[]]"),
    ("repository", "created_at", "never"),
]


@pytest.mark.parametrize(("table", "column", "value"), DAMAGES)
def test_a_damaged_row_is_corruption(
    file: Catalog, tmp_path: Path, table: str, column: str, value: str
) -> None:
    with sqlite3.connect(tmp_path / "c.db") as raw:
        raw.execute(f"UPDATE {table} SET {column} = ?", [value])
    raw.close()

    def look() -> None:
        with Catalog.open(sqlite_url(tmp_path / "c.db")) as catalog:
            list_log(catalog)
            load_entries(catalog, 1)

    with pytest.raises(CorruptionError, match="damaged"):
        look()
