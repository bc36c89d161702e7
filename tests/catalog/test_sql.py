"""SQL by people: any question, and no change."""

import os
import signal
import sqlite3
import threading
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.read.log_filter import list_log
from dcpstore.catalog.read.user_sql import query_rows
from dcpstore.errors import CorruptionError, DcpstoreError, InvalidInputError, NotFoundError

from .conftest import Save

# What only its SQL can say.
on_postgres = pytest.mark.parametrize("database_url", ["postgres"], indirect=True)


def test_queries_return_rows(catalog: Catalog, save: Save) -> None:
    save()
    for sql in (
        "SELECT version FROM history",
        "  -- which\n /* and ; DROP */ SELECT version FROM history",
        "WITH h AS (SELECT * FROM history) SELECT version FROM h;",
        "VALUES (1)",
        "select 1",
    ):
        assert query_rows(catalog, sql, {}) == [(1,)]
    assert query_rows(catalog, "EXPLAIN SELECT * FROM history", {})


def test_parameters_are_found_outside_of_strings_only(catalog: Catalog, save: Save) -> None:
    save(message=":b 100%")
    rows = query_rows(
        catalog,
        """SELECT message, ':b' AS "a:b", 7 % 4 AS rest, 'it''s :b' AS quoted -- :b, it's
        FROM history /* :b */ WHERE branch = :b AND message LIKE '%:b%' AND version > :least""",
        {"b": "main", "least": 0, "unused": 1},
    )
    assert [dict(row) for row in rows] == [
        {"message": ":b 100%", "a:b": ":b", "rest": 3, "quoted": "it's :b"}
    ]


def test_values_are_the_same_on_both(catalog: Catalog, save: Save) -> None:
    save(step=3)
    save(step=4)
    (row,) = query_rows(
        catalog,
        "SELECT sum(nbytes) AS total, avg(step) AS mean, max(created_at) AS last FROM history",
        {},
    )
    assert (row.total, type(row.total), row.mean) == (56, int, 3.5)
    newest = list_log(catalog, limit=1)[0].created_at
    assert row.last == newest.strftime("%Y-%m-%d %H:%M:%S.%f")
    since = "SELECT version FROM history WHERE created_at >= :t ORDER BY version"
    elsewhere = newest.astimezone(timezone(timedelta(hours=-7)))
    assert query_rows(catalog, since, {"t": elsewhere}) == [(2,)]
    assert query_rows(catalog, since, {"t": datetime(2000, 1, 1, tzinfo=UTC)}) == [(1,), (2,)]


def test_numbers_of_numpy_are_numbers(catalog: Catalog) -> None:
    given = {"a": np.int64(5), "b": np.float32(0.5), "c": np.uint8(7), "d": np.array([3])}
    (row,) = query_rows(catalog, "SELECT :a + 0 AS a, :b + 0 AS b, :c + 0 AS c, :d + 0 AS d", given)
    assert tuple(row) == (5, 0.5, 7, 3)
    with pytest.raises(InvalidInputError, match="parameter 'a' is a ndarray"):
        query_rows(catalog, "SELECT :a AS a", {"a": np.zeros(2)})


@on_postgres
def test_infinite_numbers_are_floats(catalog: Catalog) -> None:
    for text in ("Infinity", "-Infinity", "NaN"):
        (row,) = query_rows(catalog, f"SELECT '{text}'::numeric AS x", {})
        assert repr(row.x) == repr(float(text))


@on_postgres
def test_strings_with_escapes_hide_colons_too(catalog: Catalog) -> None:
    query = r"SELECT E'it\'s :x' AS a, e'\\' AS b, 'c:\' AS c, :y ::text AS d"
    assert query_rows(catalog, query, {"y": "z"}) == [("it's :x", "\\", "c:\\", "z")]


