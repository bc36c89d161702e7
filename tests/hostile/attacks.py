"""Attacks on a repository and on imports, each a function of an empty folder.

An attack tries what its name says, and asserts that it came to nothing: an error of ours, no code
run, no file touched outside of the repository. The tests and `make torture` try the same ones.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sqlite3
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

import dcpstore
from dcpstore import convert
from dcpstore.errors import (
    CorruptionError,
    DcpstoreError,
    InvalidInputError,
    UnsafeDataError,
)
from dcpstore.storage.operations import decode_operation
from dcpstore.upkeep.rebuild import rebuild
from tests.hostile.parsers import sign_operation

Attack = Callable[[Path], None]
ATTACKS: dict[str, Attack] = {}
NAMES = (
    "../../x",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a/../../b",
    "a\\..\\b",
    "zarr.json",
    "__0_0.distcp",
    ".metadata",
    "{{data}}",
    "%2e%2e%2fx",
    "a\x1b[2Jb",
    "a\nb",
    "'; DROP TABLE version; --",
    "file:///etc/passwd",
)


def attack(function: Attack) -> Attack:
    """Enter an attack by its name."""
    ATTACKS[function.__name__.replace("_", " ")] = function
    return function


class Touch:
    """What writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.path}'",)


def saved(folder: Path, state: dict[str, Any] | None = None) -> str:
    """Return the path of a repository with one version."""
    state = state or {"w": torch.arange(6.0), "lr": 0.1, "nested": {"a": [1, (2, 3)]}}
    dcpstore.save(state, folder / "repo", step=1, tags=["best"])
    return str(folder / "repo")


def dcp_folder(folder: Path, edit: Callable[[Metadata], None] = lambda _: None) -> Path:
    """Return a DCP folder whose description says what `edit` makes of it."""
    path = folder / "dcp"
    torch_checkpoint.save({"w": torch.arange(4.0), "lr": 0.1}, checkpoint_id=path, no_dist=True)
    described = pickle.loads((path / ".metadata").read_bytes())
    edit(described)
    (path / ".metadata").write_bytes(pickle.dumps(described))
    return path


def moved(**place: Any) -> Callable[[Metadata], None]:
    """Return an edit that lets everything lie elsewhere."""

    def edit(described: Metadata) -> None:
        for index, info in described.storage_data.items():
            said = {"relative_path": info.relative_path, "offset": info.offset}
            described.storage_data[index] = _StorageInfo(**{**said, "length": info.length, **place})

    return edit


def refuse(source: Path, folder: Path, kind: type[DcpstoreError]) -> None:
    """Assert that an import is refused, and that the repository shows nothing of it."""
    with dcpstore.open(folder / "into") as repo:
        with pytest.raises(kind):
            convert.import_any(source, repo)
        assert repo.log() == []


@contextmanager
def rows(repo: str) -> Iterator[sqlite3.Connection]:
    """Yield the catalog itself, past everything that dcpstore checks."""
    with closing(sqlite3.connect(f"{repo}/catalog.db")) as connection, connection:
        yield connection


# ---------------------------------------------------------------- pickles


@attack
def a_pickle_as_a_description(folder: Path) -> None:
    path = dcp_folder(folder)
    (path / ".metadata").write_bytes(pickle.dumps(Touch(folder / "stolen")))
    refuse(path, folder, UnsafeDataError)
    assert not (folder / "stolen").exists()


@attack
def a_pickle_inside_a_description(folder: Path) -> None:
    def edit(described: Metadata) -> None:
        described.planner_data = {"w": Touch(folder / "stolen")}

    refuse(dcp_folder(folder, edit), folder, UnsafeDataError)
    assert not (folder / "stolen").exists()


@attack
def a_pickle_as_a_value_of_a_dcp_folder(folder: Path) -> None:
    path = dcp_folder(folder)
    held = io.BytesIO()
    torch.save(Touch(folder / "stolen"), held)
    (path / "evil").write_bytes(held.getvalue())
    described = pickle.loads((path / ".metadata").read_bytes())
    for index in described.storage_data:
        if index.fqn == "lr":
            described.storage_data[index] = _StorageInfo("evil", 0, len(held.getvalue()))
    (path / ".metadata").write_bytes(pickle.dumps(described))
    refuse(path, folder, UnsafeDataError)
    assert not (folder / "stolen").exists()


@attack
def a_pickle_in_a_torch_file(folder: Path) -> None:
    torch.save({"w": torch.ones(2), "x": Touch(folder / "stolen")}, folder / "a.pt")
    refuse(folder / "a.pt", folder, UnsafeDataError)
    assert not (folder / "stolen").exists()


