"""DCP folders in and out, against torch.distributed.checkpoint itself, on one rank and on two."""

from __future__ import annotations

import argparse
import fractions
import io
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import dcpstore
from dcpstore import (
    AlreadyExistsError,
    ChunkDefaults,
    CorruptionError,
    DcpstoreError,
    DefaultSavePlanner,
    NotFoundError,
    Repository,
    UnsafeDataError,
)
from dcpstore.convert import export_dcp, export_torch, import_dcp, import_torch
from dcpstore.convert.dcp_folder import ExportPlanner, write_folder
from dcpstore.convert.exporting import ExportedVersion
from tests.convert.states import assert_holds, equal, every_dtype, lazy, same, trained
from tests.ranks import RankPool, mesh

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.slow_on_postgres,
]


def write_dcp(state: dict[str, Any], folder: Path, **options: Any) -> Path:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, **options), no_dist=True)
    return folder


def emptied(state: Any) -> Any:
    """Return a state of the same form to load into."""
    if isinstance(state, torch.Tensor):
        return torch.zeros_like(state)
    if isinstance(state, dict):
        return {key: emptied(item) for key, item in state.items()}
    return [emptied(item) for item in state] if isinstance(state, list) else None


@pytest.mark.parametrize("threads", [1, 2])
def test_every_dtype_comes_in(repo: Repository, tmp_path: Path, threads: int) -> None:
    state = every_dtype()
    folder = write_dcp(state, tmp_path / "in", thread_count=threads)
    version = import_dcp(folder, repo)
    assert_holds(repo, version.number, state)


def test_lazily_conjugated_and_negated_tensors_come_in(repo: Repository, tmp_path: Path) -> None:
    import_dcp(write_dcp(lazy(), tmp_path / "in"), repo)
    assert_holds(repo, "main", lazy())


def test_every_dtype_goes_out(repo: Repository, tmp_path: Path) -> None:
    state = every_dtype()
    dcpstore.save(state, repo)
    export_dcp(repo, None, tmp_path / "out")
    back = emptied(state)
    dcp.load(back, checkpoint_id=tmp_path / "out", no_dist=True)
    assert all(same(back[name], state[name]) for name in state)


def test_a_nested_state_passes_both_ways(repo: Repository, tmp_path: Path) -> None:
    state = trained()
    version = import_dcp(write_dcp(state, tmp_path / "in"), repo)
    export_dcp(repo, version.number, tmp_path / "out")
    back = emptied(state)
    dcp.load(back, checkpoint_id=tmp_path / "out", no_dist=True)
    assert equal(back, state)
    again = import_dcp(tmp_path / "out", repo)
    assert repo.entries(again.number) == repo.entries(version.number)
    assert again.nbytes_written == 0


def test_torchs_own_conversion_reads_an_export(repo: Repository, tmp_path: Path) -> None:
    state = trained()
    torch.save(state, tmp_path / "in.pt")
    import_torch(tmp_path / "in.pt", repo)
    export_dcp(repo, None, tmp_path / "out")
    dcp_to_torch_save(tmp_path / "out", tmp_path / "out.pt")
    back = torch.load(tmp_path / "out.pt", weights_only=False)
    assert equal(dict(sorted(back["model"].items())), dict(sorted(state["model"].items())))


def test_many_boxes_and_files_are_one_checkpoint(tmp_path: Path) -> None:
    state = {"w": torch.randn(1, 700, 3), "n": torch.arange(900), "x": 1, "e": torch.empty(0, 4)}
    (tmp_path / "out").mkdir()
    with dcpstore.open(tmp_path / "r", chunk=ChunkDefaults(nbytes=500)) as repo:
        dcpstore.save(state, repo)
        version = ExportedVersion(repo, None, dtype=None, tensors_only=False)
        values = version.values(version.plain, allow_pickle=False)
        named = {entry.fqn: value for entry, value in zip(version.plain, values, strict=True)}
        files = write_folder(tmp_path / "out", ExportPlanner(version, named, box=1000), file=3000)
    assert files == len(list((tmp_path / "out").iterdir())) > 6  # 15,600 bytes of tensors
    back = emptied(state)
    dcp.load(back, checkpoint_id=tmp_path / "out", no_dist=True)
    assert equal(back, state)