CHANGES = [
    "DELETE FROM version",
    "INSERT INTO plan (digest, ranks) VALUES ('x', 1)",
    "WITH x AS (SELECT 1) DELETE FROM version",
    "WITH x AS (DELETE FROM version RETURNING id) SELECT * FROM x",
    "EXPLAIN ANALYZE DELETE FROM version",
    "SELECT 1; DELETE FROM version",
    "SELECT 1; COMMIT; DELETE FROM version",
    "SELECT * INTO copied FROM version",
    "CREATE TABLE mine (a int)",
    "DROP VIEW history",
    "ATTACH DATABASE 'other.db' AS other",
    "PRAGMA query_only = OFF",
    "SELECT * FROM pragma_table_info('version')",
    "SELECT load_extension('x')",
    "VACUUM",
    "BEGIN",
    "COPY version TO PROGRAM 'touch stolen'",
    "COPY (SELECT 1) TO '/tmp/stolen'",
    "SELECT set_config('transaction_read_only', 'off', false)",
    "SET transaction_read_only = off",
    "",
    "-- SELECT 1",
    "selected",
]


def test_queries_cannot_change_the_catalog(catalog: Catalog, save: Save) -> None:
    save()
    before = list_log(catalog)
    for sql in CHANGES:
        with pytest.raises(InvalidInputError):
            print(sql, query_rows(catalog, sql, {}))  # shows which one passed
        assert list_log(catalog) == before
    save()
    assert query_rows(catalog, "SELECT count(*) AS n FROM version", {})[0].n == 2


WRONG: list[tuple[str, dict[str, object], str]] = [
    ("SELECT nothing FROM history", {}, "nothing"),
    ("SELECT * FROM histroy", {}, "histroy(?s:.*)The views are history, entries"),
    ("SELECT :a AS x", {}, "a"),
    ("SELECT :a AS x", {"a": object()}, "refused"),
    ("SELEC 1", {}, "is not a query; begin with SELECT"),
    ("SELECT 'unended", {}, "refused"),
    ("SELECT 1\0", {}, "the query .* is not text"),
    ("SELECT '\udc80'", {}, "the query .* is not text"),
    ("SELECT :a AS x", {"a": "\udc80"}, "the parameter 'a' .* is not text"),
    ("SELECT :a AS x", {"a": "a\0"}, "the parameter 'a' .* is not text"),
    ("SELECT :a AS x", {"a": datetime.max.replace(tzinfo=timezone.min)}, "refused"),
    ("SELECT json('malformed')", {}, "refused"),
]


def test_errors_quote_the_database(catalog: Catalog, subtests: pytest.Subtests) -> None:
    for sql, params, match in WRONG:
        with subtests.test(sql=sql), pytest.raises(InvalidInputError, match=match):
            query_rows(catalog, sql, params)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_damage_is_not_invalid_input(catalog: Catalog, save: Save, tmp_path: Path) -> None:
    save()
    with closing(sqlite3.connect(tmp_path / "catalog.db")) as own:
        own.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (size,) = own.execute("PRAGMA page_size").fetchone()
        (page,) = own.execute(
            "SELECT rootpage FROM sqlite_schema WHERE name = 'version'"
        ).fetchone()
    with (tmp_path / "catalog.db").open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    with pytest.raises(CorruptionError, match="is damaged"):
        query_rows(catalog, "SELECT * FROM history", {})


@on_postgres
def test_a_session_that_ends_is_not_invalid_input(
    catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(NotFoundError, match="cannot connect to the catalog"):
        query_rows(catalog, "SELECT pg_terminate_backend(pg_backend_pid())", {})
    assert caplog.text == ""  # what a pool logs reaches people's terminals
    with pytest.raises(DcpstoreError, match="canceling statement") as caught:
        query_rows(catalog, "SELECT pg_cancel_backend(pg_backend_pid()), pg_sleep(60)", {})
    assert not isinstance(caught.value, InvalidInputError)
    assert query_rows(catalog, "SELECT 1", {}) == [(1,)]


class Rung(Exception):
    """What the handler of a signal raises."""


def test_a_signal_ends_a_long_query(catalog: Catalog, database_url: str) -> None:
    def ring(*args: object) -> None:
        raise Rung

    query = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
    if not database_url.startswith("sqlite"):
        query = "SELECT pg_sleep(600)"
    before = signal.signal(signal.SIGUSR1, ring)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
    began = time.monotonic()
    try:
        timer.start()
        with pytest.raises(Rung):
            query_rows(catalog, query, {})
        assert time.monotonic() - began < 30
    finally:
        signal.signal(signal.SIGUSR1, before)
        timer.join()
    assert query_rows(catalog, "SELECT 1", {}) == [(1,)]