@attack
def a_pickle_in_a_torch_file_of_old(folder: Path) -> None:
    torch.save(
        {"x": Touch(folder / "stolen")}, folder / "a.pt", _use_new_zipfile_serialization=False
    )
    refuse(folder / "a.pt", folder, InvalidInputError)
    (folder / "b.pt").write_bytes(pickle.dumps(Touch(folder / "stolen")))
    refuse(folder / "b.pt", folder, InvalidInputError)
    assert not (folder / "stolen").exists()


@attack
def a_pickle_in_the_notes_of_safetensors(folder: Path) -> None:
    note = json.dumps({"x": {"$blob": "pickle"}})
    save_file({"w": torch.ones(2)}, folder / "a.safetensors", {"dcpstore.values": note})
    refuse(folder / "a.safetensors", folder, CorruptionError)


@attack
def a_pickle_as_a_blob_of_a_version(folder: Path) -> None:
    repo = folder / "repo"
    dcpstore.save({"x": Touch(folder / "stolen")}, repo, allow_pickle=True)
    with dcpstore.open(repo) as opened:
        for call in (
            opened.read,
            lambda: dcpstore.load({"x": 0}, opened),
            lambda: convert.export_torch(opened, None, folder / "o.pt"),
            lambda: convert.export_dcp(opened, None, folder / "o"),
            lambda: convert.export_safetensors(opened, None, folder / "o.safetensors"),
        ):
            with pytest.raises((UnsafeDataError, InvalidInputError)):
                call()
        assert opened.show().number == 1
        assert opened.verify(deep=True).damaged == ()
    assert not (folder / "stolen").exists()
    with dcpstore.open(repo) as opened:  # the pickle is one indeed
        opened.read(allow_pickle=True)
    assert (folder / "stolen").exists()


@attack
def a_pickle_in_a_value_row(folder: Path) -> None:
    repo = saved(folder)
    for text in ('{"$blob":"pickle"}', '{"$blob": "pickle"}', '[{"$blob":"pickle"}]'):
        with rows(repo) as catalog:
            catalog.execute("UPDATE entry SET value = ? WHERE fqn = 'lr'", (text,))
        with dcpstore.open(repo) as opened, pytest.raises((UnsafeDataError, CorruptionError)):
            opened.read()


# ---------------------------------------------------------------- places and links


@attack
def places_out_of_a_dcp_folder(folder: Path) -> None:
    (folder / "secret").write_bytes(b"x" * 10_000)
    for number, name in enumerate(("../secret", "/etc/passwd", str(folder / "secret"))):
        below = folder / str(number)
        below.mkdir()
        refuse(dcp_folder(below, moved(relative_path=name)), folder, UnsafeDataError)
    for number, name in enumerate(("a\0b", "x" * 5000, "a" + "/x" * 4000), start=9):
        below = folder / str(number)
        below.mkdir()
        refuse(dcp_folder(below, moved(relative_path=name)), folder, CorruptionError)


@attack
def links_out_of_imported_folders(folder: Path) -> None:
    save_file({"w": torch.ones(2)}, folder / "secret.safetensors")
    plain, indexed, circle = folder / "plain", folder / "indexed", folder / "circle"
    for made in (plain, indexed, circle):
        made.mkdir()
    (plain / "m.safetensors").symlink_to(folder / "secret.safetensors")
    refuse(plain, folder, UnsafeDataError)
    (indexed / "m.safetensors").symlink_to(folder / "secret.safetensors")
    (indexed / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": "m.safetensors"}})
    )
    refuse(indexed, folder, UnsafeDataError)
    (circle / "m.safetensors").symlink_to("m.safetensors")
    refuse(circle, folder, CorruptionError)
    path = dcp_folder(folder)
    shutil.move(path / "__0_0.distcp", folder / "elsewhere")
    (path / "__0_0.distcp").symlink_to(folder / "elsewhere")
    refuse(path, folder, UnsafeDataError)


@attack
def a_link_out_of_the_data_folder(folder: Path) -> None:
    repo = Path(saved(folder))
    shutil.move(repo / "packs", folder / "elsewhere")
    (repo / "packs").symlink_to(folder / "elsewhere")
    with dcpstore.open(repo) as opened:
        with pytest.raises(CorruptionError, match="leads out"):
            opened.read()
        with pytest.raises(DcpstoreError):
            dcpstore.save({"w": torch.ones(3)}, opened)
    assert len(list((folder / "elsewhere").rglob("*.pack"))) == 1


