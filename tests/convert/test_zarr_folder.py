"""A version as a plain Zarr folder, which zarr opens where dcpstore cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from torch.distributed.tensor import Shard, distribute_tensor

import dcpstore
from dcpstore import AlreadyExistsError, Repository
from dcpstore.convert import export_zarr
from dcpstore.encoding.dtypes import as_bytes
from tests.convert.states import every_dtype, trained
from tests.ranks import RankPool, mesh
from tests.soundness import Place

pytestmark = pytest.mark.slow_on_postgres


def test_every_dtype_goes_out(repo: Repository, tmp_path: Path) -> None:
    state = every_dtype()
    dcpstore.save(state, repo, step=3)
    done = export_zarr(repo, None, tmp_path / "out")
    group = zarr.open_group(tmp_path / "out", mode="r")
    assert {name for name, _ in group.arrays()} == set(state)
    for name, tensor in state.items():
        assert group[name].attrs["torch_dtype"] == str(tensor.dtype).removeprefix("torch.")
        assert np.asarray(group[name][...]).tobytes() == as_bytes(tensor).tobytes()
    assert done.files == sum(1 for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert group.attrs["step"] == 3


def test_values_are_attributes_unless_left_out(repo: Repository, tmp_path: Path) -> None:
    dcpstore.save(trained(), repo)
    export_zarr(repo, None, tmp_path / "out")
    values = zarr.open_group(tmp_path / "out", mode="r").attrs["values"]
    assert values["step"] == 1  # type: ignore[index, call-overload]
    export_zarr(repo, None, tmp_path / "bare", tensors_only=True)
    assert zarr.open_group(tmp_path / "bare", mode="r").attrs["values"] == {}


def save_unevenly(rank: int, place: Place) -> None:
    torch.manual_seed(1)
    w = torch.randn(7, 5)
    with place.open() as repo:
        dcpstore.save({"w": distribute_tensor(w, mesh((2,)), [Shard(0)])}, repo)


def test_uneven_shards_are_one_array(
    place: Place, tmp_path: Path, two_ranks: RankPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_ranks.run(save_unevenly, place)
    torch.manual_seed(1)
    with place.open() as repo:
        export_zarr(repo, None, tmp_path / "out")
    array = zarr.open_group(tmp_path / "out", mode="r")["w"]
    assert isinstance(array, zarr.Array)
    assert np.array_equal(np.asarray(array[...]), torch.randn(7, 5).numpy())


def test_dtype(repo: Repository, tmp_path: Path) -> None:
    w = torch.randn(5, 3)
    dcpstore.save({"w": w}, repo)
    export_zarr(repo, None, tmp_path / "out", dtype="bf16")
    array = zarr.open_group(tmp_path / "out", mode="r")["w"]
    assert isinstance(array, zarr.Array)
    assert np.asarray(array[...]).tobytes() == as_bytes(w.bfloat16()).tobytes()


def test_zarr_alone_reads_it(repo: Repository, tmp_path: Path) -> None:
    dcpstore.save({"w": torch.arange(10.0), "odd/na%me": torch.arange(3)}, repo)
    export_zarr(repo, None, tmp_path / "out")
    script = (
        "import sys, json; sys.modules['dcpstore'] = sys.modules['torch'] = None; import zarr\n"
        f"group = zarr.open_group({str(tmp_path / 'out')!r}, mode='r')\n"
        "print(json.dumps({a.attrs['fqn']: a[...].tolist() for _, a in group.arrays()}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert json.loads(done.stdout) == {"w": list(range(10)), "odd/na%me": [0, 1, 2]}


def test_an_existing_target_is_left_alone(repo: Repository, tmp_path: Path) -> None:
    dcpstore.save({"w": torch.ones(2)}, repo)
    (tmp_path / "out").mkdir()
    with pytest.raises(AlreadyExistsError):
        export_zarr(repo, None, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
