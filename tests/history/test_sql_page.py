"""The guide to SQL prints what its questions answer, on both databases."""

import os
import re
import sqlite3
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.schema.views import VIEWS
from dcpstore.catalog.write.saves import begin_save, commit_save
from dcpstore.cli.app import commands
from tests.catalog.conftest import make_content, make_draft
from tests.history.story import tell_story
from tests.ranks import ROOT
from tests.soundness import Place

PAGE = ROOT / "docs" / "guides" / "history-and-sql.md"
QUESTION = re.compile(r"```sql\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)


def test_the_page_answers_as_the_database_does(place: Place) -> None:
    with place.open() as repo:
        tell_story(repo.catalog)

    def ask(match: re.Match[str]) -> str:
        run = CliRunner(env={"DCPSTORE_REPO": place.url}).invoke(commands, ["sql", match[1]])
        assert run.exit_code == 0, run.output
        return f"```sql\n{match[1]}```\n\n```text\n{run.stdout}```"

    page = PAGE.read_text()
    fresh = QUESTION.sub(ask, page)
    if os.environ.get("DCPSTORE_WRITE_DOCS"):
        PAGE.write_text(fresh)
    assert len(QUESTION.findall(page)) == 10
    assert page == fresh, "run 'make docs' and look at the difference"


def test_the_page_lists_every_view_and_its_columns(place: Place) -> None:
    listed = re.findall(r"^\| `(\w+)` \|[^|]*\| `([\w, ]+)` \|$", PAGE.read_text(), re.MULTILINE)
    with place.open() as repo:
        tell_story(repo.catalog)
        columns = {name: repo.sql(f"SELECT * FROM {name}")[0].columns for name in VIEWS}
    assert {name: tuple(text.split(", ")) for name, text in listed} == columns


def test_no_answer_costs_more_than_in_proportion(place: Place, subtests: pytest.Subtests) -> None:
    """Four times the versions cost about four times the work, never sixteen times."""
    questions = [sql for sql, _ in QUESTION.findall(PAGE.read_text()) if "unique_bytes" not in sql]
    assert len(questions) == 9
    with place.open() as repo:
        work = []
        for first, last in ((0, 50), (50, 200)):
            _save(repo.catalog, first, last)
            work.append([_work(repo.catalog, sql) for sql in questions])
    for question, few, many in zip(questions, *work, strict=True):
        with subtests.test(question=question):
            assert many <= 1.5 * 4 * few


def _save(catalog: Catalog, first: int, last: int) -> None:
    """Save versions of two branches, in which all that the questions ask for is there."""
    with catalog.database.write() as connection:
        for i in range(first, last):
            draft = make_draft(
                f"{i:032x}",
                branch=("main", "try")[i % 2],
                step=i,
                metrics={"val_loss": 10 / (i + 1)},
                labels={"lr": "0.0003"},
            )
            begin_save(connection, draft)
            texts = {"model.embed.weight": "", "model.head.weight": f"{i}", "model.norm": f"n{i}"}
            commit_save(connection, draft.uid, make_content(draft.uid, texts))
    if not catalog.database.is_sqlite:  # what the server does by itself after a while
        with catalog.database.write() as connection:
            connection.exec_driver_sql("ANALYZE")


def _work(catalog: Catalog, sql: str) -> int:
    """Return how many rows each step of a query passed on or threw away; on SQLite, its steps."""
    with catalog.database.write() as connection:
        driver = connection.connection.driver_connection
        if isinstance(driver, sqlite3.Connection):
            steps = 0

            def count() -> None:
                nonlocal steps
                steps += 1

            driver.set_progress_handler(count, 1)
            try:
                driver.execute(sql).fetchall()
            finally:
                driver.set_progress_handler(None, 0)
            return steps
        explained = connection.exec_driver_sql(
            f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {sql.replace('%', '%%')}"
        )
        return sum(_rows(explained.scalar_one()[0]["Plan"]))


def _rows(node: dict[str, Any]) -> Iterator[float]:
    """Yield the rows of a step of a plan of Postgres, and of those below it."""
    for key in ("Actual Rows", "Rows Removed by Filter", "Rows Removed by Join Filter"):
        yield node.get(key, 0) * node["Actual Loops"]
    for below in node.get("Plans", ()):
        yield from _rows(below)
