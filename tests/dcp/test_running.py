"""A save by torch is in the catalog while it is running, and its version is never left pending."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import dcpstore
from dcpstore import (
    InvalidInputError,
    NotFoundError,
    Repository,
    RepositoryReader,
    RepositoryWriter,
)
from tests.soundness import assert_sound

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")
STATE = {"w": torch.arange(6.0)}


class Looking(dcpstore.DefaultSavePlanner):
    """Reads the catalog while torch writes, and can then fail."""

    def __init__(self, repo: Repository, *, fails: bool = False) -> None:
        super().__init__()
        self._repo = repo
        self._fails = fails
        self.seen: list[Any] = []

    def resolve_data(self, write_item: Any) -> Any:
        self.seen = self._repo.status()
        # However short the grace time is, gc does not touch what the save has written; where the
        # save has already run longer than that, gc refuses to begin.
        with suppress(InvalidInputError):
            report = self._repo.gc(grace="1s", lease="1h")
            assert (report.crashed, report.cleared, report.deleted) == ((), (), ())
        if self._fails:
            raise OSError("the device is lost")
        return super().resolve_data(write_item)


def test_a_checkpoint_id_is_for_one_call(repo: Repository) -> None:
    writer = RepositoryWriter(repo)
    dcp.save(STATE, checkpoint_id="a", storage_writer=writer)
    dcp.save({"w": STATE["w"] + 1}, storage_writer=writer)
    assert [version.tags for version in repo.log()] == [(), ("a",)]
    reader = RepositoryReader(repo, "main")
    found = {"w": torch.zeros(6)}
    dcp.load(found, checkpoint_id="a", storage_reader=reader)
    assert torch.equal(found["w"], STATE["w"])
    dcp.load(found, storage_reader=reader)
    assert torch.equal(found["w"], STATE["w"] + 1)


BESIDE_WRITER: dict[str, Any] = {
    "repo": "r",
    "branch": "b",
    "step": 1,
    "tags": ["t"],
    "message": "m",
    "metrics": {"a": 1.0},
    "labels": {"a": "1"},
    "author": "a",
    "parent": "main",
    "expect_tip": "main",
    "retention": dcpstore.Retention(keep_last=1),
    "allow_pickle": True,
}
BESIDE_READER: dict[str, Any] = {
    "repo": "r",
    "ref": 1,
    "init_missing": lambda fqn, tensor: None,
    "dry_run": True,
    "verify": False,
    "allow_pickle": True,
}


def test_repository_options_are_refused_for_another_storage(
    tmp_path: Path, subtests: pytest.Subtests
) -> None:
    path = tmp_path / "c"
    writer, reader = dcp.FileSystemWriter(path), dcp.FileSystemReader(path)
    later = BESIDE_WRITER | {"if_busy": "refuse", "staging_limit": 1}
    calls = [
        (lambda **given: dcpstore.save(STATE, storage_writer=writer, **given), BESIDE_WRITER),
        (lambda **given: dcpstore.async_save(STATE, storage_writer=writer, **given), later),
        (lambda **given: dcpstore.load(STATE, storage_reader=reader, **given), BESIDE_READER),
    ]
    for call, beside in calls:
        for name, value in beside.items():
            with subtests.test(name), pytest.raises(InvalidInputError, match=f"^{name}: for a rep"):
                call(**{name: value})
    assert not path.exists()


def test_load_options_work_for_another_storage(tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(2), "b": torch.ones(2)}, checkpoint_id=tmp_path / "c")
    reader = dcp.FileSystemReader(tmp_path / "c")
    state = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(2), "c": torch.zeros(2)}
    dcpstore.load(state, storage_reader=reader, exclude=["b"], strict=False, on_dtype="cast")
    assert [float(tensor.sum()) for tensor in state.values()] == [2, 0, 0]
    dcpstore.load({"c": state["c"]}, storage_reader=reader, rename={"c": "a"})
    assert float(state["c"].sum()) == 2
    with pytest.raises(CheckpointException) as caught:
        dcpstore.load(state, storage_reader=reader, strict=False, include=["x.*"])
    assert isinstance(caught.value.failures[0][0], NotFoundError)


def ended(repo: Repository) -> list[tuple[str, str | None]]:
    rows = repo.sql("SELECT status, error FROM version WHERE number IS NULL ORDER BY id")
    return [(row.status, row.error) for row in rows]


def test_a_running_save_is_in_the_status_until_it_ends(repo: Repository) -> None:
    planner = Looking(repo)
    writer = RepositoryWriter(repo, step=3)
    dcp.save(STATE, storage_writer=writer, planner=planner)
    assert writer.version is not None
    (seen,) = planner.seen
    assert (seen.uid, seen.step, seen.ranks) == (writer.version.uid, 3, 1)
    assert repo.status() == []
    assert ended(repo) == []


def test_a_failed_save_aborts_its_version_and_the_writer_can_be_reused(repo: Repository) -> None:
    writer = RepositoryWriter(repo)
    with pytest.raises(CheckpointException, match="device is lost"):
        dcp.save(STATE, storage_writer=writer, planner=Looking(repo, fails=True))
    assert ended(repo) == [("aborted", "OSError: the device is lost")]
    dcp.save(STATE, storage_writer=writer)
    assert [v.number for v in repo.log()] == [1]
    assert repo.status() == []


def test_an_unfinished_save_is_aborted_when_the_writer_is_reused(repo: Repository) -> None:
    """As when another rank fails: torch then does not call the coordinator's writer any more."""

    class Stopped(dcpstore.DefaultSavePlanner):
        def finish_plan(self, new_plan: Any) -> Any:
            raise OSError("no memory")

    writer = RepositoryWriter(repo)
    with pytest.raises(CheckpointException, match="no memory"):
        dcp.save(STATE, storage_writer=writer, planner=Stopped())
    assert [save.uid for save in repo.status()] == [writer.save_id]
    dcp.save(STATE, storage_writer=writer)
    assert ended(repo) == [("aborted", "torch began another save before this one ended")]
    assert repo.status() == []
    assert_sound(repo)


def test_a_tag_that_is_taken_is_refused_before_any_write(repo: Repository) -> None:
    dcp.save(STATE, storage_writer=RepositoryWriter(repo, tags=["best"]))
    planner = Looking(repo)
    with pytest.raises(CheckpointException, match="best"):
        dcp.save(STATE, storage_writer=RepositoryWriter(repo, tags=["best"]), planner=planner)
    assert planner.seen == []
    assert ended(repo) == []