@attack
def names_that_lead_out_of_an_export(folder: Path) -> None:
    state = {name: torch.ones(2) for name in NAMES}
    repo = saved(folder, state)
    inside = folder / "exports" / "deep"
    inside.mkdir(parents=True)
    before = {path for path in folder.rglob("*") if inside not in path.parents}
    with dcpstore.open(repo) as opened:
        convert.export_zarr(opened, None, inside / "zarr")
        convert.export_dcp(opened, None, inside / "dcp")
        convert.export_torch(opened, None, inside / "torch.pt")
        convert.export_safetensors(opened, None, inside / "a.safetensors")
        convert.export_safetensors(opened, None, inside / "shards", max_shard_size=16)
        tree = opened.zarr()
        assert set(opened.read()) == set(NAMES)
        assert tree is not None
    assert {path for path in folder.rglob("*") if inside not in path.parents} == before
    found = torch.load(inside / "torch.pt")
    assert set(found) == set(NAMES)


@attack
def pack_keys_that_lead_out(folder: Path) -> None:
    repo = saved(folder)
    (folder / "secret").write_bytes(b"x" * 10_000)
    for key in ("../secret", "/etc/passwd", "packs/../../secret", "packs/\0", "x" * 5000):
        with rows(repo) as catalog:
            catalog.execute("UPDATE pack SET key = ?", (key,))
        with dcpstore.open(repo) as opened:
            with pytest.raises(DcpstoreError):
                opened.read()
            assert opened.verify(deep=True).damaged
    assert (folder / "secret").read_bytes() == b"x" * 10_000


# ---------------------------------------------------------------- giant claims


@attack
def giant_claims_in_a_dcp_folder(folder: Path) -> None:
    def shaped(described: Metadata) -> None:
        kind = described.state_dict_metadata["w"]
        whole = torch.Size([2**62])
        chunk = ChunkStorageMetadata(torch.Size([0]), whole)
        described.state_dict_metadata["w"] = TensorStorageMetadata(kind.properties, whole, [chunk])

    edits = (shaped, moved(offset=2**62), moved(length=2**62), moved(offset=-1), moved(length=0))
    for number, edit in enumerate(edits):
        (folder / str(number)).mkdir()
        refuse(dcp_folder(folder / str(number), edit), folder, CorruptionError)


@attack
def giant_claims_in_the_catalog(folder: Path) -> None:
    claims: list[tuple[str, str, str | int]] = [
        ("tensor", "shape", "[4611686018427387904]"),
        ("tensor", "shape", "[-1]"),
        ("tensor", "shape", "[12]"),
        ("part", "chunk_shape", "[4611686018427387904]"),
        ("part", "chunk_shape", "[0]"),
        ("part", "chunk_shape", "[]"),
        ("part", "offsets", "[4611686018427387904]"),
        ("part", "shape", "[3]"),
        ("chunk", "offset", 2**62),
        ("chunk", "length", 2**62),
    ]
    for number, (table, column, value) in enumerate(claims):
        repo = saved(folder / str(number))
        with rows(repo) as catalog:
            catalog.execute(f'UPDATE {table} SET "{column}" = ?', (value,))
        with dcpstore.open(repo) as opened, pytest.raises(DcpstoreError):
            opened.read(None, ["w"])


@attack
def a_tensor_spread_over_few_bytes(folder: Path) -> None:
    spread = torch.as_strided(torch.ones(1), (2**45,), (0,))
    torch.save({"w": spread}, folder / "a.pt")
    refuse(folder / "a.pt", folder, InvalidInputError)


