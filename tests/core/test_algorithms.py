"""A second digest algorithm: what a later dcpstore that has one writes, beside older data."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dcpstore
from dcpstore import SchemaError
from dcpstore.core.digests import hasher

PACKAGE = Path(dcpstore.__file__).parent
# What it takes to give new contents another algorithm.
CHANGES = {
    '\nALGORITHM = "blake3"': '\nALGORITHM = "blake2s"',
    '{"blake3": blake3}': '{"blake3": blake3, "blake2s": __import__("hashlib").blake2s}',
}
TOMORROW = """
import sys, torch, dcpstore
from dcpstore.maintenance.rebuild import rebuild

folder, copy = sys.argv[1:]
with dcpstore.open(folder) as repo:
    assert repo.verify(deep=True).damaged == ()
    new = {"kept": torch.arange(1000), "changed": torch.ones(1000)}
    assert dcpstore.save(new, repo).number == 2
    assert dcpstore.save(new, repo).nbytes_written == 0
    assert repo.verify(deep=True).damaged == ()
    assert torch.equal(repo.read(1)["changed"], torch.zeros(1000))
    assert torch.equal(repo.read(2)["changed"], torch.ones(1000))
    print(sorted({row.algorithm for row in repo.sql("SELECT DISTINCT algorithm FROM layout")}))
rebuild(folder, copy)
with dcpstore.open(copy) as repo:
    assert repo.verify(deep=True).damaged == ()
    assert torch.equal(repo.read(2)["changed"], torch.ones(1000))
"""


@pytest.fixture
def tomorrow(tmp_path: Path) -> Path:
    """A folder with the package as it will be, migrations beside it."""
    folder = tmp_path / "tomorrow"
    shutil.copytree(PACKAGE, folder / "dcpstore", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PACKAGE.parent / "migrations", folder / "migrations")
    module = folder / "dcpstore" / "core" / "digests.py"
    text = module.read_text()
    for old, new in CHANGES.items():
        assert old in text
        text = text.replace(old, new)
    module.write_text(text)
    return folder


def test_another_algorithm_stands_beside_the_first(tmp_path: Path, tomorrow: Path) -> None:
    folder = tmp_path / "repo"
    with dcpstore.open(folder) as repo:
        dcpstore.save({"kept": torch.arange(1000), "changed": torch.zeros(1000)}, repo)
        data = Path(repo.storage.url)
    done = subprocess.run(
        [sys.executable, "-c", TOMORROW, str(folder), str(tmp_path / "copy")],
        cwd=tomorrow,
        env={"PYTHONPATH": str(tomorrow)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['blake2s', 'blake3']\n"
    named = {
        key: json.loads((data / key).read_text())["algorithm"]
        for key in repo_keys(data, "operations")
    }
    assert list(named.values()) == ["blake3", "blake3", "blake2s", "blake2s"]
    with dcpstore.open(folder) as repo:
        assert torch.equal(repo.read(1)["changed"], torch.zeros(1000))
        with pytest.raises(SchemaError, match=r"'blake2s'.*knows blake3. Update dcpstore"):
            repo.read(2)


def repo_keys(data: Path, folder: str) -> list[str]:
    return sorted(f"{folder}/{path.name}" for path in (data / folder).iterdir())


def test_an_unknown_algorithm_says_update() -> None:
    with pytest.raises(SchemaError, match=r"'md5'.*Update dcpstore"):
        hasher(b"", algorithm="md5")
