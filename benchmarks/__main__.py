"""Measure, print the table, and keep it: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.machine import describe, probe
from benchmarks.scale import FULL, TINY
from benchmarks.table import Row, as_json, render, replace_table
from benchmarks.timing import Samples
from benchmarks.workloads import WORKLOADS, Bench

LEAST_ROUNDS = 5


def main(words: Sequence[str] | None = None) -> None:
    """Run the workloads that were asked for."""
    asked = _parse(words)
    asked.folder.mkdir(parents=True, exist_ok=True)
    scale = TINY if asked.tiny else FULL
    rows: list[Row] = []
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {text}", file=sys.stderr, flush=True)

    # Half of the probes before and half after, so that a machine that changes meanwhile shows it.
    half = (asked.rounds + 1) // 2
    limits = [probe(asked.folder, nbytes=scale.probe, rounds=half, say=_prefixed(say, "probe"))]
    for letter in asked.only:
        bench = Bench(asked.folder, scale, asked.rounds, _prefixed(say, f"({letter})"))
        rows += WORKLOADS[letter](bench)
    limits.append(
        probe(asked.folder, nbytes=scale.probe, rounds=half, say=_prefixed(say, "probe again"))
    )
    probed = {
        name: Samples(tuple(value for found in limits for value in found[name].values))
        for name in limits[0]
    }
    machine = describe(asked.folder)
    report = render(machine, probed, rows, rounds=asked.rounds, is_tiny=asked.tiny)
    print(report)
    if asked.json is not None:
        found = as_json(machine, probed, rows, rounds=asked.rounds, is_tiny=asked.tiny)
        asked.json.write_text(json.dumps(found, indent=2) + "\n")
    if asked.write is not None:
        replace_table(asked.write, report)


def _prefixed(say: Callable[[str], None], prefix: str) -> Callable[[str], None]:
    return lambda text: say(f"{prefix} {text}")


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only",
        type=_letters,
        default=list(WORKLOADS),
        metavar="a,c",
        help="these workloads alone, by their letters in docs/performance.md",
    )
    parser.add_argument("--rounds", type=int, default=LEAST_ROUNDS)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("build/bench"),
        help="on the disk to measure; keeps the trained weights for the next run",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the table of a page")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that it works")
    asked = parser.parse_args(words)
    if asked.rounds < LEAST_ROUNDS and not asked.tiny:
        parser.error(f"--rounds {asked.rounds} says too little; take {LEAST_ROUNDS} or more")
    return asked


def _letters(text: str) -> list[str]:
    letters = [letter.strip() for letter in text.split(",")]
    unknown = [letter for letter in letters if letter not in WORKLOADS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no workload {unknown}; there are {list(WORKLOADS)}")
    return letters


if __name__ == "__main__":
    main()
