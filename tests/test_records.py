"""Rows read by position, by name and as attributes; records show well in a notebook."""

import pickle
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest

from dcpstore.records import LoadReport, Row, Version

HOSTILE = "<script>alert('x')</script>&\"'"
VERSION = Version(
    number=12,
    parent=11,
    uid="ab" * 16,
    branch="main",
    step=1000,
    tags=("best",),
    message=HOSTILE,
    metrics={"val_loss": 1.87, HOSTILE: float("nan")},
    labels={"lr": HOSTILE},
    author=HOSTILE,
    created_at=datetime(2026, 3, 1, 10, 4, tzinfo=UTC),
    nbytes=4 << 20,
    nbytes_written=2 << 20,
    nbytes_reused=2 << 20,
    seconds={},
)


def test_row_reads_three_ways_and_survives_pickling() -> None:
    row = Row(["version", "count(*)"], [3, 7])
    assert (row[0], row["version"], row.version, row["count(*)"]) == (3, 3, 3, 7)
    assert row == (3, 7)
    assert dict(row) == {"version": 3, "count(*)": 7}
    copy = pickle.loads(pickle.dumps(row))
    assert (copy, copy.columns) == (row, row.columns)


def test_row_names_its_columns_when_asked_for_another() -> None:
    row = Row(["version"], [3])
    with pytest.raises(KeyError, match="there are version"):
        row["tag"]
    with pytest.raises(AttributeError):
        row.tag  # noqa: B018


class Shown(HTMLParser):
    """The tags and the text of a piece of HTML; each tag must be closed, in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.open.append(tag)
        assert {name for name, _ in attrs} <= {"style"}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_version_shows_in_one_line_and_in_a_notebook() -> None:
    assert repr(replace(VERSION, metrics={"val_loss": 1.87})) == (
        "<Version v12 of 'main', step 1000, tags best, val_loss=1.87, 4.0 MiB, "
        f"2026-03-01 10:04:00+00:00, {HOSTILE!r}>"
    )
    least = replace(VERSION, step=None, tags=(), message="", metrics={})
    assert repr(least) == "<Version v12 of 'main', 4.0 MiB, 2026-03-01 10:04:00+00:00>"
    shown = Shown(VERSION._repr_html_())
    assert shown.tags == {"div", "table", "tbody", "tr", "th", "td"}
    assert shown.texts[0] == "Version v12"
    assert shown.texts.count(HOSTILE) == 2  # the message and the author, as they are
    assert f"val_loss 1.87\n{HOSTILE} nan" in shown.texts
    assert "step" not in Shown(least._repr_html_()).texts


def test_a_load_report_shows_what_did_not_fit() -> None:
    report = LoadReport(
        VERSION, ("a", HOSTILE), (), 438, 3 << 20, {"read": 0.271}, cast=("c",) * 12
    )
    assert repr(report) == "<LoadReport of v12: 438 chunks, 3.0 MiB read; 2 missing; 12 cast>"
    texts = Shown(report._repr_html_()).texts
    assert texts[0] == "Load of v12 (main)"
    assert f"a, {HOSTILE}" in texts
    assert texts[texts.index("cast") + 1].endswith("c and 2 more")
    assert "unexpected" not in texts
