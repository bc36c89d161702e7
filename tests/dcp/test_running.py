"""A save by torch is known to the catalog while it runs, and its version ends with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import dcpstore
from dcpstore import Repository, RepositoryWriter
from tests.soundness import assert_sound

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")
STATE = {"w": torch.arange(6.0)}


class Looking(dcpstore.DefaultSavePlanner):
    """Looks at the catalog when torch writes, and may then fail."""

    def __init__(self, repo: Repository, *, fails: bool = False) -> None:
        super().__init__()
        self._repo = repo
        self._fails = fails
        self.seen: list[Any] = []

    def resolve_data(self, write_item: Any) -> Any:
        self.seen = self._repo.status()
        # Whatever its patience, gc does not touch what the save has written.
        report = self._repo.gc(grace="1s", lease="1h")
        assert (report.crashed, report.cleared, report.deleted) == ((), (), ())
        if self._fails:
            raise OSError("the device is lost")
        return super().resolve_data(write_item)


def ended(repo: Repository) -> list[tuple[str, str | None]]:
    rows = repo.sql("SELECT status, error FROM version WHERE number IS NULL ORDER BY id")
    return [(row.status, row.error) for row in rows]


def test_a_running_save_is_seen_and_gone_when_it_ends(repo: Repository) -> None:
    planner = Looking(repo)
    writer = RepositoryWriter(repo, step=3)
    dcp.save(STATE, storage_writer=writer, planner=planner)
    assert writer.version is not None
    (seen,) = planner.seen
    assert (seen.uid, seen.step, seen.ranks) == (writer.version.uid, 3, 1)
    assert repo.status() == []
    assert ended(repo) == []


def test_a_save_that_fails_aborts_its_version_and_the_writer_goes_on(repo: Repository) -> None:
    writer = RepositoryWriter(repo)
    with pytest.raises(CheckpointException, match="device is lost"):
        dcp.save(STATE, storage_writer=writer, planner=Looking(repo, fails=True))
    assert ended(repo) == [("aborted", "OSError: the device is lost")]
    dcp.save(STATE, storage_writer=writer)
    assert [v.number for v in repo.log()] == [1]
    assert repo.status() == []


def test_a_save_that_torch_gave_up_ends_when_the_writer_is_used_again(repo: Repository) -> None:
    """As where another rank fails: torch then asks the coordinator's writer for nothing more."""

    class Stopped(dcpstore.DefaultSavePlanner):
        def finish_plan(self, new_plan: Any) -> Any:
            raise OSError("no memory")

    writer = RepositoryWriter(repo)
    with pytest.raises(CheckpointException, match="no memory"):
        dcp.save(STATE, storage_writer=writer, planner=Stopped())
    assert [save.uid for save in repo.status()] == [writer.save_id]
    dcp.save(STATE, storage_writer=writer)
    assert ended(repo) == [("aborted", "torch gave it up, and began another save")]
    assert repo.status() == []
    assert_sound(repo)


def test_names_that_cannot_be_given_fail_before_anything_is_written(repo: Repository) -> None:
    dcp.save(STATE, storage_writer=RepositoryWriter(repo, tags=["best"]))
    planner = Looking(repo)
    with pytest.raises(CheckpointException, match="best"):
        dcp.save(STATE, storage_writer=RepositoryWriter(repo, tags=["best"]), planner=planner)
    assert planner.seen == []
    assert ended(repo) == []
