"""(i) Peak memory above the state itself, of a save and of a load.

Each store has a process of its own, which holds the state. What is measured is its anonymous memory
(RssAnon and RssShmem of the kernel), polled from outside while it works: pages of a mapped file
count as resident too, but are the page cache's and cost nothing when memory is short, so they are
left out; DCP reads copy by copy and has none. The state is the same in every round, and whatever an
allocator keeps from round to round counts: the base is what the process held before the first.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.files import remove
from benchmarks.scale import Scale
from benchmarks.states import random_gpt
from benchmarks.stores import DCP_DEFAULT, OURS, Store, open_dcp, open_ours
from benchmarks.table import Row
from benchmarks.timing import Contender
from benchmarks.workloads.bench import Bench

__all__ = ["measure_peak"]

MIB = 1 << 20
SAVE, LOAD = "save", "load"
_EVERY = 0.002  # seconds between two looks
_PATIENCE = 300.0  # seconds for one save or load


def measure_peak(bench: Bench) -> list[Row]:
    """(i) Peak memory of a first save and of a load with every digest checked."""
    with ExitStack() as stack:
        contenders: dict[str, Contender] = {}
        for name in (DCP_DEFAULT, OURS):
            place = stack.enter_context(bench.place(name.replace(", ", "-")))
            ask = stack.enter_context(_process(name, bench.scale, place))
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


def _contender(ask: Callable[[str], float]) -> Contender:
    def run(number: int) -> Mapping[str, float]:
        return {way: ask(way) for way in (SAVE, LOAD)}

    return run


@contextmanager
def _process(name: str, scale: Scale, place: Path) -> Iterator[Callable[[str], float]]:
    """Start a process that holds the state; yield what asks it to work and tells its peak."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(name, scale, place, theirs), daemon=True)
    process.start()
    theirs.close()
    pid = process.pid
    assert pid is not None
    try:
        _wait(pipe, lambda: None)
        base = _held(pid)

        def ask(way: str) -> float:
            peak = 0

            def look() -> None:
                nonlocal peak
                peak = max(peak, _held(pid))

            pipe.send(way)
            _wait(pipe, look)
            return float(max(peak - base, 0))

        yield ask
    finally:
        process.kill()
        process.join()


def _wait(pipe: Connection, look: Callable[[], None]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not pipe.poll(_EVERY):
        look()
        if time.monotonic() > deadline:
            raise SystemExit(f"a process under measurement did not answer in {_PATIENCE:.0f} s")
    pipe.recv()


def _serve(name: str, scale: Scale, place: Path, pipe: Connection) -> None:
    store: Store = open_ours if name == OURS else open_dcp(1)
    small = {"x": torch.ones(1)}
    place.mkdir()
    with store(place / "0") as opened:  # what is imported is nobody's peak
        opened.save(small)
        opened.loads["load"](small)
    state = random_gpt(scale)
    pipe.send(None)
    with ExitStack() as stack:
        number = 0
        while True:
            way = pipe.recv()
            if way == SAVE:
                stack.close()
                remove(place / str(number))
                number += 1
                opened = stack.enter_context(store(place / str(number)))
                opened.save(state)
            else:
                opened.loads["load"](state)
            pipe.send(None)


def _held(pid: int) -> int:
    """Return the bytes that a process holds itself."""
    held = 0
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            held += int(line.split()[1]) * 1024
    return held
