"""Storages are read where they are, whatever packed the archive and whatever it claims."""

from __future__ import annotations

import io
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.serialization import config

import dcpstore
from dcpstore import CorruptionError, InvalidInputError, Repository
from dcpstore.convert import export_torch, import_torch
from dcpstore.convert.torch_files import _write
from tests.convert.states import FOREIGN, assert_holds, same
from tests.tensors import raw

pytestmark = pytest.mark.slow_on_postgres

CENTRAL = b"PK\x01\x02"


def some_state(seed: int, *, tensors: int = 25) -> dict[str, torch.Tensor]:
    """Return tensors of all dtypes, of sizes around and far from where records are aligned."""
    torch.manual_seed(seed)
    chosen = random.Random(seed)
    sizes = (0, 1, 7, chosen.randrange(20, 200), chosen.randrange(200, 5000))
    return {f"p{i}": raw(chosen.choice(FOREIGN), chosen.choice(sizes)) for i in range(tensors)}


def loads(path: Path) -> list[dict[str, torch.Tensor]]:
    """Return what `torch.load` makes of a file in each of its ways, computed places among them."""
    plain = [torch.load(path, weights_only=True, mmap=mapped) for mapped in (False, True)]
    with config.patch("load.calculate_storage_offsets", True):
        return [*plain, torch.load(path, weights_only=True, mmap=True)]


@pytest.mark.parametrize("seed", range(6))
def test_an_export_is_read_in_every_way(repo: Repository, tmp_path: Path, seed: int) -> None:
    state = some_state(seed)
    dcpstore.save(state, repo)
    export_torch(repo, None, tmp_path / "out.pt")
    for back in loads(tmp_path / "out.pt"):
        assert [name for name in state if not same(back[name], state[name])] == []
    version = import_torch(tmp_path / "out.pt", repo)
    assert_holds(repo, version.number, state)