@attack
def a_bomb_of_compressed_records(folder: Path) -> None:
    torch.save({"w": torch.ones(2)}, folder / "a.pt")
    with (
        zipfile.ZipFile(folder / "a.pt") as source,
        zipfile.ZipFile(folder / "b.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for record in source.infolist():
            bomb.writestr(record.filename, source.read(record))
        bomb.writestr("a/data/9", bytes(64 << 20))
    assert (folder / "b.pt").stat().st_size < 1 << 20
    refuse(folder / "b.pt", folder, InvalidInputError)
    path = dcp_folder(folder)
    shutil.copyfile(folder / "b.pt", path / "__0_0.distcp")
    size = (folder / "b.pt").stat().st_size
    described = pickle.loads((path / ".metadata").read_bytes())
    moved(offset=0, length=size)(described)
    (path / ".metadata").write_bytes(pickle.dumps(described))
    refuse(path, folder, InvalidInputError)


@attack
def states_nested_without_end(folder: Path) -> None:
    circle: dict[str, Any] = {}
    circle["a"] = circle
    torch.save(circle, folder / "a.pt")
    refuse(folder / "a.pt", folder, InvalidInputError)
    items: list[Any] = []
    items.append(items)
    torch.save({"a": items}, folder / "b.pt")
    refuse(folder / "b.pt", folder, InvalidInputError)


@attack
def paths_nested_without_end(folder: Path) -> None:
    note = json.dumps({"w": ["a"] * 100_000})
    save_file({"w": torch.ones(2)}, folder / "a.safetensors", {"dcpstore.paths": note})
    with dcpstore.open(folder / "repo") as repo:
        convert.import_any(folder / "a.safetensors", repo)
        convert.export_torch(repo, None, folder / "fine.pt")
    with rows(str(folder / "repo")) as catalog:
        catalog.execute("UPDATE entry SET path = ?", (json.dumps(["a"] * 100_000),))
    with dcpstore.open(folder / "repo") as repo, pytest.raises(InvalidInputError):
        convert.export_torch(repo, None, folder / "deep.pt")


@attack
def notes_of_safetensors_that_are_none(folder: Path) -> None:
    deep = "[" * 5000 + "]" * 5000
    for number, note in enumerate(("DCP_SHARDING_INFO", "dcpstore.values")):
        path = folder / f"{number}.safetensors"
        save_file({"w": torch.ones(2)}, path, {note: deep})
        refuse(path, folder, CorruptionError)


@attack
def values_nested_without_end_in_the_catalog(folder: Path) -> None:
    repo = saved(folder)
    for depth in (300, 900, 5000):
        with rows(repo) as catalog:
            value = "[" * depth + "]" * depth
            catalog.execute("UPDATE entry SET value = ? WHERE fqn = 'lr'", (value,))
        with dcpstore.open(repo) as opened:
            with pytest.raises(CorruptionError):
                opened.read()
            if depth > 400:
                with pytest.raises(CorruptionError):
                    opened.zarr()


# ---------------------------------------------------------------- journals


def journal(repo: str) -> list[dict[str, Any]]:
    """Return what the journal of a repository says."""
    return [decode_operation(p.read_bytes()) for p in sorted(Path(repo, "operations").iterdir())]


def rejournaled(repo: str, operations: list[dict[str, Any]]) -> None:
    """Let the journal say something else, with digests that are right."""
    for said in operations:
        body = json.dumps(said).encode()
        Path(repo, f"operations/{said['operation']:012}.json").write_bytes(sign_operation(body))


@attack
def a_journal_that_counts_without_end(folder: Path) -> None:
    repo = saved(folder)
    Path(repo, "operations/999999999999999999.json").write_bytes(b"{}")
    report = rebuild(repo, folder / "new")
    assert report.versions == (1,)
    assert len(report.problems) == 2


@attack
def a_journal_whose_parents_go_in_a_circle(folder: Path) -> None:
    repo = saved(folder)
    dcpstore.save({"w": torch.ones(2)}, repo)
    said = journal(repo)
    facts = [one["version"] for one in said if one["kind"] == "save"]
    facts[0]["parent"], facts[1]["parent"] = facts[1]["uid"], facts[0]["uid"]
    rejournaled(repo, said)
    shutil.rmtree(Path(repo, "manifests"))
    Path(repo, "manifests").mkdir()
    report = rebuild(repo, folder / "new")
    assert report.versions == ()
    assert report.lost == (1, 2)


@attack
def a_journal_that_names_what_is_no_pack(folder: Path) -> None:
    for number, key in enumerate(("catalog.db", "../x", "manifests/ab.json")):
        repo = saved(folder / str(number))
        said = journal(repo)
        for one in said[1:]:
            one["version"]["packs"] = [[key, 1]]
        rejournaled(repo, said)
        report = rebuild(repo, folder / f"new{number}")
        assert report.versions == ()
        assert report.problems


@attack
def a_journal_of_two_repositories(folder: Path) -> None:
    repo = saved(folder)
    dcpstore.save({"w": torch.ones(2)}, repo)
    said = journal(repo)
    for one in said:
        if "version" in one:
            one["version"]["number"] = 1
    rejournaled(repo, said)
    with pytest.raises(CorruptionError, match="not of one repository"):
        rebuild(repo, folder / "new")


def limits() -> tuple[int, int]:
    """Return what attacks must leave alone: the depth of recursion, and of digits in numbers."""
    return sys.getrecursionlimit(), sys.get_int_max_str_digits()
