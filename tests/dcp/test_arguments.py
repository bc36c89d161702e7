"""Torch's older argument forms work, with its warning; an argument in a wrong place is named."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

import dcpstore
from dcpstore import InvalidInputError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")
STATE = {"w": torch.ones(2)}


def call_by_place(module: ModuleType, folder: Path) -> list[str]:
    """Save and load with the storage as second positional argument; return the warnings."""
    found = {"w": torch.zeros(2)}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        described = module.save(STATE, module.FileSystemWriter(folder / "a"))
        assert module.load(found, module.FileSystemReader(folder / "a")) is None
        module.save(STATE, module.FileSystemWriter(folder / "a"), checkpoint_id=folder / "b")
        reader = module.FileSystemReader(folder / "a")
        module.load(found, reader, checkpoint_id=folder / "b")
    assert isinstance(described, Metadata)
    assert torch.equal(found["w"], STATE["w"])
    assert reader.path == folder / "b"
    texts = [str(w.message) for w in seen if "argument order" in str(w.message)]
    if module is dcpstore:  # torch's warning names a line of torch
        assert {w.filename for w in seen if "argument order" in str(w.message)} == {__file__}
    return [text.partition(":")[0].rstrip(".") for text in texts]


def test_a_positional_storage_is_taken_as_by_torch(tmp_path: Path) -> None:
    ours = call_by_place(dcpstore, tmp_path / "ours")
    assert ours == call_by_place(dcp, tmp_path / "theirs")
    assert len(ours) == 4
    with pytest.warns(UserWarning, match=r"argument order of async_save .* storage_writer="):
        future = dcpstore.async_save(STATE, dcpstore.FileSystemWriter(tmp_path / "later"))
    future.result()
    with dcpstore.open(tmp_path / "later") as repo:
        assert len(repo.log()) == 1
    with pytest.warns(UserWarning, match="argument order"):  # any storage of torch's
        dcpstore.save(STATE, dcp.FileSystemWriter(tmp_path / "torchs"))
    assert (tmp_path / "torchs" / ".metadata").exists()


@pytest.mark.filterwarnings("ignore:The argument order")
def test_a_value_for_another_argument_is_named(tmp_path: Path, subtests: pytest.Subtests) -> None:
    where = tmp_path / "r"
    version = dcpstore.save(STATE, where)
    writer, reader = dcp.FileSystemWriter(tmp_path / "t"), dcp.FileSystemReader(tmp_path / "t")
    saver, loader = dcpstore.DefaultSavePlanner(), dcpstore.DefaultLoadPlanner()
    with dcpstore.open(where) as repo:
        saves: list[Callable[..., Any]] = [dcpstore.save, dcpstore.async_save]
        bad: list[tuple[list[Callable[..., Any]], tuple[Any, ...], dict[str, Any], str]] = [
            (saves, (reader,), {}, r"repo is a FileSystemReader; .*storage_reader= to load"),
            (saves, (saver,), {}, r"repo is a DefaultSavePlanner; .*planner= to save"),
            (saves, (loader,), {}, r"repo is a DefaultLoadPlanner; .*planner= to load"),
            (saves, (Metadata({}),), {}, "repo is a Metadata; it describes a checkpoint"),
            (saves, (version,), {}, "repo is a Version; pass the repository"),
            (saves, (dcpstore.FileSystemWriter,), {}, "the class FileSystemWriter; pass an object"),
            (saves, (writer,), {"storage_writer": writer}, "is given two storages"),
            (
                saves,
                (),
                {"checkpoint_id": writer},
                "checkpoint_id is a FileSystemWriter; .*r=",
            ),
            (
                saves,
                (),
                {"storage_writer": str(where)},
                "storage_writer is '.*'; pass it as",
            ),
            (saves, (), {"storage_writer": repo}, "storage_writer is a Repository; pass it as the"),
            (saves, (), {"storage_writer": reader}, "storage_writer is a FileSystemReader; .*load"),
            (saves, (where,), {"planner": loader}, "planner is a DefaultLoadPlanner; .*to load"),
            (
                saves,
                (where,),
                {"planner": dcp.DefaultSavePlanner},
                "class DefaultSavePlanner;",
            ),
            (saves, (where,), {"planner": "default"}, "planner is 'default'; pass a SavePlanner"),
            (saves, (), {"storage_writer": writer, "planner": loader}, "is a DefaultLoadPlanner"),
            (
                [dcpstore.load],
                (writer,),
                {},
                r"repo is a FileSystemWriter; .*storage_writer=",
            ),
            ([dcpstore.load], (loader,), {}, r"repo is a DefaultLoadPlanner; .*planner= to load"),
            (
                [dcpstore.load],
                (where, loader),
                {},
                r"ref is a DefaultLoadPlanner; .*planner=",
            ),
            ([dcpstore.load], (where, reader), {}, r"ref is a FileSystemReader; .*storage_reader="),
            ([dcpstore.load], (version,), {}, "repo is a Version; .*as ref"),
            ([dcpstore.load], (), {"storage_reader": writer}, "is a FileSystemWriter; .*to save"),
            ([dcpstore.load], (), {"storage_reader": where}, "pass it as the repository"),
            (
                [dcpstore.load],
                (where,),
                {"planner": saver},
                "is a DefaultSavePlanner; .*to s",
            ),
        ]
        for calls, place, named, message in bad:
            for call in calls:
                with (
                    subtests.test(f"{call.__name__} {message}"),
                    pytest.raises(InvalidInputError, match=message),
                ):
                    call(dict(STATE), *place, **named)
        assert len(repo.log()) == 1
    assert not (tmp_path / "t").exists()


def test_an_object_store_is_named_as_the_place_of_data() -> None:
    message = re.escape("dcpstore.open(that, data='s3://bucket/prefix')")
    with pytest.raises(InvalidInputError, match=message):
        dcpstore.save(STATE, checkpoint_id="s3://bucket/run")


class Duck:
    """A planner by its methods only, not by its class; torch accepts it too."""

    def __init__(self, planner: Any) -> None:
        self._planner = planner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._planner, name)


def test_a_planner_need_not_inherit_from_torchs(tmp_path: Path) -> None:
    saver: Any = Duck(dcp.DefaultSavePlanner())
    loader: Any = Duck(dcp.DefaultLoadPlanner())
    dcpstore.save(STATE, tmp_path, planner=saver)
    found = {"w": torch.zeros(2)}
    dcpstore.load(found, tmp_path, planner=loader)
    assert torch.equal(found["w"], STATE["w"])
