"""What a repository says reaches a terminal escaped, and JSON exactly."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import dcpstore
from dcpstore.cli.app import commands

EVIL = "a\x1b[2J\x1b]0;owned\x07\r\x08\x9b31m\u202e\u2028\x0b\x85b"


@pytest.fixture
def repo(made: str, tmp_path: Path) -> str:
    """A repository in which everything that can be evil is, and two versions that differ."""
    return shutil.copytree(made, str(tmp_path / "repo"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The one that each test copies."""
    path = str(tmp_path_factory.mktemp("made") / "repo")
    for step in (1, 2):
        state = {EVIL: torch.full((2,), step), "value": EVIL, f"k{EVIL}": {EVIL: step}}
        dcpstore.save(
            state,
            path,
            step=step,
            message=f"{EVIL}\nsecond line {EVIL}",
            labels={EVIL: EVIL},
            metrics={EVIL: 0.5},
            author=EVIL,
        )
    with dcpstore.open(path) as opened:
        opened.tag("t", 1)
        opened.tag("undone", 1)
    with closing(sqlite3.connect(f"{path}/catalog.db")) as catalog, catalog:
        catalog.execute("UPDATE ref SET name = ? WHERE kind = 'tag' AND name = 't'", (EVIL,))
        catalog.execute("UPDATE operation SET target = ? WHERE target = 'undone'", (EVIL,))
        catalog.execute("UPDATE operation SET author = ?", (EVIL,))
    return path


COMMANDS = [
    ["log"],
    ["log", "--graph"],
    ["log", "--where", f"{EVIL}x<1"],
    ["log", "--label", f"{EVIL}={EVIL}"],
    ["log", "--branch", EVIL],
    ["show"],
    ["show", "1"],
    ["show", EVIL],
    ["ls"],
    ["ls", "-l"],
    ["ls", "1", f"{EVIL}x*"],
    ["diff", "1", "2"],
    ["diff", "1", "2", "--stats", "--all"],
    ["diff", "1", "2", "--depth", "1"],
    ["tag"],
    ["tag", "-d", EVIL],
    ["tag", EVIL],
    ["branch"],
    ["ops"],
    ["undo"],
    ["sql", "SELECT * FROM history"],
    ["sql", "SELECT fqn, value FROM entries"],
    ["sql", f'SELECT 1 AS "{EVIL}"'],
    ["sql", f"SELECT nothing AS x FROM history -- {EVIL}"],
    ["expire", "--keep-best", f"{EVIL}:1", "--explain", "--dry-run"],
    ["verify", "--deep"],
]


@pytest.mark.parametrize("args", COMMANDS, ids=lambda args: " ".join(args)[:24].encode().hex()[:32])
def test_nothing_that_a_terminal_obeys_is_printed(repo: str, args: list[str]) -> None:
    done = CliRunner().invoke(commands, [args[0], "--repo", repo, *args[1:]])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    printed = done.stdout + done.stderr
    assert printed
    assert [c for c in printed if not c.isprintable() and c != "\n"] == []


def test_json_is_exact(repo: str) -> None:
    def ask(*args: str) -> object:
        done = CliRunner().invoke(commands, [args[0], "--repo", repo, "--json", *args[1:]])
        assert done.stdout.isascii()
        return json.loads(done.stdout)

    shown = ask("show", "1")
    assert isinstance(shown, dict)
    assert shown["message"] == f"{EVIL}\nsecond line {EVIL}"
    assert shown["labels"] == {EVIL: EVIL}
    assert shown["metrics"] == {EVIL: 0.5}
    assert shown["author"] == EVIL
    entries = ask("ls")
    assert isinstance(entries, list)
    assert {entry["fqn"] for entry in entries} == {EVIL, "value", f"k{EVIL}.{EVIL}"}
    assert EVIL in [entry["value"] for entry in entries]
    rows = ask("sql", "SELECT message FROM history")
    assert rows == [{"message": f"{EVIL}\nsecond line {EVIL}"}] * 2


def test_an_error_keeps_its_lines_and_no_others(repo: str) -> None:
    done = CliRunner().invoke(commands, ["show", "--repo", repo, "a\x0b\x85\u2028b"])
    assert done.stderr.count("\n") == 1
    assert "\\x0b" in done.stderr
