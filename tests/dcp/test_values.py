"""Values that a planner turns into its own bytes, on the way in and out."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import dcpstore


class Forbidden:
    """A class that our planners must not unpickle."""


class Changed(dcpstore.DefaultSavePlanner):
    """Stores a changed value, in torch's own bytes."""

    def resolve_data(self, write_item: Any) -> Any:
        data = io.BytesIO()
        torch.save({"was": self.lookup_object(write_item.index)}, data)
        return data


class Own(dcpstore.DefaultSavePlanner):
    """Stores values in its own format."""

    def resolve_data(self, write_item: Any) -> Any:
        return io.BytesIO(b"own %d" % self.lookup_object(write_item.index))


class OwnAgain(dcpstore.DefaultLoadPlanner):
    """Reads that format."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.load_value(read_item, int(value.getvalue().removeprefix(b"own ")))


class Pickled(Changed):
    """Gives bytes that only pickle can read."""

    def resolve_data(self, write_item: Any) -> Any:
        data = io.BytesIO()
        torch.save(Forbidden(), data)
        return data


def test_torchs_bytes_of_a_value_are_stored_as_the_value(tmp_path: Path) -> None:
    dcpstore.save({"step": 7}, tmp_path, planner=Changed())
    with dcpstore.open(tmp_path) as repo:
        assert repo.read() == {"step": {"was": 7}}
    found = {"step": None}
    dcpstore.load(found, tmp_path)
    assert found == {"step": {"was": 7}}


def test_bytes_in_another_format_reach_the_load_planner_unchanged(tmp_path: Path) -> None:
    dcpstore.save({"step": 7, "nest": {"n": 8}}, tmp_path, planner=Own())
    found: dict[str, Any] = {"step": 0, "nest": {"n": 0}}
    dcpstore.load(found, tmp_path, planner=OwnAgain())
    assert found == {"step": 7, "nest": {"n": 8}}
    with dcpstore.open(tmp_path) as repo:
        assert repo.read()["step"] == b"own 7"
    with pytest.raises(dcpstore.UnsafeDataError, match="another planner wrote in its own form"):
        dcpstore.load(found, tmp_path)


def test_a_value_of_bytes_loads_with_any_planner(tmp_path: Path) -> None:
    dcpstore.save({"raw": b"own 7"}, tmp_path)
    for planner in (dcp.DefaultLoadPlanner(), dcpstore.DefaultLoadPlanner()):
        found = {"raw": b""}
        dcpstore.load(found, tmp_path, planner=planner)
        assert found == {"raw": b"own 7"}


def test_a_planners_pickle_needs_allow_pickle(tmp_path: Path) -> None:
    with pytest.raises(dcpstore.UnsafeDataError, match="'step': the planner's bytes hold a pickle"):
        dcpstore.save({"step": 7}, tmp_path, planner=Pickled())
    dcpstore.save({"step": 7}, tmp_path, planner=Pickled(), allow_pickle=True)
    with pytest.raises(dcpstore.UnsafeDataError, match="could run code"):
        dcpstore.load({"step": 0}, tmp_path)
