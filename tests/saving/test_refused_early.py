"""What a catalog cannot store is refused before a pack or a manifest is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

import dcpstore
from dcpstore import DcpstoreError, InvalidInputError, Repository, UnsafeDataError
from dcpstore.catalog.read.user_sql import query_rows
from dcpstore.convert import import_torch
from tests.ranks import RankPool
from tests.soundness import Place

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

W = torch.ones(3)


class Named(dcpstore.DefaultSavePlanner):
    """A planner that sets `planner_data`."""

    def __init__(self, data: object) -> None:
        super().__init__()
        self._data = data

    def create_local_plan(self) -> Any:
        return dataclasses.replace(super().create_local_plan(), planner_data=self._data)

    def create_global_plan(self, all_plans: Any) -> Any:
        plans, described = super().create_global_plan(
            [dataclasses.replace(plan, planner_data=None) for plan in all_plans]
        )
        plans = [dataclasses.replace(plan, planner_data=self._data) for plan in plans]
        return plans, dataclasses.replace(described, planner_data=self._data)


class Deep(dcpstore.DefaultSavePlanner):
    """Plans a tensor of more dimensions than a version can have."""

    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        sizes = torch.Size((1,) * 65)
        chunk = ChunkStorageMetadata(torch.Size((0,) * 65), sizes)
        data = TensorWriteData(chunk, TensorProperties(torch.float32), sizes)
        deep = WriteItem(
            MetadataIndex("deep", chunk.offsets), WriteItemType.TENSOR, tensor_data=data
        )
        return dataclasses.replace(plan, items=[*plan.items, deep])


REFUSED: dict[str, tuple[type[DcpstoreError], str, dict[str, Any], Any]] = {
    "long": (InvalidInputError, "FQN 'xx.* 2001 bytes", {"x" * 2001: W}, None),
    "long in all": (InvalidInputError, "3001 bytes", {"日" * 500: {"日" * 500: W}}, None),
    "long value": (InvalidInputError, "2001 bytes", {"x" * 2001: 1, "w": W}, None),
    "NUL": (InvalidInputError, "FQN 'a.x00b'", {"d": W, "a\0b": W}, None),
    "surrogate": (InvalidInputError, "FQN 'd.a.ud800'", {"d": {"a\ud800": W}, "w": W}, None),
    "dimensions": (InvalidInputError, "'deep': a tensor of 65 dim", {"w": W}, Deep),
    "planner data": (UnsafeDataError, "object", {"w": W}, lambda: Named({"mine": object()})),
}


def torchs(state: dict[str, Any], repo: Repository, planner: Any) -> None:
    """Save with torch's own call, and raise the exception that torch's wraps."""
    try:
        dcp.save(state, storage_writer=dcpstore.RepositoryWriter(repo), planner=planner)
    except dcp.CheckpointException as error:
        (failure,) = error.failures.values()
        raise failure[0] from None


SAVES: dict[str, Callable[[dict[str, Any], Repository, Any], object]] = {
    "save": lambda state, repo, planner: dcpstore.save(state, repo, planner=planner),
    "async": lambda state, repo, planner: dcpstore.async_save(
        state, repo, planner=planner
    ).result(),
    "torch": torchs,
}


def assert_nothing_written(repo: Repository) -> None:
    assert list(repo.storage.list("packs")) == []
    assert list(repo.storage.list("manifests")) == []
    assert repo.log() == []
    assert query_rows(repo.catalog, "SELECT uid FROM version WHERE status = 'pending'", {}) == []


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_what_a_catalog_cannot_store_is_refused_before_any_write(
    repo: Repository, save: Callable[..., object], subtests: pytest.Subtests
) -> None:
    for what, (kind, message, state, planner) in REFUSED.items():
        with subtests.test(what=what):
            with pytest.raises(kind, match=message):
                save(state, repo, planner() if planner else None)
            assert_nothing_written(repo)


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_a_save_that_writes_early_is_refused_before_any_write(
    repo: Repository, save: Callable[..., object]
) -> None:
    large = torch.arange(17 << 20, dtype=torch.float32)  # 68 MiB, enough for early writes
    with pytest.raises(InvalidInputError, match="2001 bytes"):
        save({"a": large, "x" * 2001: W}, repo, None)
    assert_nothing_written(repo)


def save_a_long_name(rank: int, place: Place, call: str) -> str:
    """Save on two ranks, of which only the second has a name that is too long."""
    state: dict[str, Any] = {f"of{rank}": W} | ({"x" * 2001: W} if rank else {})
    with place.open() as repo:
        try:
            SAVES[call](state, repo, None)
        except DcpstoreError as error:
            return str(error)
    return "saved"


@pytest.mark.parametrize("call", SAVES)
def test_a_name_of_one_rank_is_refused_on_every_rank(
    place: Place, two_ranks: RankPool, call: str
) -> None:
    first, second = two_ranks.run(save_a_long_name, place, call)
    assert "2001 bytes" in first == second
    with place.open() as repo:
        assert_nothing_written(repo)


def test_an_import_is_refused_before_any_write(repo: Repository, tmp_path: Path) -> None:
    torch.save({"w": W, "x" * 2001: W}, tmp_path / "long.pt")
    with pytest.raises(InvalidInputError, match="2001 bytes"):
        import_torch(tmp_path / "long.pt", repo)
    assert_nothing_written(repo)


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_planner_data_of_any_length_is_read_back(
    repo: Repository, save: Callable[..., object]
) -> None:
    data = {"mine": ["x" * 1000] * 100, "more": (1.5, None)}
    save({"w": W}, repo, Named(data))
    assert dcpstore.RepositoryReader(repo).read_metadata().planner_data == data


def test_planner_data_that_is_not_paths_is_stored_as_it_is(repo: Repository) -> None:
    data = {"w": (1.5, b"w")}
    dcpstore.save({"w": W}, repo, planner=Named(data))
    assert dcpstore.RepositoryReader(repo).read_metadata().planner_data == data
    assert repo.read()["w"].tolist() == [1, 1, 1]
