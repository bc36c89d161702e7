"""SQL by people: any question, and no change."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from dcpstore.catalog import Catalog
from dcpstore.errors import InvalidInputError

from .conftest import Save


def test_questions_are_answered(catalog: Catalog, save: Save) -> None:
    save()
    for sql in (
        "SELECT version FROM history",
        "  -- which\n /* and ; DROP */ SELECT version FROM history",
        "WITH h AS (SELECT * FROM history) SELECT version FROM h;",
        "VALUES (1)",
        "select 1",
    ):
        assert catalog.query(sql, {}) == [(1,)]
    assert catalog.query("EXPLAIN SELECT * FROM history", {})


def test_parameters_are_found_outside_of_strings_only(catalog: Catalog, save: Save) -> None:
    save(message=":b 100%")
    rows = catalog.query(
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
    (row,) = catalog.query(
        "SELECT sum(nbytes) AS total, avg(step) AS mean, max(created_at) AS last FROM history", {}
    )
    assert (row.total, type(row.total), row.mean) == (56, int, 3.5)
    newest = catalog.log(limit=1)[0].created_at
    assert row.last == newest.strftime("%Y-%m-%d %H:%M:%S.%f")
    since = "SELECT version FROM history WHERE created_at >= :t ORDER BY version"
    elsewhere = newest.astimezone(timezone(timedelta(hours=-7)))
    assert catalog.query(since, {"t": elsewhere}) == [(2,)]
    assert catalog.query(since, {"t": datetime(2000, 1, 1, tzinfo=UTC)}) == [(1,), (2,)]


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


def test_nothing_can_be_changed(catalog: Catalog, save: Save) -> None:
    save()
    before = catalog.log()
    for sql in CHANGES:
        with pytest.raises(InvalidInputError):
            print(sql, catalog.query(sql, {}))  # shows which one passed
        assert catalog.log() == before
    save()
    assert catalog.query("SELECT count(*) AS n FROM version", {})[0].n == 2


@pytest.mark.parametrize(
    ("sql", "params", "match"),
    [
        ("SELECT nothing FROM history", {}, "nothing"),
        ("SELECT * FROM histroy", {}, "histroy(?s:.*)The views to ask are history, entries"),
        ("SELECT :a AS x", {}, "a"),
        ("SELECT :a AS x", {"a": object()}, "refused"),
        ("SELEC 1", {}, "is not a query; begin with SELECT"),
        ("SELECT 'unended", {}, "refused"),
    ],
)
def test_errors_are_the_databases_own_words(
    catalog: Catalog, sql: str, params: dict[str, object], match: str
) -> None:
    with pytest.raises(InvalidInputError, match=match):
        catalog.query(sql, params)
