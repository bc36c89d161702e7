"""Measure how costs grow, and print the table: `python -m benchmarks.growth --help`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.growth.figures import FULL, SMALL, Figure, Part, Run, as_json, line, render
from benchmarks.growth.many_ranks import measure_ranks
from benchmarks.growth.round_trips import measure_round_trips
from benchmarks.growth.tensors import measure_many_tensors, measure_versions_added
from benchmarks.growth.versions import measure_long_histories
from benchmarks.growth.writers import measure_writers
from benchmarks.machine import describe

__all__ = ["PARTS", "main"]

PARTS: dict[str, Part] = {
    "round trips": measure_round_trips,
    "tensors": measure_versions_added,
    "many tensors": measure_many_tensors,
    "ranks": measure_ranks,
    "writers": measure_writers,
    "versions": measure_long_histories,
}


def main(words: Sequence[str] | None = None) -> None:
    """Run the parts that were asked for."""
    asked = _parse(words)
    asked.folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    found: dict[str, list[Figure]] = {}
    for name in asked.only:

        def say(text: str, name: str = name) -> None:
            print(
                f"[{time.monotonic() - began:5.0f} s] {name}: {text}", file=sys.stderr, flush=True
            )

        say("begins")
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            run = Run(Path(folder).resolve(), SMALL if asked.small else FULL, say)
            for figure in PARTS[name](run):
                say(line(figure))
                # A target is about the full size.
                found.setdefault(name, []).append(
                    replace(figure, target=None) if asked.small else figure
                )
    about = describe(asked.folder)
    print(render(about, found, small=asked.small))
    if asked.json is not None:
        report = as_json(about, found, small=asked.small)
        asked.json.write_text(json.dumps(report, indent=2) + "\n")


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument(
        "--only",
        type=_parts,
        default=list(PARTS),
        metavar="PART,PART",
        help=f"these parts alone, of: {', '.join(PARTS)}",
    )
    parser.add_argument("--small", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench-scale"), help="on the disk to measure"
    )
    return parser.parse_args(words)


def _parts(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no part {unknown}; there are {list(PARTS)}")
    return names


if __name__ == "__main__":
    main()
