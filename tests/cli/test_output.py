"""Tables are aligned and fit; text from a repository is visible; numbers of bytes are readable."""

import os
import pty
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpstore.catalog.catalog import Catalog
from dcpstore.cli.output import human_bytes, visible
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


def on_terminal(*args: str, repo: str, columns: int) -> str:
    """Return what a command prints on a terminal of that width."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "dcpstore", *args],
        env=process_environment(repo) | {"COLUMNS": str(columns)},
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
    output = on_terminal("log", repo=target, columns=80)
    lines = output.splitlines()
    assert max(map(len, lines)) == 80
    assert lines[1].startswith("v4 ")
    assert lines[1].count("…") == 3
    assert "\x1b" not in output
    assert "\x1b" not in on_terminal(
        "sql", "SELECT message FROM history", "--csv", repo=target, columns=80
    )
    wide = on_terminal("log", repo=target, columns=1000)
    assert "t" * 60 in wide
    assert visible(message).rstrip() in wide


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_wide_characters_keep_the_columns_straight(catalog: Catalog, target: str) -> None:
    save_version(catalog, 4, message="更大" * 40)
    line = on_terminal("log", "-n", "1", repo=target, columns=80).splitlines()[1]
    shown = line.split("MiB")[1].strip()
    assert shown.endswith("…")
    assert 79 <= len(line) + shown.count("更") + shown.count("大") <= 80
