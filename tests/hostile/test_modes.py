"""Who may read what is written, and how temporary files are called."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dcpstore
from dcpstore import convert
from dcpstore.convert.paths import new_file, new_folder
from dcpstore.storage.local import LocalFolder


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """A umask that is this process's while the test runs."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("umask", [0o077, 0o027, 0o002], indirect=True)
def test_the_umask_rules_every_file_and_folder(umask: int, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    with dcpstore.open(place / "repo") as repo:
        dcpstore.save({"w": torch.ones(3), "x": {1, 2}}, repo, tags=["t"])
        convert.export_zarr(repo, None, place / "zarr")
        convert.export_torch(repo, None, place / "a.pt")
        convert.export_dcp(repo, None, place / "dcp")
        convert.export_safetensors(repo, None, place / "a.safetensors")
        modes = {path: stat.S_IMODE(path.stat().st_mode) for path in place.rglob("*")}
    assert {path.suffix for path in modes} >= {".db", ".db-wal", ".pack", ".json", ".pt"}
    for path, mode in modes.items():
        whole = 0o777 if path.is_dir() else 0o666
        if path.name.startswith("catalog.db"):
            whole = 0o644  # SQLite's own choice, which no umask widens
        assert mode == whole & ~umask, path


def test_temporary_names_cannot_be_guessed_or_taken(tmp_path: Path) -> None:
    names = set()
    storage = LocalFolder(tmp_path)
    for number in range(20):
        sink = storage.create(f"packs/{number}.pack")
        sink.write(b"x")
        (name,) = (path.name for path in (tmp_path / "packs").iterdir())
        sink.discard()
        with new_file(tmp_path / "file"):
            (file,) = (p.name for p in tmp_path.iterdir() if p.name.startswith("file."))
        (tmp_path / "file").unlink()
        with new_folder(tmp_path / "folder") as folder:
            names |= {
                name.removeprefix(f"{number}.pack"),
                file.removeprefix("file"),
                folder.name.removeprefix("folder"),
            }
        folder.with_name("folder").rmdir()
    assert len(names) == 60  # none comes twice; of the longer ones, 20 digits are random
    assert len({name[:10] for name in names}) == 60
    assert [
        name for name in names if not re.fullmatch(r"\.([0-9a-f]{16}|[0-9a-f]{32})\.tmp", name)
    ] == []


def test_a_link_under_the_name_of_an_object_is_replaced_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    data = tmp_path / "data"
    (data / "packs").mkdir(parents=True)
    storage = LocalFolder(data)
    sink = storage.create("packs/a.pack")
    (data / "packs" / "a.pack").symlink_to(outside)  # after the name was looked at
    sink.write(b"theirs")
    sink.commit()
    assert outside.read_bytes() == b"mine"
    assert (data / "packs" / "a.pack").read_bytes() == b"theirs"
    assert not (data / "packs" / "a.pack").is_symlink()
