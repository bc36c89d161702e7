"""`sql` prints rows of a query as a table, as JSON or as CSV, and never writes."""

import json

import pytest

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.schema.views import VIEWS
from tests.cli.conftest import Run, ask_database
from tests.cli.history import save_version
from tests.ranks import ROOT

QUERY = "SELECT version, step, tags, message FROM history WHERE step >= :low ORDER BY version"


def test_prints_rows(run: Run, target: str) -> None:
    assert run("sql", QUERY, "-p", "low=1000", repo=target).stdout == (
        "version  step  tags  message\n      2  1000  best\n      3  1500        loss rises again\n"
    )
    assert run("sql", QUERY, "--param", "low=1000", "--csv", repo=target).stdout == (
        "version,step,tags,message\n2,1000,best,\n3,1500,,loss rises again\n"
    )
    assert json.loads(run("sql", QUERY, "-p", "low=1500", "--json", repo=target).stdout) == [
        {"version": 3, "step": 1500, "tags": "", "message": "loss rises again"}
    ]


def test_reads_the_query_from_standard_input(run: Run, target: str) -> None:
    query = "SELECT count(*) AS n FROM history\n"
    assert run("sql", "-", "--csv", repo=target, stdin=query).stdout == "n\n3\n"
    assert run("sql", "-", repo=target, stdin="").exit_code == 2


def test_numbers_and_texts_are_distinguished(run: Run, target: str) -> None:
    """A count compared with a text is silently wrong on SQLite, and an error on Postgres."""
    query = "SELECT branch FROM history GROUP BY branch HAVING count(*) >= :n"
    assert run("sql", query, "-p", "n=3", "--csv", repo=target).stdout == "branch\nmain\n"
    assert run("sql", query, "-p", "n=4", "--csv", repo=target).stdout == "branch\n"
    query = "SELECT version FROM history WHERE message || :end = :whole ORDER BY 1"
    args = ("-p", 'end="7"', "-p", "whole=after warm-up7")
    assert run("sql", query, *args, "--csv", repo=target).stdout == "version\n1\n"
    query = "SELECT version FROM metrics WHERE name = :name AND value < :most ORDER BY 1"
    args = ("-p", "name=val_loss", "-p", "most=1.9e0")
    assert run("sql", query, *args, "--csv", repo=target).stdout == "version\n2\n"


def test_no_rows(run: Run, target: str) -> None:
    result = run("sql", QUERY, "-p", "low=9999", repo=target)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no rows.\n")
    assert json.loads(run("sql", QUERY, "-p", "low=9999", "--json", repo=target).stdout) == []
    as_csv = run("sql", QUERY, "-p", "low=9999", "--csv", repo=target)
    assert (as_csv.stdout, as_csv.stderr) == ("version,step,tags,message\n", "")


def test_parameters_that_are_missing_or_unused_are_named(run: Run, target: str) -> None:
    refused = run("sql", "SELECT 1 WHERE :v = 1 AND :w = ':x'", "-p", "w=2", repo=target)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr.startswith("dcpstore: no value for :v; pass -p v=... ")
    unused = run("sql", "SELECT ':x' AS x", "-p", "x=1", "-p", "y=1", repo=target)
    assert (unused.exit_code, unused.stdout) == (2, "")
    assert "the query has no :x, :y." in unused.stderr
    wrong = run("sql", "SELECT * FROM nothing", repo=target)
    assert ".." not in wrong.stderr


def test_the_help_and_the_page_name_every_view(run: Run) -> None:
    shown = " ".join(run("sql", "--help").stdout.split())
    assert f"views to query are {', '.join([*VIEWS][:-1])} and {[*VIEWS][-1]}." in shown
    section = (ROOT / "docs" / "cli.md").read_text().split("## `dcpstore sql")[1].split("\n## ")[0]
    assert [view for view in VIEWS if f"`{view}`" not in section] == []


REFUSED: list[tuple[str, ...]] = [
    ("DELETE FROM metric",),
    ("SELECT * FROM nothing",),
    ("SELECT 1; SELECT 2",),
    (QUERY,),
    (QUERY, "-p", "low"),
    (QUERY, "-p", "1=2"),
    (QUERY, "-p", r'low="\x"'),
    (QUERY, "-p", "low=1", "--csv", "--json"),
    ("SELECT '\udcff'",),
    (QUERY, "-p", "low=\udcff"),
    ("SELECT version, version FROM history", "--json"),
]


def test_what_is_no_query_is_refused(run: Run, target: str, subtests: pytest.Subtests) -> None:
    for args in REFUSED:
        with subtests.test(args=args):
            result = run("sql", *args, repo=target)
            assert (result.exit_code, result.stdout) == (2, "")
            assert result.stderr
            assert ask_database(target, "SELECT count(*) FROM metric") == [(4,)]


def test_control_characters_are_visible(run: Run, catalog: Catalog, target: str) -> None:
    save_version(catalog, 4, message="\x1b[31mred")
    query = "SELECT message FROM history WHERE version = 4"
    assert run("sql", query, repo=target).stdout == "message\n\\x1b[31mred\n"
    assert run("sql", query, "--csv", repo=target).stdout == "message\n\x1b[31mred\n"
