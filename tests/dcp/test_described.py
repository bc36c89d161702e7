"""What torch's writers, readers and planners learn of a save: `StorageMeta` and `Metadata`.

The same calls are made with torch's classes and with ours, and compared.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

import dcpstore
from dcpstore import Repository, RepositoryReader, RepositoryWriter

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is", "ignore:Detected an exist")
STATE = {"w": torch.ones(2)}


class Saving(dcp.DefaultSavePlanner):
    """Records what it gets."""

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        self.given: StorageMeta = storage_meta
        super().set_up_planner(state_dict, storage_meta, is_coordinator)


class Loading(dcp.DefaultLoadPlanner):
    """Records what it gets."""

    def set_up_planner(
        self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False
    ) -> None:
        self.given: Metadata = metadata
        super().set_up_planner(state_dict, metadata, is_coordinator)


class Ids(dict[object, str]):
    """Replaces ids by their order, so that two runs can be compared."""

    def __missing__(self, key: object) -> str:
        assert key is None or isinstance(key, str), key
        self[key] = "none" if key is None else f"id {len(self)}"
        return self[key]


def walk(module: ModuleType, folder: Path) -> list[object]:
    """Save and load in each of torch's ways; return what the planners and callers got."""
    ids, seen = Ids(), []

    def note(where: str, meta: Any) -> None:
        assert type(meta) is StorageMeta
        place = meta.checkpoint_id
        assert isinstance(place, Path)
        seen.append((where, place.name, ids[meta.save_id], ids[meta.load_id], meta.modules))

    def note_metadata(where: str, described: Metadata) -> None:
        seen.append((getattr(described, "version", None), type(described.storage_data)))
        note(where, described.storage_meta)

    writer = module.FileSystemWriter(folder / "a")
    note("new", writer.storage_meta())
    assert writer.storage_meta().save_id == writer.save_id
    for checkpoint_id in (None, folder / "b", str(folder / "c")):
        planner = Saving()
        if checkpoint_id is not None:
            writer.reset()
            note("reset", writer.storage_meta())
        described = dcp.save(
            STATE, checkpoint_id=checkpoint_id, storage_writer=writer, planner=planner
        )
        note_metadata("saved", described)
        note("planner", planner.given)
        assert (writer.path, writer.checkpoint_id) == (planner.given.checkpoint_id,) * 2
        assert writer.save_id == planner.given.save_id == described.storage_meta.save_id
    writer.reset("")  # torch treats an empty id as None
    assert writer.path == folder / "c"
    reader = module.FileSystemReader(folder / "a")
    note_metadata("read", reader.read_metadata())
    assert reader.read_metadata().storage_meta.load_id == reader.load_id
    for checkpoint_id in (None, folder / "b", str(folder / "c")):
        loading = Loading()
        dcp.load(
            {"w": torch.zeros(2)},
            checkpoint_id=checkpoint_id,
            storage_reader=reader,
            planner=loading,
        )
        note_metadata("load", loading.given)
        assert (reader.path, reader.checkpoint_id) == (
            loading.given.storage_meta.checkpoint_id,
        ) * 2
    planner, loading = Saving(), Loading()
    module.save(STATE, checkpoint_id=folder / "d", planner=planner)
    note("save", planner.given)
    module.load({"w": torch.zeros(2)}, checkpoint_id=folder / "d", planner=loading)
    note_metadata("load", loading.given)
    assert loading.given.storage_meta.save_id == planner.given.save_id
    return seen


def test_storage_meta_and_metadata_are_as_torchs(tmp_path: Path) -> None:
    assert walk(dcpstore, tmp_path / "ours") == walk(dcp, tmp_path / "theirs")


def test_a_writer_that_is_reused_announces_the_next_save(tmp_path: Path) -> None:
    """Torch's writer gives the second save the id of the first; here each version has its own."""
    writer = dcpstore.FileSystemWriter(tmp_path)
    first = dcp.save(STATE, storage_writer=writer)
    held = writer.version
    announced = writer.storage_meta()
    assert (writer.version, writer.save_id) == (held, first.storage_meta.save_id)
    planner = Saving()
    second = dcp.save(STATE, storage_writer=writer, planner=planner)
    assert planner.given == announced == second.storage_meta
    assert announced.save_id != first.storage_meta.save_id
    with dcpstore.open(tmp_path) as repo:
        assert [version.uid for version in repo.log()] == [
            second.storage_meta.save_id,
            first.storage_meta.save_id,
        ]


def test_a_repository_gives_storage_meta_too(repo: Repository) -> None:
    saving, loading = Saving(), Loading()
    version = dcpstore.save(STATE, repo, planner=saving)
    dcpstore.load({"w": torch.zeros(2)}, repo, planner=loading)
    meta = loading.given.storage_meta
    assert meta is not None
    assert saving.given.save_id == meta.save_id == version.uid
    assert saving.given.checkpoint_id == meta.checkpoint_id == repo.location
    writer = RepositoryWriter(repo)
    described = dcp.save(STATE, checkpoint_id="night", storage_writer=writer, planner=saving)
    assert saving.given == described.storage_meta
    assert saving.given.checkpoint_id == writer.checkpoint_id == "night"
    assert writer.storage_meta().checkpoint_id is None  # of the next save
    read = RepositoryReader(repo).read_metadata().storage_meta
    assert read is not None
    assert (read.checkpoint_id, read.save_id) == (None, described.storage_meta.save_id)


class Old(dcp.DefaultSavePlanner):
    """A planner from before torch had `storage_meta`."""

    def set_up_planner(self, state_dict: Any, is_coordinator: bool) -> None:  # type: ignore[override]
        self.leads = is_coordinator
        super().set_up_planner(state_dict, None, is_coordinator)


class Passing(dcp.DefaultSavePlanner):
    """A planner that passes its arguments to the base class."""

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        self.given = kwargs["storage_meta"]
        super().set_up_planner(*args, **kwargs)


def test_planners_with_other_signatures_are_supported(tmp_path: Path) -> None:
    old, passing = Old(), Passing()
    with pytest.warns(UserWarning, match=r"Old\.set_up_planner takes no storage_meta"):
        dcpstore.save(STATE, tmp_path, planner=old)
    assert old.leads is True
    assert dcpstore.save(STATE, tmp_path, planner=passing).uid == passing.given.save_id