def test_an_export_passes_torchs_own_check_of_places(
    repo: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = some_state(9)
    dcpstore.save(state, repo)
    export_torch(repo, None, tmp_path / "out.pt")
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")
    for back in loads(tmp_path / "out.pt"):
        assert all(same(back[name], state[name]) for name in state)


def repacked(
    source: Path,
    target: Path,
    write: Callable[[zipfile.ZipFile, str, bytes], None] = zipfile.ZipFile.writestr,
    *,
    reverse: bool = False,
) -> None:
    """Pack an archive's records again, each by `write`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        names = sorted(old.namelist(), reverse=True) if reverse else old.namelist()
        for name in names:
            write(new, name, old.read(name))


def as_older_dcpstore(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Write a record as older dcpstore did: aligned, with other headers than torch writes."""
    _write(archive, name.partition("/")[2], [memoryview(data)])


def padded(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Write a record with more in the header, and a comment in the directory alone."""
    record = zipfile.ZipInfo(name)
    record.extra = b"\x01\x99\x05\x00hello"
    record.comment = b"x" * 77
    archive.writestr(record, data)


def with_folders(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Write a record after its folders' own."""
    for folder in (name.partition("/")[0] + "/", name.rpartition("/")[0] + "/"):
        if folder not in archive.namelist():
            archive.writestr(folder, b"")
    archive.writestr(name, data)


def in_another_root(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Write a record in a folder whose name needs UTF-8."""
    archive.writestr("größer als/" + name.partition("/")[2], data)


def without_byteorder(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Write a record, unless it is one that torch before 2.1 did not write."""
    if not name.endswith("byteorder"):
        archive.writestr(name, data)


PACKERS = (
    zipfile.ZipFile.writestr,
    as_older_dcpstore,
    padded,
    with_folders,
    in_another_root,
    without_byteorder,
)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("write", PACKERS, ids=lambda write: write.__name__)
def test_an_archive_packed_again_comes_in(
    repo: Repository, tmp_path: Path, write: Callable[..., None], reverse: bool
) -> None:
    state = some_state(17)
    base = torch.arange(600.0).reshape(20, 30)
    views = {"tied": base, "turned": base.t(), "part": base[3:9, ::2]}
    torch.save(state | views, tmp_path / "in.pt")
    repacked(tmp_path / "in.pt", tmp_path / "again.pt", write, reverse=reverse)
    read = torch.load(tmp_path / "again.pt", weights_only=True)
    assert all(same(read[name], tensor) for name, tensor in (state | views).items())
    import_torch(tmp_path / "again.pt", repo)
    assert_holds(repo, "main", state | views)


def test_what_torch_is_set_to_changes_nothing(repo: Repository, tmp_path: Path) -> None:
    state = some_state(23)
    with config.patch({"save.storage_alignment": 4096}):
        torch.save(state, tmp_path / "wide.pt")
    torch.serialization.set_crc32_options(False)  # the checksums are then none that zipfile knows
    try:
        torch.save(state, tmp_path / "unsummed.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    for name in ("wide.pt", "unsummed.pt"):
        with config.patch({"load.calculate_storage_offsets": True, "load.mmap": True}):
            version = import_torch(tmp_path / name, repo)
        assert_holds(repo, version.number, state)


def test_a_link_and_a_long_name_change_nothing(repo: Repository, tmp_path: Path) -> None:
    state = some_state(29)
    torch.save(state, tmp_path / f"{'ü' * 100}.pt")  # torch names the records by the file
    os.symlink(tmp_path / f"{'ü' * 100}.pt", tmp_path / "link")
    import_torch(tmp_path / "link", repo)
    assert_holds(repo, "main", state)


def archive_of(state: Any) -> bytearray:
    """Return what torch.save writes."""
    data = io.BytesIO()
    torch.save(state, data)
    return bytearray(data.getvalue())


def headers(data: bytearray) -> tuple[int, int]:
    """Return where the own header and the directory's of the first storage lie."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        own = archive.getinfo("archive/data/0").header_offset
    at = data.find(CENTRAL)
    while b"archive/data/0" not in data[at + 46 : at + 46 + 14]:
        at = data.find(CENTRAL, at + 1)
    return own, at


def set_bytes(data: bytearray, at: int, value: int, width: int) -> None:
    """Write a number into an archive."""
    data[at : at + width] = value.to_bytes(width, "little")


def longer_extra(data: bytearray) -> None:
    set_bytes(data, headers(data)[0] + 28, 0xFFFF, 2)


def extra_over_the_next_record(data: bytearray) -> None:
    own, _ = headers(data)
    length = int.from_bytes(data[own + 28 : own + 30], "little")
    set_bytes(data, own + 28, length + 64, 2)


def no_header(data: bytearray) -> None:
    data[headers(data)[0]] = 0


def header_of_another(data: bytearray) -> None:
    set_bytes(data, headers(data)[1] + 42, 0, 4)


def header_past_the_end(data: bytearray) -> None:
    set_bytes(data, headers(data)[1] + 42, len(data) - 7, 4)


def more_bytes(data: bytearray) -> None:
    for field in (20, 24):
        set_bytes(data, headers(data)[1] + field, len(data), 4)


def two_sizes(data: bytearray) -> None:
    set_bytes(data, headers(data)[1] + 20, 4, 4)


def fewer_bytes(data: bytearray) -> None:
    for field in (20, 24):
        set_bytes(data, headers(data)[1] + field, 4, 4)


def encrypted(data: bytearray) -> None:
    set_bytes(data, headers(data)[1] + 8, 1, 2)


def no_byteorder(data: bytearray) -> None:
    at = data.find(b"little")
    data[at : at + 6] = b"middle"


SPOILERS = (
    longer_extra,
    extra_over_the_next_record,
    no_header,
    header_of_another,
    header_past_the_end,
    more_bytes,
    fewer_bytes,
    two_sizes,
    encrypted,
    no_byteorder,
)


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__)
def test_records_that_lie_elsewhere_are_refused(
    repo: Repository, tmp_path: Path, spoil: Callable[[bytearray], None]
) -> None:
    data = archive_of({"w": torch.arange(100.0), "v": torch.arange(50)})
    spoil(data)
    (tmp_path / "in.pt").write_bytes(data)
    with pytest.raises(CorruptionError, match="damaged"):
        import_torch(tmp_path / "in.pt", repo)
    assert repo.log() == []


def test_numbers_of_another_byteorder_are_refused(repo: Repository, tmp_path: Path) -> None:
    def write(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
        archive.writestr(name, b"big" if name.endswith("byteorder") else data)

    torch.save({"w": torch.ones(3)}, tmp_path / "in.pt")
    repacked(tmp_path / "in.pt", tmp_path / "big.pt", write)
    with pytest.raises(InvalidInputError, match=r"big\.pt.*big-endian.*save it again"):
        import_torch(tmp_path / "big.pt", repo)
    assert repo.log() == []


def test_compressed_archives_and_programs_are_refused(repo: Repository, tmp_path: Path) -> None:
    def compressed(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
        archive.writestr(name, data, zipfile.ZIP_DEFLATED)

    def program(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
        archive.writestr(name, data)
        if name.endswith("version"):
            archive.writestr(name.replace("version", "constants.pkl"), b"")

    torch.save({"w": torch.ones(3)}, tmp_path / "in.pt")
    for write, message in ((compressed, "compressed records"), (program, r"torch\.jit\.load")):
        repacked(tmp_path / "in.pt", tmp_path / "other.pt", write)
        with pytest.raises(InvalidInputError, match=message):
            import_torch(tmp_path / "other.pt", repo)
    assert repo.log() == []
