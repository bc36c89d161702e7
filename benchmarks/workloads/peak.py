"""(i) Peak memory above the state itself, of a save and of a load; see `benchmarks.watched`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial

from benchmarks.states import random_gpt
from benchmarks.stores import DCP_DEFAULT, OURS
from benchmarks.table import Row
from benchmarks.timing import Contender
from benchmarks.watched import LOAD, SAVE, Watched, watched
from benchmarks.workloads.bench import Bench

__all__ = ["measure_peak"]

MIB = 1 << 20


def measure_peak(bench: Bench) -> list[Row]:
    """(i) Peak memory of a first save and of a load with every digest checked."""
    with ExitStack() as stack:
        contenders: dict[str, Contender] = {}
        for name in (DCP_DEFAULT, OURS):
            place = stack.enter_context(bench.place(name.replace(", ", "-")))
            ask = stack.enter_context(watched(name, partial(random_gpt, bench.scale), place))
            contenders[name] = _contender(ask)
        measured = bench.in_turns(contenders)
    return [
        Row(
            "i",
            f"peak memory above the state, {way}",
            DCP_DEFAULT,
            measured[DCP_DEFAULT][way],
            measured[OURS][way],
            unit="bytes",
            kind="amount",
            target=target,
        )
        for way, target in ((SAVE, 256 * MIB), (LOAD, 128 * MIB))
    ]


def _contender(ask: Callable[[str], Watched]) -> Contender:
    def run(number: int) -> Mapping[str, float]:
        return {way: float(ask(way).peak) for way in (SAVE, LOAD)}

    return run
