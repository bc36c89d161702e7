"""Tables are aligned and fit; text from a repository is visible; numbers of bytes are readable."""

import os
import pty
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpstore.catalog.catalog import Catalog
from dcpstore.cli.output import human_age, visible
from dcpstore.core.display import human_bytes, human_metrics
from tests.cli.conftest import process_environment
from tests.cli.history import save_version


@settings(deadline=None)
@given(st.text())
def test_visible_text_prints_and_keeps_what_printed(text: str) -> None:
    shown = visible(text)
    assert shown.isprintable()
    assert (shown == text) == text.isprintable()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (int(1.4 * 1024**3), "1.4 GiB"),
        (2**63, "8.0 EiB"),
        (5000 * 2**60, "5000.0 EiB"),
    ],
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("ago", "text"),
    [
        (timedelta(0), "0 seconds ago"),
        (timedelta(seconds=59), "59 seconds ago"),
        (timedelta(seconds=60), "1 minute ago"),
        (timedelta(hours=3, minutes=59), "3 hours ago"),
        (timedelta(days=13, hours=23), "13 days ago"),
        (timedelta(days=15), "2 weeks ago"),
        (timedelta(days=90), "2 months ago"),
        (timedelta(days=800), "2 years ago"),
        (timedelta(hours=-5), "in 5 hours"),
    ],
)
def test_human_age(ago: timedelta, text: str) -> None:
    now = datetime(2026, 3, 1, tzinfo=UTC)
    assert human_age(now - ago, now) == text


def test_metrics_stay_short_and_whole_numbers_whole() -> None:
    metrics = {"loss": 1 / 999, "tokens": 12345678.0, "nan": float("nan"), "x": 1e-300}
    assert human_metrics(metrics) == "loss=0.001001, tokens=12345678, nan=nan, x=1e-300"
    assert human_metrics(metrics, ["x", "none", "tokens"]) == "x=1e-300, tokens=12345678"
    assert human_metrics({"inf": float("inf")}) == "inf=inf"


def on_terminal(*args: str, repo: str, columns: int, **environment: str) -> str:
    """Return what a command prints on a terminal of that width, with 24 lines."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "dcpstore", *args],
        env=process_environment(repo)
        | {"COLUMNS": str(columns), "LINES": "24", "TERM": "xterm", "NO_COLOR": ""}
        | environment,
        stdin=theirs,
        stdout=theirs,
    ) as process:
        os.close(theirs)
        pieces = []
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # how Linux tells the end of a terminal
                break
            if not piece:
                break
            pieces.append(piece)
    os.close(ours)
    assert process.returncode == 0
    return b"".join(pieces).decode().replace("\r\n", "\n")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_terminal_cuts_long_texts_and_a_file_gets_them_whole(
    catalog: Catalog, target: str
) -> None:
    message = "word \x1b[0m" * 50
    save_version(catalog, 4, tags=("t" * 60,), branch="b" * 90, message=message, step=10**6)
    output = on_terminal("log", repo=target, columns=80, NO_COLOR="1")
    lines = output.splitlines()
    assert max(map(len, lines)) == 80
    assert lines[1].startswith("v4 ")
    assert lines[1].count("…") == 3
    assert " AGE " not in lines[0]
    assert "\x1b" not in output
    assert "\x1b" not in on_terminal(
        "sql", "SELECT message FROM history", "--csv", repo=target, columns=80
    )
    wide = on_terminal("log", repo=target, columns=1000, NO_COLOR="1")
    assert "t" * 60 in wide
    assert visible(message).rstrip() in wide


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_wide_characters_keep_the_columns_straight(catalog: Catalog, target: str) -> None:
    save_version(catalog, 4, message="更大" * 40)
    printed = on_terminal("log", "-n", "1", repo=target, columns=80, NO_COLOR="1")
    line = printed.splitlines()[1]
    shown = line.split("MiB")[1].strip().removeprefix("-").strip()
    assert shown.endswith("…")
    assert 79 <= len(line) + shown.count("更") + shown.count("大") <= 80


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_long_value_does_not_widen_the_other_rows_of_a_pipe(
    catalog: Catalog, target: str
) -> None:
    save_version(catalog, 4, message="m" * 9000, tags=("t" * 150,))
    query = "SELECT CASE version WHEN 4 THEN message ELSE '' END AS text, step FROM history"
    diff = on_pipe("diff", "v1", "v4", repo=target)
    for printed in (on_pipe("log", repo=target), on_pipe("sql", query, repo=target), diff):
        assert sorted(map(len, printed.splitlines()))[-2] < 200
    assert "m" * 9000 in on_pipe("log", repo=target)
    assert "t" * 150 in on_pipe("log", repo=target)


def on_pipe(*args: str, repo: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dcpstore", *args],
        env=process_environment(repo) | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
    )
    return done.stdout


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_colours_are_for_a_terminal_that_wants_them(target: str) -> None:
    plain = on_pipe("log", repo=target)
    assert "\x1b" not in plain
    for wide in (
        on_terminal("log", repo=target, columns=200),
        on_pipe("log", "--color", "always", repo=target),
    ):
        assert "\x1b[1mVERSION\x1b[0m" in wide
        assert "\x1b[33mv3\x1b[0m" in wide
    without = re.sub(r"\x1b\[[0-9;]*m", "", on_pipe("--color", "always", "log", repo=target))
    assert without == plain
    for environment, flags in (
        ({"NO_COLOR": "1"}, ()),
        ({"TERM": "dumb"}, ()),
        ({}, ("--color", "never")),
    ):
        assert "\x1b" not in on_terminal("log", *flags, repo=target, columns=200, **environment)
    insists = on_terminal("log", "--color", "always", repo=target, columns=200, NO_COLOR="1")
    assert "\x1b[33mv3" in insists


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_wide_terminal_also_shows_how_long_ago(target: str) -> None:
    wide = on_terminal("log", repo=target, columns=200, NO_COLOR="1")
    assert re.search(r"2026-03-01 \d\d:\d\d  \d+ (months|years?) ago", wide)
    assert " ago" not in on_pipe("log", repo=target)
    assert re.search(
        r"2026-03-01 .* \(\d+ \w+ ago\)", on_terminal("show", repo=target, columns=200)
    )
    assert "ago" not in on_pipe("show", repo=target)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_long_log_goes_through_the_pager_on_a_terminal(
    catalog: Catalog, target: str, tmp_path: Path
) -> None:
    for i in range(4, 40):
        save_version(catalog, i)
    pager = tmp_path / "pager"
    pager.write_text('#!/bin/sh\necho PAGED\ncat >"$0.got"\n')
    pager.chmod(0o755)
    paged = on_terminal("log", repo=target, columns=90, PAGER=str(pager), NO_COLOR="1")
    assert paged == "PAGED\n"
    got = (tmp_path / "pager.got").read_text().splitlines()
    assert (len(got), got[1].split()[0]) == (40, "v39")
    assert max(map(len, got)) <= 90
    ours = on_terminal("ops", repo=target, columns=90, PAGER="false", DCPSTORE_PAGER=str(pager))
    assert ours == "PAGED\n"
    for args in (("log", "--no-pager"), ("log", "-n", "22"), ("log", "--json")):
        assert "PAGED" not in on_terminal(*args, repo=target, columns=90, PAGER=str(pager))
    for none in ("", "cat"):
        assert on_terminal("log", repo=target, columns=90, PAGER=none).count("\n") == 40
    assert "PAGED" not in on_pipe("log", repo=target, PAGER=str(pager))
