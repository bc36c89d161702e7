"""Attacks by what is imported: DCP folders, torch files, safetensors."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
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
from dcpstore.errors import CorruptionError, DcpstoreError, InvalidInputError, UnsafeDataError
from tests.hostile.attacks import Attack, Touch, entering

ATTACKS: dict[str, Attack] = {}

attack = entering(ATTACKS)


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
            place_in_file = {"relative_path": info.relative_path, "offset": info.offset}
            described.storage_data[index] = _StorageInfo(
                **{**place_in_file, "length": info.length, **place}
            )

    return edit


def refuse(source: Path, folder: Path, kind: type[DcpstoreError]) -> None:
    """Assert that an import is refused, and that the repository shows nothing of it."""
    with dcpstore.open(folder / "into") as repo:
        with pytest.raises(kind):
            convert.import_any(source, repo)
        assert repo.log() == []


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
def notes_of_safetensors_that_are_none(folder: Path) -> None:
    deep = "[" * 5000 + "]" * 5000
    for number, note in enumerate(("DCP_SHARDING_INFO", "dcpstore.values")):
        path = folder / f"{number}.safetensors"
        save_file({"w": torch.ones(2)}, path, {note: deep})
        refuse(path, folder, CorruptionError)
