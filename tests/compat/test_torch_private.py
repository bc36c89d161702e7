"""What stands in for the names that older releases of torch lack; it runs on every release."""

from __future__ import annotations

import io
import logging
import pickle
import struct
import subprocess
import sys
import zipfile
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from dcpstore.compat import torch_private
from dcpstore.errors import InvalidInputError

OURS = SimpleNamespace(Unpickler=pickle._Unpickler, __name__="ours")


def old_save(state: Any, *, planner: Any = None) -> None:
    """Take the arguments that `async_save` had before torch 2.9."""


def test_an_argument_that_this_torch_lacks_is_left_out_where_it_asks_for_nothing() -> None:
    given = {"async_stager": None, "no_dist": False, "use_collectives": True, "planner": 1}
    assert torch_private.newer_arguments(old_save, **given) == {"planner": 1}
    for name, value in {
        "async_stager": object(),
        "no_dist": True,
        "use_collectives": False,
    }.items():
        with pytest.raises(InvalidInputError, match=rf"{name}=.* needs torch 2\.9.*; leave it out"):
            torch_private.newer_arguments(old_save, **{**given, name: value})


def test_metadata_has_the_version_of_the_format_where_torch_has_one() -> None:
    described = torch_private.set_format_version(Metadata({}))
    has_one = hasattr(torch.distributed.checkpoint.filesystem, "CURRENT_DCP_VERSION")
    assert hasattr(described, "version") == has_one
    assert not has_one or described.version


@pytest.mark.parametrize(
    "stager",
    [
        torch_private.make_stager,
        lambda: torch_private._MendedStager(is_pinned=False, is_on_device=False),
    ],
    ids=["of-this-torch", "of-older-torch"],
)
def test_a_stager_copies_into_the_same_memory_each_time(stager: Any) -> None:
    made = stager()
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    bare = torch.nn.Parameter(torch.empty(0, 3))
    state = {"w": weight, "bare": bare, "nested": [{"step": 3}, weight[1]]}
    first = made.stage(state)
    with torch.no_grad():
        weight += 1
    assert first["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    second = made.stage(state)
    assert second["w"].data_ptr() == first["w"].data_ptr()
    assert second["w"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert second["nested"][0] == {"step": 3}
    assert second["nested"][1].tolist() == [4, 5, 6]
    assert second["bare"].shape == (0, 3)


@pytest.mark.parametrize("make", [torch_private.placing_storages, torch_private._placing])
@pytest.mark.parametrize(
    "module", [pickle, SimpleNamespace(Unpickler=pickle._Unpickler, __name__="p")]
)
def test_storages_on_meta_know_their_place_in_the_archive(make: Any, module: Any) -> None:
    archive = io.BytesIO()
    weight = torch.arange(100.0)
    torch.save({"w": weight, "half": weight[50:], "other": torch.ones(3)}, archive)
    with zipfile.ZipFile(archive) as found:
        infos = {info.filename.partition("/")[2]: info for info in found.infolist()}
    places = {}
    for name, info in infos.items():
        archive.seek(info.header_offset + 26)  # where the lengths of name and extra are
        lengths = struct.unpack("<HH", archive.read(4))
        places[name] = info.header_offset + 30 + sum(lengths)
    archive.seek(0)
    unpickling = make(module, places)
    loaded = torch.load(archive, map_location="meta", weights_only=False, pickle_module=unpickling)
    at = {name: torch_private.storage_place(t.untyped_storage()) for name, t in loaded.items()}
    assert at == {"w": places["data/0"], "half": places["data/0"], "other": places["data/1"]}
    assert archive.getvalue()[at["other"] :][:12] == torch.ones(3).numpy().tobytes()


def test_the_mended_stager_leaves_the_log_level_of_the_program() -> None:
    code = (
        "import logging; from dcpstore.compat import torch_private as p; "
        "p._MendedStager(is_pinned=False, is_on_device=False); print(logging.getLogger().level)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == logging.WARNING
