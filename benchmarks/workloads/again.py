"""(d), (e): a state of which the repository holds all, or all but one layer, saved again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from benchmarks.states import State, layer_of, nbytes_of, random_gpt
from benchmarks.stores import DCP_DEFAULT, OURS, open_dcp, open_ours
from benchmarks.table import Row
from benchmarks.timing import Contender, Measured, seconds
from benchmarks.workloads.bench import Bench

__all__ = ["measure_layer", "measure_unchanged"]


def measure_unchanged(bench: Bench) -> list[Row]:
    """(d) Nothing changed since the version before."""
    state = random_gpt(bench.scale)
    measured = _measure(bench, state, lambda number: None)
    return [_row("d", "unchanged state, saved again", measured, 8, {"digest": nbytes_of(state)})]


def measure_layer(bench: Bench) -> list[Row]:
    """(e) One transformer block changed: its parameters and both moments."""
    state, layers = random_gpt(bench.scale), bench.scale.layers
    dice = torch.Generator().manual_seed(4)
    changed_in: set[int] = set()

    def change(number: int) -> None:
        """Change one layer, once a round, whichever store comes first in it."""
        if number not in changed_in:
            changed_in.add(number)
            for tensor in layer_of(state, number % layers).values():
                tensor.normal_(0, 0.02, generator=dice)

    measured = _measure(bench, state, change)
    least = {"digest": nbytes_of(state), "write": nbytes_of(layer_of(state, 0))}
    return [_row("e", f"one layer of {layers} changed, saved", measured, 4, least)]


def _measure(bench: Bench, state: State, change: Callable[[int], None]) -> Measured:
    """Save `state` once a round by DCP's default and, each a version on the last, by ours."""
    dcp = open_dcp(1)

    def save_whole(number: int) -> Mapping[str, float]:
        change(number)
        with bench.place("whole") as place, dcp(place) as opened:
            return {"save": seconds(partial(opened.save, state))}

    with bench.place("repository") as place, open_ours(place) as ours:
        ours.save(state)

        def save_again(number: int) -> Mapping[str, float]:
            change(number)
            return {"save": seconds(partial(ours.save, state))}

        contenders: dict[str, Contender] = {DCP_DEFAULT: save_whole, OURS: save_again}
        return bench.in_turns(contenders)


def _row(
    workload: str, what: str, measured: Measured, target: float, least: Mapping[str, int]
) -> Row:
    return Row(
        workload,
        what,
        DCP_DEFAULT,
        measured[DCP_DEFAULT]["save"],
        measured[OURS]["save"],
        target=target,
        least_work=least,
    )
