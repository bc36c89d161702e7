"""The benchmark of growth runs, at small sizes, through its real command: each row has a figure."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.growth.__main__ import PARTS
from benchmarks.growth.figures import SMALL, Figure, as_json, render
from tests.ranks import ROOT

# What stands in the table of each part on each of its databases, "" where none matters.
ADDED = ("catalog", "data without packs", "packs", "new rows")
CHANGED = ("none", "1 %, neighbours", "all")
RANKS = f"{SMALL.ranks[0]:,} ranks x {SMALL.ranks[1]:,} tensors: "
PLANNED = f"planning {SMALL.planned[0]:,} ranks x {SMALL.planned[1]:,} tensors: "
FEW, MANY = SMALL.versions
CONTESTS = ("1 writer, one branch", "2 writers, one branch", "2 writers, branches of their own")
FILTERS = (
    "--where, all match",
    "--where, the newest match",
    "--where, the oldest match",
    "--steps, the oldest",
    "--since, the newest",
    "--until, the oldest",
    "--label, a tenth matches",
    "--label, none matches",
    "--tag, a pattern",
    "--branch",
)
QUESTIONS = (
    *("open", "load", "diff", "log", "best", "main~far", "main@step", "misspelt ref"),
    *("absent step", "expire --dry-run", "gc, nothing to do", "quick verify, nothing new"),
    *("save", "save(retention=)", "tag", "rollback"),
    *(f"{log} {name}" for log in ("log", "log main") for name in FILTERS),
)


def on_both(names: Iterable[str]) -> dict[str, set[str]]:
    return {"sqlite": set(names), "postgres": set(names)}


ROWS: dict[str, dict[str, set[str]]] = {
    "round trips": on_both([f"statements of a small {what}" for what in ("save", "tag", "load")]),
    "tensors": on_both(
        [
            *(f"changed: {how}: {what}" for how in CHANGED for what in ADDED),
            "processor time of an unchanged save, of a full one",
        ]
    ),
    "many tensors": {
        "sqlite": {
            *(f"{way}, in DCP's time" for way in ("save", "load")),
            *(f"memory beside the state, {way}" for way in ("save", "load")),
            "catalog and metadata, of the data",
        }
    },
    "ranks": {
        **on_both(
            [
                *(f"{RANKS}{what} a chunk" for what in ("catalog", "data without packs")),
                *(f"{RANKS}commit of {what} new" for what in ("all", "nothing")),
            ]
        ),
        "": {f"{PLANNED}{what}" for what in ("seconds", "memory", "received", "sent")},
    },
    "writers": on_both(
        [
            f"{contest}: {what}"
            for contest in CONTESTS
            for what in ("errors", "saves a second", "time in the lock")
        ]
    ),
    "versions": on_both([f"{name}, {FEW:,} -> {MANY:,} versions" for name in QUESTIONS]),
}


def run(folder: Path, *words: str) -> tuple[str, list[dict[str, Any]]]:
    """Return what the command prints, and the figures of its JSON."""
    command = [sys.executable, "-m", "benchmarks.growth", "--small", *words]
    command += ["--folder", str(folder / "bench"), "--json", str(folder / "out.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list((folder / "bench").iterdir()), "a run cleans up"
    return done.stdout, json.loads((folder / "out.json").read_text())["figures"]


def test_every_part_has_its_rows_here() -> None:
    assert set(ROWS) == set(PARTS)


@pytest.mark.slow
@pytest.mark.parametrize("part", ROWS)
def test_every_row_has_a_figure(part: str, tmp_path: Path) -> None:
    printed, figures = run(tmp_path, "--only", part)
    for database, named in ROWS[part].items():
        assert {f["what"] for f in figures if f["database"] == database} == named
    assert len(figures) == sum(map(len, ROWS[part].values()))
    lines = [line for line in printed.splitlines() if line.startswith(f"| {part} ")]
    assert len(lines) == len(figures)
    for line, figure in zip(lines, figures, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1:3] == [figure["what"], figure["database"]]
        assert cells[3]
        assert math.isfinite(figure["value"])
        assert figure["value"] > 0 or figure["unit"] in ("bytes", "rows", "errors")
        assert figure["unit"] != "errors" or figure["value"] == 0, figure["note"]
        assert figure["target"] is None, "targets are about the full size"


@pytest.mark.parametrize(
    ("figure", "cells"),
    [
        (Figure("a", 3_999, "bytes", 4_000), ["4 kB", "<= 4 kB", "yes"]),
        (Figure("a", 4_001, "bytes", 4_000), ["4 kB", "<= 4 kB", "NO"]),
        (Figure("a", 0.2, "share", 0.25, "sqlite", "1 of 5 ms"), ["20 %", "<= 25 %", "yes"]),
        (Figure("a", 1_234, "rows"), ["1,234 rows", "", ""]),
        (Figure("a", 0, "errors", 0), ["0 errors", "<= 0 errors", "yes"]),
        (Figure("a", 1.5, "times", 1.5), ["1.5 times", "<= 1.5 times", "yes"]),
        (Figure("a", 0.01, "s", 1), ["10 ms", "<= 1 s", "yes"]),
    ],
)
def test_a_figure_is_held_to_its_target(figure: Figure, cells: list[str]) -> None:
    line = render({"cpu": "any"}, {"part": [figure]}, small=False).splitlines()[-1]
    found = [cell.strip() for cell in line.strip("|").split("|")]
    assert found == ["part", "a", figure.database, *cells, figure.note]
    (written,) = as_json({}, {"part": [figure]}, small=False)["figures"]  # type: ignore[misc]
    assert written["met"] == figure.is_met
