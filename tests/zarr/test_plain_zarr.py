"""A version opened by zarr and fsspec alone, where dcpstore cannot be imported."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dcpstore.encoding import dtypes
from dcpstore.geometry.grids import Grid
from dcpstore.zarr import references

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

READER = """
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("dcpstore", "torch"):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
try:
    import dcpstore
except ImportError:
    pass
else:
    raise SystemExit("dcpstore was imported")
import zarr
reference, options = sys.argv[1], json.loads(sys.argv[2])
group = zarr.open_group("reference://", storage_options={"fo": reference, **options}, mode="r")

def read(group):
    found = {}
    for name, node in group.members():
        if isinstance(node, zarr.Group):
            found |= {name + "/" + k: v for k, v in read(node).items()}
        else:
            found[name] = [str(node.dtype), node.shape, node[...].tobytes().hex(), dict(node.attrs)]
    return found

print(json.dumps({"arrays": read(group), "attributes": dict(group.attrs)}))
"""


def read_plainly(reference: Path, **options: object) -> dict:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", READER, str(reference), json.dumps(options)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run_script(folder: Path, *arguments: str) -> str:
    """Return what `references.py` writes when it lies in a data folder, without any package."""
    shutil.copy(references.__file__, folder)
    done = subprocess.run(
        [sys.executable, "-S", "-I", "-W", "error", folder / "references.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def tensors() -> dict[str, tuple[torch.Tensor, tuple[Grid, ...]]]:
    """Return every dtype on a grid with a padded edge, and odd shapes and names."""
    grid = Grid((0, 0), (5, 7), (2, 4))
    found: dict[str, tuple[torch.Tensor, tuple[Grid, ...]]] = {}
    for name, dtype in dtypes._DTYPES.items():
        raw = (torch.arange(35 * dtype.itemsize) * 37 % 251).to(torch.uint8)
        tensor = (raw % 2).bool() if name == "bool" else raw.view(dtype)
        found[f"model.{name}"] = (tensor.reshape(5, 7), (grid,))
    found["scalar"] = (torch.tensor(3.5), (Grid((), (), ()),))
    found["empty"] = (torch.zeros(0, 3), (Grid((0, 0), (0, 3), (1, 3)),))
    found["split"] = (
        torch.arange(10.0),
        (Grid((0,), (3,), (3,)), Grid((3,), (7,), (4,))),
    )
    found["large"] = (torch.arange(83), (Grid((0,), (83,), (2,)),))
    for odd in ("a/b", "c", "zarr.json", "__x", "..", "", "ü\ud800\n", "100%", "{{data}}", "x y*"):
        found[odd] = (torch.tensor([len(odd)]), (Grid((0,), (1,), (1,)),))
    return found


@pytest.mark.parametrize("codec", ["none", "blosc", "zstd"])
def test_every_tensor_is_read_exactly(write, codec: str, tmp_path: Path) -> None:
    saved = tensors()
    written = write(
        saved,
        codec=codec,
        values={"lr": "0.001", "odd": '{"$tuple":[1,2]}'},
        step=7,
    )
    script = tmp_path / "v1.json"
    script.write_text(run_script(Path(written.storage.url), "ab12"))
    assert json.loads(script.read_text()) == json.loads(written.reference.read_text())
    found = read_plainly(script)
    assert found["attributes"] == {
        "uid": "ab12",
        "step": 7,
        "values": {"lr": 0.001, "odd": {"$tuple": [1, 2]}},
    }
    split = {path: array for path, array in found["arrays"].items() if path.startswith("split/")}
    assert {path: array[3]["offsets"] for path, array in split.items()} == {
        "split/0": [0],
        "split/1": [3],
    }
    assert split["split/0"][2] + split["split/1"][2] == torch.arange(10.0).numpy().tobytes().hex()
    whole = [array for path, array in found["arrays"].items() if path not in split]
    assert {array[3]["fqn"] for array in whole} == set(saved) - {"split"}
    for dtype, shape, raw, attributes in whole:
        tensor, _ = saved[attributes["fqn"]]
        assert attributes["torch_dtype"] == dtypes.dtype_name(tensor.dtype)
        assert tuple(shape) == tuple(tensor.shape)
        assert dtype == dtypes.numpy_dtype(attributes["torch_dtype"]).name
        assert raw == dtypes.as_bytes(tensor).tobytes().hex()


def test_a_moved_repository_is_read_with_one_override_or_where_the_script_is(
    write, tmp_path: Path
) -> None:
    written = write({"w": (torch.arange(4), (Grid((0,), (4,), (3,)),))})
    moved = tmp_path / "elsewhere"
    shutil.move(written.storage.url, moved)
    wanted = torch.arange(4).numpy().tobytes().hex()
    reference = moved / "references" / written.reference.name
    found = read_plainly(reference, template_overrides={"data": str(moved)})
    assert found["arrays"]["w"][2] == wanted
    again = tmp_path / "again.json"
    again.write_text(run_script(moved, "ab12"))
    assert read_plainly(again)["arrays"]["w"][2] == wanted
    served = json.loads(run_script(moved, "ab12", "--data", "s3://bucket/ckpts"))
    assert served["templates"] == {"data": "s3://bucket/ckpts"}
