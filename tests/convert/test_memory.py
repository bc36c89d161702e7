"""The memory of a bridge: a process that moves 384 MiB needs a fraction of it, both ways.

What is asked is one shard and 512 MiB; held to is less, so that less data can show it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import dcpstore
from dcpstore.convert import import_torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.timeout(600),
]

TENSORS = 6
TENSOR = 64 << 20  # bytes
BOUND = TENSOR + (192 << 20)  # of 384 MiB

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from dcpstore import api, convert

def peak():
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in s)
    return int(line.split()[1]) * 1024

def peak_begins():
    Path("/proc/self/clear_refs").write_text("5")

peak_begins()
before = peak()
for bridge, *args in json.loads(sys.argv[1]):
    peak_begins()
    if bridge == "held":
        held = torch.load(args[0], mmap=True)
        sum(tensor.sum() for tensor in held.values())
    else:
        getattr(convert, bridge)(*args)
    print(bridge, peak() - before)
"""


def peaks_of(folder: Path, *calls: tuple[str, ...]) -> dict[str, int]:
    """Return the bytes that a process needs at most for each bridge, mapped ones included."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(calls)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(dcpstore.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return {name: int(peak) for name, peak in (line.split() for line in done.stdout.splitlines())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a repository of 384 MiB; removed after these tests, for it is large."""
    folder = tmp_path_factory.mktemp("large")
    torch.save(large_state(), folder / "in.pt")
    import_torch(folder / "in.pt", folder / "repo")
    yield folder
    shutil.rmtree(folder)


def large_state() -> dict[str, torch.Tensor]:
    return {f"layer.{i}": torch.empty(TENSOR // 4096, 1024).uniform_() for i in range(TENSORS)}


def test_importing(folder: Path) -> None:
    save_file(large_state(), folder / "in.safetensors")
    dcp.save(large_state(), checkpoint_id=folder / "in.dcp", no_dist=True)
    peaks = peaks_of(
        folder,
        ("import_torch", "in.pt", "torch"),
        ("import_safetensors", "in.safetensors", "safetensors"),
        ("import_dcp", "in.dcp", "dcp"),
    )
    assert {bridge: peak for bridge, peak in peaks.items() if peak > BOUND} == {}
    assert len(peaks) == 3


def test_exporting(folder: Path) -> None:
    forms = ("torch", "safetensors", "dcp", "zarr")
    peaks = peaks_of(folder, *((f"export_{f}", "repo", "v1", f"out.{f}") for f in forms))
    assert {bridge: peak for bridge, peak in peaks.items() if peak > BOUND} == {}
    assert len(peaks) == len(forms)


def test_the_measure_sees_what_is_held(folder: Path) -> None:
    assert peaks_of(folder, ("held", "in.pt"))["held"] > BOUND