def test_dtype_on_both_ways(repo: Repository, tmp_path: Path) -> None:
    state = {"w": torch.randn(40, 3), "n": torch.arange(3)}
    version = import_dcp(write_dcp(state, tmp_path / "in"), repo, dtype="bf16")
    assert_holds(repo, version.number, {"w": state["w"].bfloat16(), "n": state["n"]})
    export_dcp(repo, None, tmp_path / "out", dtype="fp32", tensors_only=True)
    back = {"w": torch.zeros(40, 3), "n": torch.zeros(3, dtype=torch.int64)}
    dcp.load(back, checkpoint_id=tmp_path / "out", no_dist=True)
    assert same(back["w"], state["w"].bfloat16().float())


def globals_of_ranks() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return {
        "rows": torch.randn(7, 4),
        "columns": torch.randn(5, 9).bfloat16(),
        "whole": torch.arange(12),
        "one_sided": torch.randn(1, 3),
    }


def save_on_ranks(rank: int, folder: str) -> None:
    state: dict[str, Any] = {
        name: distribute_tensor(tensor, mesh((2,)), [placement])
        for (name, tensor), placement in zip(
            globals_of_ranks().items(),
            (Shard(0), Shard(1), Replicate(), Shard(0)),
            strict=True,
        )
    }
    dcp.save({"model": state, "lr": 0.25}, checkpoint_id=folder)


def load_on_ranks(rank: int, folder: str) -> bool:
    wanted = globals_of_ranks()
    placements = (Shard(1), Shard(0), Shard(0), Replicate())
    state = {
        name: distribute_tensor(torch.zeros_like(tensor), mesh((2,)), [placement])
        for (name, tensor), placement in zip(wanted.items(), placements, strict=True)
    }
    values = {"model": state, "lr": 0.0}
    dcp.load(values, checkpoint_id=folder)
    held = [same(t.full_tensor(), wanted[n]) for n, t in state.items() if isinstance(t, DTensor)]
    return all(held) and len(held) == len(wanted) and values["lr"] == 0.25


def test_a_folder_of_two_ranks_comes_in_and_goes_out(
    repo: Repository, tmp_path: Path, two_ranks: RankPool
) -> None:
    two_ranks.run(save_on_ranks, str(tmp_path / "in"))
    version = import_dcp(tmp_path / "in", repo)
    held = {f"model.{name}": tensor for name, tensor in globals_of_ranks().items()}
    assert_holds(repo, version.number, held)
    assert repo.read(version.number, ["lr"]) == {"lr": 0.25}
    export_dcp(repo, version.number, tmp_path / "out")
    assert two_ranks.run(load_on_ranks, str(tmp_path / "out")) == [True, True]


def test_unchanged_pieces_are_found_again(
    repo: Repository, tmp_path: Path, two_ranks: RankPool
) -> None:
    held = {f"model.{name}": tensor for name, tensor in globals_of_ranks().items()}
    dcpstore.save(held, repo)
    two_ranks.run(save_on_ranks, str(tmp_path / "in"))
    assert import_dcp(tmp_path / "in", repo).nbytes_written == 0


def test_a_value_that_is_a_pickle_needs_leave(repo: Repository, tmp_path: Path) -> None:
    state = {"w": torch.ones(2), "args": argparse.Namespace(lr=1), "p": fractions.Fraction(1, 2)}
    folder = write_dcp(state, tmp_path / "in")
    with pytest.raises(
        UnsafeDataError, match=r"'args' \(argparse.Namespace\), 'p' \(fractions.Fraction.*--tensors"
    ):
        import_dcp(folder, repo)
    assert repo.log() == []
    version = import_dcp(folder, repo, tensors_only=True)
    assert [entry.fqn for entry in repo.entries(version.number)] == ["w"]
    version = import_dcp(folder, repo, allow_pickle=True)
    assert repo.read(version.number, allow_pickle=True)["p"] == state["p"]


