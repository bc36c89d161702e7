"""A repository on a read-only mount: all of it can be read, and a change says why it fails."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dcpstore
from dcpstore.catalog.db.sqlite_file import is_at_rest

# Run in a mount namespace of its own, where the folder is mounted again, without writes.
MOUNT = """
mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" || exit 77
shift
exec "$@"
"""
READ = """
import sys, torch, dcpstore
from dcpstore.errors import DcpstoreError

with dcpstore.open(sys.argv[1]) as repo:
    assert repo.log()[0].tags == ("best",)
    assert repo.sql("SELECT count(*) AS n FROM history")[0].n == 1
    state = {"w": torch.zeros(3)}
    dcpstore.load(state, repo, "best")
    assert state["w"].tolist() == [1, 1, 1]
    try:
        repo.tag("worst")
    except DcpstoreError as error:
        print(error)
"""
OPEN = "import sys, dcpstore; dcpstore.open(sys.argv[1], create=False)"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A closed repository with one version."""
    with dcpstore.open(tmp_path / "repo") as repo:
        dcpstore.save({"w": torch.ones(3)}, repo, tags=["best"])
    return tmp_path / "repo"


def run_read_only(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command to which a folder is a read-only mount."""
    mounted = ["unshare", "--map-root-user", "--mount", "bash", "-c", MOUNT, "-", str(folder)]
    try:
        done = subprocess.run(
            [*mounted, *command], capture_output=True, text=True, timeout=300, check=False
        )
    except FileNotFoundError:
        pytest.skip("needs unshare")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this user may not mount")
    return done


def test_everything_is_read_and_a_change_is_refused(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    done = run_read_only(folder, sys.executable, "-c", READ, str(folder))
    assert done.returncode == 0, done.stderr
    assert "is not writable" in done.stdout
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("args", [("log",), ("log", "--branch", "main"), ("verify",)])
def test_commands_that_read(folder: Path, args: tuple[str, ...]) -> None:
    command = (sys.executable, "-m", "dcpstore", *args, "--repo", str(folder))
    done = run_read_only(folder, *command)
    assert done.returncode == 0, done.stderr


def test_changes_of_a_program_that_has_it_open_are_seen(folder: Path) -> None:
    with dcpstore.open(folder) as repo:
        repo.tag("second", "best")
        assert Path(f"{folder / 'catalog.db'}-wal").stat().st_size
        done = run_read_only(folder, sys.executable, "-m", "dcpstore", "tag", "--repo", str(folder))
    assert done.returncode == 0, done.stderr
    assert "second" in done.stdout


def test_a_log_that_cannot_be_read_names_the_way_out(folder: Path) -> None:
    with dcpstore.open(folder) as repo:
        repo.tag("second", "best")
        log = Path(f"{folder / 'catalog.db'}-wal").read_bytes()
    Path(f"{folder / 'catalog.db'}-wal").write_bytes(log)  # a killed writer left it, alone
    done = run_read_only(folder, sys.executable, "-c", OPEN, str(folder))
    assert "read a copy of the folder" in done.stderr
    with sqlite3.connect(folder / "catalog.db") as connection:
        assert connection.execute("SELECT count(*) FROM ref WHERE name = 'second'").fetchone()


@pytest.mark.parametrize("name", ["missing/catalog.db", "catalog.db", "x" * 300, "x\0y"])
def test_a_missing_catalog_is_not_at_rest(tmp_path: Path, name: str) -> None:
    assert not is_at_rest(tmp_path / name)
