"""References of real versions, read by plain Zarr: by script, by dcpstore, and of tagged ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr

import dcpstore
from dcpstore import ChunkDefaults, Repository
from dcpstore.errors import CorruptionError, NotFoundError
from dcpstore.formats.manifest import manifest_key
from dcpstore.zarr.stored_references import reference_key
from tests.zarr.test_plain_zarr import read_plainly


@pytest.fixture
def repo(tmp_path: Path) -> Iterator[Repository]:
    """A repository whose chunks are small, so that tensors are large."""
    with dcpstore.open(tmp_path / "ckpts", chunk=ChunkDefaults(nbytes=1 << 10)) as opened:
        yield opened


def state(step: int) -> dict[str, Any]:
    """Return tensors with runs, padding, parts or no chunk, blobs and values."""
    return {
        "model": {
            "large": torch.arange(5000) + (torch.arange(5000) == step),
            "half": torch.linspace(-1, 1, 40).to(torch.bfloat16) * step,
            "padded": torch.arange(999.0).reshape(37, 27),
            "empty": torch.zeros(0, 3),
            "scalar": torch.tensor(0.5 * step),
            "sparse": torch.eye(40).to_sparse(),
        },
        "step": step,
        "note": "x" * 70_000,
        "betas": (0.9, float("nan")),
    }


def run_script(repo: Repository, *arguments: str) -> Any:
    """Return the reference that the script in the data folder writes."""
    done = end_of_script(repo, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def end_of_script(repo: Repository, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Return how the script in the data folder ends, with no package in reach."""
    return subprocess.run(
        [
            sys.executable,
            "-S",
            "-I",
            "-W",
            "error",
            f"{repo.storage.url}/references.py",
            *arguments,
        ],
        capture_output=True,
        text=True,
        check=False,
    )


def assert_reads(reference: Any, repo: Repository, ref: str, folder: Path) -> None:
    """Check that plain Zarr reads by a reference what dcpstore reads."""
    path = folder / "reference.json"
    path.write_text(json.dumps(reference))
    found = read_plainly(path)["arrays"]
    group = zarr.open_group(repo.zarr(ref), mode="r")
    arrays = {name: node for name, node in group.members(max_depth=None) if hasattr(node, "dtype")}
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name][2] == array[...].tobytes().hex(), name


def test_every_version_opens_in_plain_zarr(repo: Repository, tmp_path: Path) -> None:
    for step in range(3):
        dcpstore.save(state(step), repo, step=step)
    for number in (1, 2, 3):
        reference = run_script(repo, f"v{number}")
        assert reference == repo.references(number)
        assert reference == run_script(repo, repo.show(number).uid)
        assert_reads(reference, repo, f"v{number}", tmp_path)
    attributes = json.loads(repo.references(2)["refs"]["zarr.json"])["attributes"]
    assert attributes["step"] == 1
    assert attributes["values"]["step"] == 1
    assert "plain Zarr" not in (tmp_path / "ckpts" / "README.txt").read_text().splitlines()[0]


def test_the_script_finds_a_number_in_segments_of_the_journal(repo: Repository) -> None:
    dcpstore.save(state(0), repo)
    for i in range(60):
        repo.tag(f"t{i}")
    dcpstore.save(state(1), repo)
    assert any(key.endswith(".segment") for key in repo.storage.list("operations"))
    for number in (1, 2):
        assert run_script(repo, str(number)) == repo.references(number)
    for unknown in ("3", "v0", "best"):
        done = end_of_script(repo, unknown)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"names no version '{unknown}'; give a number or a uid" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_reference_says_where_its_readers_find_the_data(repo: Repository) -> None:
    dcpstore.save(state(0), repo)
    assert repo.references()["templates"] == {"data": repo.storage.url}
    assert repo.references(data="s3://bucket/x")["templates"] == {"data": "s3://bucket/x"}
    with pytest.raises(NotFoundError, match="v7"):
        repo.references(7)


def test_a_damaged_page_is_not_referred_to(repo: Repository, tmp_path: Path) -> None:
    version = dcpstore.save(state(0), repo)
    path = tmp_path / "ckpts" / "pages" / f"{version.uid}.page"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptionError, match="damaged"):
        repo.references()


def test_tagged_versions_have_a_reference_that_follows_their_chunks(
    repo: Repository, tmp_path: Path
) -> None:
    big = torch.randn(100_000)
    dcpstore.save({"big": big, **state(0)}, repo)
    second = dcpstore.save(state(0), repo, tags=["kept"])
    third = dcpstore.save(state(3), repo)
    repo.tag("later", third)
    repo.tag("gone", "v1")

    def stored(uid: str) -> Any:
        return json.loads(repo.storage.get(reference_key(uid)))

    for version in (second, third):
        assert stored(version.uid) == repo.references(version)
    repo.delete_tag("gone")
    first = repo.show(1).uid
    repo.forget(1)
    assert repo.gc(grace="0s").repacked
    assert stored(second.uid) == repo.references("kept")
    for version in (second, third):
        assert_reads(stored(version.uid), repo, str(version), tmp_path)
    assert set(repo.storage.list("references")) == {
        reference_key(second.uid),
        reference_key(third.uid),
    }
    assert first not in {second.uid, third.uid}


def test_gc_writes_references_that_are_missing_and_deletes_those_of_untagged_versions(
    repo: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    version = dcpstore.save(state(0), repo)
    manifest = repo.storage.get(manifest_key(version.uid))
    repo.storage.delete(manifest_key(version.uid))
    repo.tag("best")
    assert "is not written yet" in caplog.text
    repo.storage.put(manifest_key(version.uid), manifest)
    assert list(repo.storage.list("references")) == []
    repo.gc()
    assert list(repo.storage.list("references")) == [reference_key(version.uid)]
    repo.delete_tag("best")
    assert repo.gc().cleared == (reference_key(version.uid),)