@pytest.mark.parametrize("module", ["sharded_tensor", "checkpoint"])
@pytest.mark.parametrize("paths", [True, False])
def test_a_description_of_an_older_torch_comes_in(
    repo: Repository, tmp_path: Path, module: str, paths: bool
) -> None:
    state = {"w": torch.arange(6.0).reshape(2, 3), "in": {"h": torch.ones(2).half()}, "lr": 0.5}
    folder = write_dcp(state, tmp_path / "in")
    described = dcp.FileSystemReader(folder).read_metadata()
    for later in ("storage_meta", "version"):  # what torch added after 2.2
        vars(described).pop(later, None)
    if not paths:
        described.planner_data = None
    now = b"ctorch.distributed.checkpoint.metadata\n"
    older = b"ctorch.distributed._shard.sharded_tensor.metadata\n"
    text = pickle.dumps(described, protocol=2)
    assert now + b"TensorProperties\n" in text
    assert now + b"_MEM_FORMAT_ENCODING\n" in text
    if module == "sharded_tensor":
        text = text.replace(now + b"TensorProperties\n", older + b"TensorProperties\n")
        text = text.replace(now + b"_MEM_FORMAT_ENCODING\n", older + b"MEM_FORMAT_ENCODING\n")
    (folder / ".metadata").write_bytes(text)
    import_dcp(folder, repo)
    read = repo.read()
    assert same(read["w"], state["w"])
    assert same(read["in.h"], torch.ones(2).half())
    assert read["lr"] == 0.5


class OwnBytes(DefaultSavePlanner):
    """Writes values its own way."""

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.index.fqn == "x":
            return io.BytesIO(b"own")
        return super().resolve_data(write_item)


def test_a_planners_own_bytes_go_out_as_they_are(repo: Repository, tmp_path: Path) -> None:
    dcpstore.save({"w": torch.ones(2), "x": 1}, repo, planner=OwnBytes())
    export_dcp(repo, None, tmp_path / "out")
    assert b"own" in b"".join(path.read_bytes() for path in (tmp_path / "out").glob("*.distcp"))
    export_torch(repo, None, tmp_path / "out.pt")
    assert torch.load(tmp_path / "out.pt", weights_only=True)["x"] == b"own"


