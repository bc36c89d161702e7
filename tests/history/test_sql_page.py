"""The guide to SQL prints what its questions answer, on both databases."""

import os
import re

from click.testing import CliRunner

from dcpstore.catalog.schema.views import VIEWS
from dcpstore.cli.app import commands
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
