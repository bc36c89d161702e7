"""`log` shows what the view `history` has, at any size, on any terminal."""

import json
import re
from datetime import datetime

import pytest

from dcpstore.catalog.catalog import Catalog
from tests.cli.conftest import Run, ask_database, run_process
from tests.cli.history import save_version

HISTORY = "SELECT version, branch, step, tags, message FROM history ORDER BY version DESC"


def shown(output: str) -> list[tuple[str, ...]]:
    """Return version, branch, step, tags and message of each line."""
    lines = [re.split(r" {2,}", line.rstrip()) for line in output.splitlines()]
    heads = ["VERSION", "BRANCH", "STEP", "TAGS", "WHEN", "BYTES", "METRICS", "MESSAGE"]
    assert lines[0] == heads
    return [(*cells[:4], cells[7] if len(cells) == 8 else "") for cells in lines[1:]]


def test_shows_what_the_history_view_has(run: Run, catalog: Catalog, target: str) -> None:
    save_version(catalog, 4, branch="try-lr", tags=("b", "a.1"), message="größer, 更大")
    rows = ask_database(target, HISTORY)
    assert len(rows) == 4
    assert shown(run("log", repo=target).stdout) == [
        (f"v{number}", branch, "-" if step is None else str(step), tags or "-", message)
        for number, branch, step, tags, message in rows
    ]
    records = json.loads(run("log", "--json", repo=target).stdout)
    assert rows == [
        (r["number"], r["branch"], r["step"], ",".join(r["tags"]), r["message"]) for r in records
    ]


def test_a_ref_shows_its_ancestors_and_a_limit_the_newest(
    run: Run, catalog: Catalog, target: str
) -> None:
    save_version(catalog, 4, branch="other")
    assert [row[0] for row in shown(run("log", "best", repo=target).stdout)] == ["v2", "v1"]
    assert [row[0] for row in shown(run("log", "main", "-n", "2", repo=target).stdout)] == [
        "v3",
        "v2",
    ]
    assert [row[0] for row in shown(run("log", "--limit", "1", repo=target).stdout)] == ["v4"]


def test_json_has_the_fields_of_a_version(run: Run, target: str) -> None:
    newest, tagged, _ = json.loads(run("log", "--json", repo=target).stdout)
    assert list(tagged) == [
        *("number", "parent", "uid", "branch", "step", "tags", "message", "metrics", "labels"),
        *("author", "host", "ranks", "created_at", "nbytes", "nbytes_written", "nbytes_reused"),
        "seconds",
    ]
    assert tagged["metrics"] == {"train_loss": 1.72, "val_loss": 1.87}
    assert tagged["created_at"] == "2026-03-01T10:04:00.000000+00:00"
    assert datetime.fromisoformat(newest["created_at"]).utcoffset() is not None


def test_shows_metrics_all_or_those_that_are_named(run: Run, catalog: Catalog, target: str) -> None:
    save_version(catalog, 4, metrics={"a\x1b": float("nan"), "b": -0.5})

    def metrics(*args: str) -> list[str]:
        lines = run("log", *args, repo=target).stdout.splitlines()
        return [re.split(r" {2,}", line)[6] for line in lines[1:]]

    every = ["a\\x1b=nan, b=-0.5", "val_loss=1.94", "train_loss=1.72, val_loss=1.87"]
    assert metrics()[:3] == every
    assert metrics("--branch", "main")[:3] == every  # without a glance
    assert metrics("--metric", "val_loss") == [
        "-",
        "val_loss=1.94",
        "val_loss=1.87",
        "val_loss=2.31",
    ]
    assert metrics("--metric", "train_loss", "--metric", "b")[:3] == [
        "b=-0.5",
        "-",
        "train_loss=1.72",
    ]


def test_an_empty_repository_has_an_empty_log(run: Run, empty: str) -> None:
    result = run("log", repo=empty)
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "no versions yet; dcpstore.save makes the first.\n"
    assert json.loads(run("log", "--json", repo=empty).stdout) == []


@pytest.mark.slow
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_thousand_versions(catalog: Catalog, empty: str) -> None:
    for i in range(1, 1001):
        save_version(catalog, i, step=10 * i, message=f"number {i}", metrics={"loss": 1 / i})
    result = run_process("log", repo=empty)
    assert shown(result.stdout) == [
        (f"v{i}", "main", str(10 * i), "-", f"number {i}") for i in range(1000, 0, -1)
    ]
    assert (result.returncode, result.stderr) == (0, "")


def test_a_message_cannot_reach_the_terminal(run: Run, catalog: Catalog, target: str) -> None:
    message = "red \x1b[31m title \x1b]0;x\x07 \x9b2J back \r two\nlines \u202eolleh"
    save_version(catalog, 4, message=message)
    result = run("log", "-n", "1", repo=target)
    assert all(line.isprintable() for line in result.stdout.splitlines())
    assert r"red \x1b[31m title \x1b]0;x\x07 \x9b2J back \r two\nlines \u202eolleh" in result.stdout
    as_json = run("log", "-n", "1", "--json", repo=target).stdout
    assert as_json.isascii()
    assert "\x1b" not in as_json
    assert json.loads(as_json)[0]["message"] == message


def test_not_a_number_is_null_in_json(run: Run, catalog: Catalog, target: str) -> None:
    save_version(catalog, 4, metrics={"loss": float("nan")})
    assert json.loads(run("show", "--json", repo=target).stdout)["metrics"] == {"loss": None}


def test_a_metric_to_show_is_one_of_some_version(run: Run, target: str) -> None:
    for more in ((), ("--graph",), ("--json",), ("--where", "val_loss>0")):
        result = run("log", "--metric", "VAL_LOS", *more, repo=target)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "no metric 'VAL_LOS'. Did you mean 'val_loss'" in result.stderr
    elsewhere = run("log", "-n", "1", "--metric", "train_loss", repo=target)  # v3 lacks it
    assert (elsewhere.exit_code, "v3" in elsewhere.stdout) == (0, True)


def test_a_label_cannot_be_two_texts(run: Run, target: str) -> None:
    twice = run("log", "--label", "lr=1", "--label", "lr=2", repo=target)
    assert (twice.exit_code, "two different texts" in twice.stderr) == (2, True)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("at", ["0001-01-01 00:00:00.000000", "9999-12-31 23:59:59.000000"])
@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/New_York"])
def test_times_at_the_ends_of_the_calendar_are_shown(
    target: str, monkeypatch: pytest.MonkeyPatch, at: str, zone: str
) -> None:
    ask_database(target, f"UPDATE version SET created_at = '{at}' WHERE number = 2")
    monkeypatch.setenv("TZ", zone)
    result = run_process("log", repo=target)
    assert (result.returncode, result.stdout.count("-01-01 ") + result.stdout.count("-12-31 ")) == (
        0,
        1,
    )


@pytest.mark.parametrize("option", ["--branch", "--tag", "--since", "--until", "--steps"])
def test_an_empty_filter_is_no_filter(run: Run, target: str, option: str) -> None:
    for flags in ([], ["--json"]):
        result = run("log", option, "", *flags, repo=target)
        assert (result.exit_code, result.stdout) in ((1, ""), (2, ""))


@pytest.mark.parametrize("limit", ["0", "-1", "x", "99999999999999999999"])
def test_an_invalid_limit(run: Run, empty: str, limit: str) -> None:
    result = run("log", "-n", limit, repo=empty)
    assert result.exit_code == 2
    assert ("'x' is not a whole number." in result.stderr) == (limit == "x")
