"""The benchmark runs, at tiny sizes, through its real command; its speed is not asked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.table import BEGIN, END
from benchmarks.workloads import WORKLOADS
from tests.ranks import ROOT

# What stands in the table of each workload: what is measured, against whom.
DCP, OTHERS = "DCP, default", ("torch.save", "safetensors", "zarr-python")
WHOLE = {
    (what, peer)
    for what in ("durable save", "load, every digest checked", "load, verify=False")
    for peer in (DCP, *OTHERS)
} | {("durable save", "DCP, best")}
RESHARDED = (
    "load on 2 (rows) of 2 (rows)",
    "load on 4 (rows) of 2 (rows)",
    "load on 2x2 (rows, columns) of 2 (rows)",
    "load on 4 (rows) of 4 (rows)",
    "load on 2 (rows) of 4 (rows)",
    "load on 2 (columns) of 4 (rows)",
)
ROWS: dict[str, set[tuple[str, str]]] = {
    "a": WHOLE,
    "b": WHOLE | {("bytes stored, lossless", "the state's bytes")},
    "c": WHOLE,
    "d": {("unchanged state, saved again", DCP)},
    "e": {("one layer of 1 changed, saved", DCP)},
    "f": {
        *((what, DCP) for what in ("save on 2 (rows)", "save on 4 (rows)", *RESHARDED)),
        *((f"{what}: bytes read", "what the ranks need") for what in RESHARDED),
    },
    "g": {
        ("caller blocked by async_save", peer)
        for peer in ("one memcpy of the state", "DCP async_save")
    },
    "h": {
        (f"planning {ranks} ranks x 4 tensors, {way}", "torch's planning, first")
        for ranks in (2, 4)
        for way in ("first", "repeated")
    },
    "i": {(f"peak memory above the state, {way}", DCP) for way in ("save", "load")},
}


def run(folder: Path, *words: str) -> tuple[str, dict[str, Any]]:
    """Return what the command prints, and its JSON."""
    command = [sys.executable, "-m", "benchmarks", "--tiny", "--rounds", "1"]
    command += ["--folder", str(folder / "bench"), "--json", str(folder / "out.json"), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "out.json").read_text())


def check(letters: str, printed: str, found: dict[str, Any]) -> None:
    """Check that every row of these workloads is there, in the table and in the JSON."""
    rows = found["rows"]
    for letter in letters:
        named = {(r["what"], r["peer"].partition(":")[0]) for r in rows if r["workload"] == letter}
        phases = {(what, peer) for what, peer in named if what.startswith("of our ")}
        assert named - phases == ROWS[letter]
        assert len(phases) >= 4 or letter not in "abc"  # those of a save and of a load
    lines = [line for line in printed.splitlines() if line.startswith("| (")]
    assert len(lines) == len(rows)
    for row, line in zip(rows, lines, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:3] == [f"({row['workload']})", row["what"], row["peer"]]
        assert min(row["ours"]) >= 0  # a tiny state may leave no peak
        assert cells[7] == {None: "", True: "yes", False: "NO"}[row["reached"]]
        assert (cells[6] == "") == (row["target"] is None)
    assert {"cpu", "cores", "memory", "filesystem", "torch"} <= set(found["machine"])
    assert all(rate > 0 for rates in found["limits"].values() for rate in rates)


def test_every_workload_has_its_rows_here() -> None:
    assert set(ROWS) == set(WORKLOADS)


@pytest.mark.slow
def test_the_table_and_the_json_have_every_row(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n\n{BEGIN}\nold\n{END}\n\nAfter\n")
    printed, found = run(tmp_path, "--only", "d", "--write", str(page))
    check("d", printed, found)
    assert page.read_text() == f"# Before\n\n{BEGIN}\n\n{printed.rstrip()}\n\n{END}\n\nAfter\n"
    assert not list((tmp_path / "bench").glob("run/*")), "a run cleans up"


@pytest.mark.slow
def test_everything_is_measured(tmp_path: Path) -> None:
    check("".join(ROWS), *run(tmp_path))
