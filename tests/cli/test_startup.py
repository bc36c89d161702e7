"""What a command loads: never torch, and what reads the history nothing that is slow to load."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import pytest

from dcpstore.cli.app import commands
from tests.cli.conftest import process_environment, run_process

HEAVY = ("torch", "numpy", "zarr", "numcodecs", "rich")
ARGS = {
    "log": (),
    "show": ("best",),
    "ls": ("best", "--long"),
    "diff": ("best", "main"),
    "tag": ("new",),
    "best": ("val_loss",),
    "metric": ("best", "late=1"),
    "label": ("best", "eval=done"),
    "completion": ("bash",),
    "doctor": (),
    "branch": ("next", "--at", "best"),
    "rollback": ("best",),
    "undo": (),
    "ops": (),
    "sql": ("SELECT * FROM history",),
    "db-upgrade": (),
    "expire": ("--keep-last", "1"),
    "forget": ("best", "--force", "--dry-run"),
    "gc": (),
    "status": (),
    "init": ("new",),  # last, for it loads more
}
MOVES_TENSORS = (
    "import",
    "export",
    "references",
    "verify",
    "rebuild",
    "copy",
)  # what they need is loaded once they run


RUN_EACH = """
import contextlib, io, json, sys
from dcpstore.cli.app import commands
for args in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        commands(args, standalone_mode=False)
    assert said.getvalue(), args
    print(json.dumps([*sys.modules]))
"""


def loaded(
    *each: Sequence[str], repo: str, folder: Path, among: Sequence[str] = (*HEAVY, "alembic")
) -> list[set[str]]:
    """Run commands in one process, and return which heavy modules are loaded after each."""
    result = subprocess.run(
        [sys.executable, "-c", RUN_EACH, json.dumps(each)],
        env=process_environment(repo),
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return [{*json.loads(line)} & {*among} for line in result.stdout.splitlines()]


def test_every_command_is_tried() -> None:
    assert {*ARGS, *MOVES_TENSORS} == set(commands.list_commands(click.Context(commands)))


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_no_command_loads_torch(target: str, tmp_path: Path) -> None:
    heavy = loaded(*((name, *args) for name, args in ARGS.items()), repo=target, folder=tmp_path)
    found = dict(zip(ARGS, heavy, strict=True))
    assert found.pop("init") == {"alembic"}  # which migrates
    assert found == {name: set() for name in found}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_plain_log_loads_no_sqlalchemy(target: str, tmp_path: Path) -> None:
    plain = (["log"], ["log", "-n", "2"], ["log", "--graph"])
    all_ways = loaded(*plain, ["log", "main"], repo=target, folder=tmp_path, among=["sqlalchemy"])
    assert all_ways == [set(), set(), set(), {"sqlalchemy"}]


def test_the_list_of_commands_loads_none_of_them(tmp_path: Path) -> None:
    modules = [
        "sqlalchemy",
        *HEAVY,
        *(f"dcpstore.cli.{name}" for name in ("log", "repositories", "refs")),
    ]
    assert loaded(["--help"], repo="", folder=tmp_path, among=modules) == [set()]


def test_the_help_of_every_command_loads_no_library_that_is_slow(tmp_path: Path) -> None:
    names = commands.list_commands(click.Context(commands))
    helps = [["--help"], *([name, "--help"] for name in names)]
    slow = [*HEAVY, "alembic", "sqlalchemy", "dcpstore.repository"]
    heavy = loaded(*helps, repo="", folder=tmp_path, among=slow)
    assert {name: found for name, found in zip(["", *names], heavy, strict=True) if found} == {}


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_postgres_loads_no_more(target: str, tmp_path: Path) -> None:
    assert loaded(["log"], repo=target, folder=tmp_path) == [set()]


def test_importing_the_command_line_loads_nothing_heavy(tmp_path: Path) -> None:
    script = f"import sys, dcpstore.cli; assert not set(sys.modules) & {set(HEAVY)}"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, timeout=60)


def test_version_and_help() -> None:
    result = run_process("--version")
    assert result.stdout.startswith("dcpstore 0.")
    help_text = run_process("--help").stdout
    assert all(f"\n  {name} " in help_text for name in ARGS)


def test_the_command_line_runs_again_in_one_process() -> None:
    code = (
        "import sys; from dcpstore.cli import main\n"
        "for _ in range(2):\n"
        "    sys.argv = ['dcpstore', 'gc', '--help']\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code\n"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
