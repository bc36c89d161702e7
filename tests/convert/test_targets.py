"""What an export writes is there whole or not at all, and never replaces anything."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

import dcpstore
from dcpstore import AlreadyExistsError, CorruptionError, DcpstoreError
from dcpstore.convert import export_dcp, export_safetensors, export_torch, export_zarr
from dcpstore.convert.paths import new_file, new_folder

EXPORTS = [export_dcp, export_safetensors, export_torch, export_zarr]


@pytest.mark.parametrize("export", EXPORTS)
def test_damage_leaves_nothing_behind(tmp_path: Path, export: Callable[..., object]) -> None:
    (tmp_path / "out").mkdir()
    with dcpstore.open(tmp_path / "repo") as repo:
        dcpstore.save({"a": torch.randn(1000), "b": torch.randn(3_000_000)}, repo)
        (pack,) = (tmp_path / "repo").rglob("*.pack")
        data = bytearray(pack.read_bytes())
        data[len(data) // 2] ^= 1
        pack.write_bytes(data)
        with pytest.raises(CorruptionError, match="'b'"):
            export(repo, None, tmp_path / "out" / "x")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_is_seen_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with new_file(target) as file:
        file.write(b"half")
        file.flush()
        assert not target.exists()
        (beside,) = tmp_path.iterdir()
        assert beside.name.startswith("out.")
    assert target.read_bytes() == b"half"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_is_seen_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with new_folder(target) as folder:
        (folder / "inside").mkdir()
        (folder / "inside" / "a").write_text("a")
        assert not target.exists()
    assert (target / "inside" / "a").read_text() == "a"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("new", [new_file, new_folder])
def test_an_error_leaves_nothing_behind(
    tmp_path: Path, new: Callable[[Path], AbstractContextManager[object]]
) -> None:
    with pytest.raises(ZeroDivisionError), new(tmp_path / "out"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from dcpstore.convert import paths

with getattr(paths, sys.argv[1])(Path(sys.argv[2])) as new:
    if sys.argv[1] == "new_folder":
        (new / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def grow_old(folder: Path) -> None:
    """Make everything in a folder an hour old."""
    for path in folder.iterdir():
        os.utime(path, (time.time() - 3600,) * 2)


@pytest.mark.parametrize("new", [new_file, new_folder])
def test_the_next_export_removes_what_a_killed_one_left(
    tmp_path: Path, new: Callable[[Path], AbstractContextManager[object]]
) -> None:
    target = tmp_path / "out"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, new.__name__, str(target)], timeout=120, check=False
    )
    assert killed.returncode == -9
    (tmp_path / "other.0123456789abcdef.tmp").write_text("of another target")
    (tmp_path / "out.tmp").write_text("not of an export")
    assert len(list(tmp_path.iterdir())) == 3
    with new(target):
        assert len(list(tmp_path.iterdir())) == 4, "a fresh one may be of an export that begins"
    grow_old(tmp_path)
    with new(tmp_path / "elsewhere"):
        assert len(list(tmp_path.glob("out.*.tmp"))) == 1
    target.rename(tmp_path / "moved")
    with new(target):
        assert len(list(tmp_path.glob("out.*.tmp"))) == 1, "its own alone"
    assert {path.name for path in tmp_path.iterdir()} == {
        "elsewhere",
        "moved",
        "other.0123456789abcdef.tmp",
        "out",
        "out.tmp",
    }


@pytest.mark.parametrize("new", [new_file, new_folder])
def test_the_next_export_leaves_one_that_still_runs(
    tmp_path: Path, new: Callable[[Path], AbstractContextManager[object]]
) -> None:
    target = tmp_path / "out"

    def export_twice() -> None:
        with new(target):
            grow_old(tmp_path)
            with new(target):
                assert len(list(tmp_path.iterdir())) == 2

    with pytest.raises(AlreadyExistsError):
        export_twice()
    assert list(tmp_path.iterdir()) == [target]


def test_what_comes_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(AlreadyExistsError), new_file(tmp_path / "file"):
        (tmp_path / "file").write_text("theirs")
    with pytest.raises(AlreadyExistsError), new_folder(tmp_path / "folder"):
        (tmp_path / "folder").mkdir()
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}
    assert (tmp_path / "file").read_text() == "theirs"


def test_a_dangling_link_is_something(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(AlreadyExistsError), new_file(tmp_path / "out"):
        pass


def test_where_links_cannot_be_made_a_rename_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    with new_file(tmp_path / "out") as file:
        file.write(b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(DcpstoreError, match=r"out.*No space left"), new_file(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []
