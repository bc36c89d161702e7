"""A store in a process of its own, watched from outside while it saves and loads one state.

The process holds the state. Its peak is of anonymous memory (RssAnon and RssShmem of the kernel):
pages of a mapped file count as resident too, but are the page cache's and cost nothing when memory
is short, so they are left out; DCP reads copy by copy and has none. The state is the same in every
round, and whatever an allocator keeps from round to round counts: the base is what the process held
before the first.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.files import remove
from benchmarks.states import State
from benchmarks.stores import OURS, Store, open_dcp, open_ours
from benchmarks.timing import seconds

__all__ = ["LOAD", "SAVE", "Watched", "watched"]

SAVE, LOAD = "save", "load"
_EVERY = 0.002  # seconds between two looks
_PATIENCE = 300.0  # seconds for one save or load


class Watched(NamedTuple):
    """What one save or load took: bytes at the peak beside the state, and seconds."""

    peak: int
    seconds: float


@contextmanager
def watched(
    name: str, make: Callable[[], State], place: Path
) -> Iterator[Callable[[str], Watched]]:
    """Start a process that holds a state; yield what makes it save or load and returns the cost.

    Args:
        name: `OURS`, or anything else for torch's DCP.
        make: makes the state, in the process.
        place: of its folders; each save goes to a new one, `place/<number from 1>`.
    """
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(name, make, place, theirs), daemon=True)
    process.start()
    theirs.close()
    pid = process.pid
    assert pid is not None
    try:
        _wait(pipe, lambda: None)
        base = _held(pid)

        def ask(way: str) -> Watched:
            peak = 0

            def look() -> None:
                nonlocal peak
                peak = max(peak, _held(pid))

            pipe.send(way)
            took = _wait(pipe, look)
            return Watched(max(peak - base, 0), took)

        yield ask
    finally:
        process.kill()
        process.join()


def _wait(pipe: Connection, look: Callable[[], None]) -> float:
    deadline = time.monotonic() + _PATIENCE
    while not pipe.poll(_EVERY):
        look()
        if time.monotonic() > deadline:
            raise SystemExit(f"a process under measurement did not answer in {_PATIENCE:.0f} s")
    return float(pipe.recv())


def _serve(name: str, make: Callable[[], State], place: Path, pipe: Connection) -> None:
    store: Store = open_ours if name == OURS else open_dcp(1)
    small = {"x": torch.ones(1)}
    place.mkdir()
    with store(place / "0") as opened:  # what is imported is nobody's peak
        opened.save(small)
        opened.loads["load"](small)
    state = make()
    pipe.send(0.0)
    with ExitStack() as stack:
        number = 0
        while True:
            way = pipe.recv()
            if way == SAVE:
                stack.close()
                remove(place / str(number))
                number += 1
                opened = stack.enter_context(store(place / str(number)))
                took = seconds(partial(opened.save, state))
            else:
                took = seconds(partial(opened.loads["load"], state))
            pipe.send(took)


def _held(pid: int) -> int:
    """Return the bytes that a process holds itself."""
    held = 0
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            held += int(line.split()[1]) * 1024
    return held
