"""What a command loads: never torch, and what reads the history nothing that is slow to load."""

import subprocess
import sys
from pathlib import Path

import click
import pytest

from dcpstore.cli.commands import commands
from tests.cli.conftest import process_environment, run_process

HEAVY = ("torch", "numpy", "zarr", "numcodecs", "rich")
ARGS = {
    "init": ("new",),
    "log": (),
    "show": ("best",),
    "ls": ("best", "--long"),
    "diff": ("best", "main"),
    "tag": ("new",),
    "branch": ("next", "--at", "best"),
    "rollback": ("best",),
    "undo": (),
    "ops": (),
    "sql": ("SELECT * FROM history",),
    "db-upgrade": (),
    "expire": ("--keep-last", "1"),
    "gc": (),
    "status": (),
}
MOVES_TENSORS = (
    "import",
    "export",
    "verify",
    "rebuild",
    "copy",
)  # what they need is loaded once they run


def loaded(*args: str, repo: str, folder: Path) -> set[str]:
    """Return which heavy modules are loaded after a command."""
    script = (
        "import sys; from dcpstore.cli.commands import commands\n"
        "commands(sys.argv[1:], standalone_mode=False)\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, *args],
        env=process_environment(repo),
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert result.stdout
    return set(result.stderr.split()) & {*HEAVY, "alembic"}


def test_every_command_is_tried() -> None:
    assert {*ARGS, *MOVES_TENSORS} == set(commands.list_commands(click.Context(commands)))


@pytest.mark.parametrize("name", ARGS)
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_no_command_loads_torch(target: str, name: str, tmp_path: Path) -> None:
    migrates = {"alembic"} if name == "init" else set()
    assert loaded(name, *ARGS[name], repo=target, folder=tmp_path) == migrates


@pytest.mark.parametrize("args", [("--help",), *((name, "--help") for name in MOVES_TENSORS)])
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_help_loads_no_torch(target: str, args: tuple[str, ...], tmp_path: Path) -> None:
    assert loaded(*args, repo=target, folder=tmp_path) == set()


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_postgres_loads_no_more(target: str, tmp_path: Path) -> None:
    assert loaded("log", repo=target, folder=tmp_path) == set()


def test_importing_the_command_line_loads_nothing_heavy(tmp_path: Path) -> None:
    script = f"import sys, dcpstore.cli; assert not set(sys.modules) & {set(HEAVY)}"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, timeout=60)


def test_version_and_help() -> None:
    result = run_process("--version")
    assert result.stdout.startswith("dcpstore 0.")
    help_text = run_process("--help").stdout
    assert all(f"\n  {name} " in help_text for name in ARGS)