class Evil:
    """Would make a folder, if it were unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._folder),)


def test_a_foreign_description_runs_no_code(repo: Repository, tmp_path: Path) -> None:
    folder = write_dcp({"w": torch.ones(2)}, tmp_path / "in")
    described = dcp.FileSystemReader(folder).read_metadata()
    described.planner_data = Evil(tmp_path / "broken-in")
    (folder / ".metadata").write_bytes(pickle.dumps(described))
    with pytest.raises(UnsafeDataError, match="mkdir"):
        import_dcp(folder, repo)
    assert not (tmp_path / "broken-in").exists()
    assert repo.log() == []


CODES = [
    b"cbuiltins\neval\n(V1\ntR.",
    b"ctorch\nload\n(V/etc/passwd\ntR.",
    b"ctorch.serialization\nload\n(V/etc/passwd\ntR.",
    b"\x80\x04\x8c\x05torch\x8c\x08hub.load\x93.",
    b"cbuiltins\ngetattr\n.",
    # what is let in, but is not to be changed, or called by size
    b"ctorch.distributed.checkpoint.metadata\nMetadata\n}Vversion\nV1\nsb.",
    b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\x07\x00\x00\x00versionK\x01s\x86b.",
]


def test_no_function_is_let_in(repo: Repository, tmp_path: Path, subtests: pytest.Subtests) -> None:
    for code in CODES:
        with subtests.test(code=code):
            (tmp_path / ".metadata").write_bytes(code)
            with pytest.raises(UnsafeDataError, match="would run code"):
                import_dcp(tmp_path, repo)


def change_info(**changes: Any) -> Callable[[Metadata, Path], None]:
    def change(described: Metadata, _: Path) -> None:
        index = MetadataIndex("w", (0, 0))
        old = described.storage_data[index]
        described.storage_data[index] = _StorageInfo(**{**vars(old), **changes})

    return change


def drop_place(described: Metadata, _: Path) -> None:
    del described.storage_data[MetadataIndex("w", (0, 0))]


def overlap(described: Metadata, _: Path) -> None:
    chunks = described.state_dict_metadata["w"].chunks
    chunks.append(chunks[0])


def reach_outside(described: Metadata, _: Path) -> None:
    described.state_dict_metadata["w"].size = torch.Size((1, 2))


def leave_gap(described: Metadata, _: Path) -> None:
    described.state_dict_metadata["w"].size = torch.Size((9, 3))


def other_dtype(described: Metadata, _: Path) -> None:
    described.state_dict_metadata["w"].properties.dtype = torch.int32


def no_items(described: Metadata, _: Path) -> None:
    described.state_dict_metadata = None  # type: ignore[assignment]


def odd_item(described: Metadata, _: Path) -> None:
    described.state_dict_metadata["w"] = "tensor"  # type: ignore[assignment]


def drop_file(_: Metadata, folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()


def cut_file(_: Metadata, folder: Path) -> None:
    data = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(data[: len(data) // 2])


def scramble_file(_: Metadata, folder: Path) -> None:
    size = (folder / "__0_0.distcp").stat().st_size
    (folder / "__0_0.distcp").write_bytes(b"PK\x03\x04" + bytes(size))


DAMAGES: dict[str, tuple[Callable[[Metadata, Path], None], type[DcpstoreError]]] = {
    "no place": (drop_place, CorruptionError),
    "overlap": (overlap, CorruptionError),
    "outside": (reach_outside, CorruptionError),
    "gap": (leave_gap, CorruptionError),
    "other dtype": (other_dtype, CorruptionError),
    "no items": (no_items, CorruptionError),
    "odd item": (odd_item, CorruptionError),
    "no file": (drop_file, CorruptionError),
    "half a file": (cut_file, CorruptionError),
    "scrambled file": (scramble_file, CorruptionError),
    "past the file": (change_info(offset=1 << 40), CorruptionError),
    "before the file": (change_info(offset=-8), CorruptionError),
    "other folder": (change_info(relative_path="../__0_0.distcp"), UnsafeDataError),
    "any file": (change_info(relative_path="/etc/passwd"), UnsafeDataError),
    "no name": (change_info(relative_path=3), CorruptionError),
    "encoded": (change_info(transform_descriptors=["zstd"]), UnsafeDataError),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_dcp({"w": torch.ones(2, 3), "x": 3}, tmp_path / "in")
    described = dcp.FileSystemReader(folder).read_metadata()
    damage, error = DAMAGES[name]
    damage(described, folder)
    (folder / ".metadata").write_bytes(pickle.dumps(described))
    with dcpstore.open(tmp_path / "repo") as repo:
        with pytest.raises(error):
            import_dcp(folder, repo)
        assert repo.log() == []


def test_every_cut_of_the_description_is_refused(tmp_path: Path) -> None:
    folder = write_dcp({"w": torch.ones(2, 3), "x": 3}, tmp_path / "in")
    whole = (folder / ".metadata").read_bytes()
    with dcpstore.open(tmp_path / "repo") as repo:
        for length in range(0, len(whole), 7):
            (folder / ".metadata").write_bytes(whole[:length])
            with pytest.raises(DcpstoreError):
                import_dcp(folder, repo)
        assert repo.log() == []


def test_no_folder(tmp_path: Path, repo: Repository) -> None:
    with pytest.raises(NotFoundError, match=r"\.metadata"):
        import_dcp(tmp_path, repo)
    (tmp_path / "__0.metadata").write_bytes(b"")
    with pytest.raises(NotFoundError, match="use_collectives=False"):
        import_dcp(tmp_path, repo)


def test_an_existing_target_is_left_alone(tmp_path: Path, repo: Repository) -> None:
    dcpstore.save({"w": torch.ones(2)}, repo)
    (tmp_path / "out").mkdir()
    with pytest.raises(AlreadyExistsError):
        export_dcp(repo, None, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_importing_leaves_no_warning(tmp_path: Path, repo: Repository) -> None:
    folder = write_dcp({"w": torch.ones(2)}, tmp_path / "in")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import_dcp(folder, repo)
        export_dcp(repo, None, tmp_path / "out")
