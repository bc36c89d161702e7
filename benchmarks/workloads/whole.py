"""(a), (b), (c): a whole state, saved durably and loaded, by every store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from benchmarks.files import nbytes_below, warm
from benchmarks.states import State, nbytes_of, random_gpt, random_small
from benchmarks.stores import (
    DCP_DEFAULT,
    DCP_THREADS,
    OURS,
    PEERS,
    UNVERIFIED,
    Store,
    Work,
    open_ours,
)
from benchmarks.table import Row
from benchmarks.timing import Contender, Measured, Samples, seconds
from benchmarks.trained import trained_gpt
from benchmarks.workloads.bench import Bench

__all__ = ["measure_bf16", "measure_fp32", "measure_small"]

SAVE, LOAD = "save", "load"
STORED = "bytes stored"


@dataclass(frozen=True, slots=True)
class _Targets:
    """How many times faster ours must be; None asks nothing."""

    save: float | None = None
    save_best: float | None = None
    load: float | None = None
    load_unverified: float | None = None


def measure_fp32(bench: Bench) -> list[Row]:
    """(a) GPT-2 small with Adam, fp32."""
    state = random_gpt(bench.scale)
    targets = _Targets(save=2.2, save_best=1.6, load=2.5, load_unverified=4)
    return _rows("a", state, _measure(bench, state), targets)


def measure_bf16(bench: Bench) -> list[Row]:
    """(b) The same in bf16, as trained weights are; the bytes stored too."""
    state = trained_gpt(bench.scale, bench.folder, bench.say)
    measured = _measure(bench, state)
    raw = Samples((float(nbytes_of(state)),))
    stored = Row(
        "b",
        "bytes stored, lossless",
        "the state's bytes",
        raw,
        measured[OURS][STORED],
        unit="bytes",
        kind="share",
        target=0.80,
    )
    return [stored, *_rows("b", state, measured, _Targets(save_best=1.6))]


def measure_small(bench: Bench) -> list[Row]:
    """(c) 5,000 tensors of 4 KiB."""
    state = random_small(bench.scale)
    return _rows("c", state, _measure(bench, state), _Targets(save=2.5, load=2.5))


def _measure(bench: Bench, state: State) -> Measured:
    """Save and load a state by every store, once a round."""
    target = {fqn: torch.empty_like(tensor) for fqn, tensor in state.items()}
    stores = {**PEERS, OURS: open_ours}
    for store in stores.values():  # the first call of each imports and sets up
        _contender(bench, store, small := {"x": torch.ones(1)}, small)(1)
    return bench.in_turns(
        {name: _contender(bench, store, state, target) for name, store in stores.items()}
    )


def _contender(bench: Bench, store: Store, state: State, target: State) -> Contender:
    """Return one round of a store: save to a new place, then load, by each of its ways."""

    def run(number: int) -> Mapping[str, float]:
        with bench.place("whole") as place, store(place) as opened:
            found = _timed(SAVE, opened.save, state)
            found[STORED] = nbytes_below(place)
            if not opened.loads and found[STORED] < nbytes_of(state):
                raise SystemExit("DCP stored less than the state: a writing thread failed")
            warm(place)
            for way, load in opened.loads.items():
                for tensor in target.values():
                    tensor.zero_()
                found |= _timed(way, load, target)
                if number == 0:
                    _check(state, target)
            return found

    return run


def _timed(what: str, work: Work, state: State) -> dict[str, float]:
    """Return the seconds of a save or load, and those of its phases where it tells them."""
    told: list[Mapping[str, float] | None] = []
    took = seconds(lambda: told.append(work(state)))
    phases = {phase: spent for phase, spent in (told[0] or {}).items() if spent}
    if phases:
        phases["the rest"] = took - sum(phases.values())
    return {what: took, **{f"{what}: {phase}": spent for phase, spent in phases.items()}}


def _check(state: State, loaded: State) -> None:
    """Compare bit by bit: a load that is fast because it is wrong does not count."""
    for fqn, tensor in state.items():
        if not torch.equal(tensor.view(torch.uint8), loaded[fqn].view(torch.uint8)):
            raise SystemExit(f"{fqn} was not loaded as it was saved")


def _rows(workload: str, state: State, measured: Measured, targets: _Targets) -> list[Row]:
    nbytes, ours = nbytes_of(state), measured[OURS]
    best = min(DCP_THREADS, key=lambda name: measured[name][SAVE].median)

    def row(what: str, peer: str, theirs: str, way: str, target: float | None) -> Row:
        work = {"write": nbytes} if way == SAVE else {"read": nbytes}
        if way == LOAD:
            work["digest"] = nbytes
        return Row(
            workload,
            what,
            peer,
            measured[theirs][SAVE if way == SAVE else LOAD],
            ours[way],
            target=target,
            least_work=work,
        )

    others = [name for name in PEERS if name not in DCP_THREADS]
    best_name = f"DCP, best: {DCP_THREADS[best]} of {sorted(DCP_THREADS.values())} threads"
    verified, unverified = "load, every digest checked", "load, verify=False"
    phases = [
        Row(workload, f"of our {way}", f"our {whole}", ours[whole], ours[way], kind="share")
        for whole in (SAVE, LOAD)
        for way in ours
        if way.startswith(f"{whole}: ")
    ]
    return [
        row("durable save", DCP_DEFAULT, DCP_DEFAULT, SAVE, targets.save),
        row("durable save", best_name, best, SAVE, targets.save_best),
        *(row("durable save", name, name, SAVE, None) for name in others),
        row(verified, DCP_DEFAULT, DCP_DEFAULT, LOAD, targets.load),
        *(row(verified, name, name, LOAD, None) for name in others),
        row(unverified, DCP_DEFAULT, DCP_DEFAULT, UNVERIFIED, targets.load_unverified),
        *(row(unverified, name, name, UNVERIFIED, None) for name in others),
        *phases,
    ]
