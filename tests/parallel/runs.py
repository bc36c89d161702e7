"""The two halves of a case, as each rank runs them: train and save, then load and train further."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

import dcpstore
from tests.parallel.layouts import Layout, build
from tests.parallel.states import bits, give, scramble, take, whole

STEPS = 2  # trained before the save

# The ways to save and load a state: torch's own storage, and each of ours.
SAVES: dict[str, Callable[[dict[str, Any], Path], Any]] = {
    "torch": lambda s, to: dcp.save(s, storage_writer=dcp.FileSystemWriter(to)),
    "torch's save": lambda s, to: dcp.save(s, storage_writer=dcpstore.FileSystemWriter(to)),
    "save": dcpstore.save,
}
LOADS: dict[str, Callable[[dict[str, Any], Path], Any]] = {
    "torch": lambda s, at: dcp.load(s, storage_reader=dcp.FileSystemReader(at)),
    "torch's save": lambda s, at: dcp.load(s, storage_reader=dcpstore.FileSystemReader(at)),
    "save": dcpstore.load,
}


@dataclass(frozen=True)
class Half:
    """One side of a case."""

    layout: Layout
    optimizer: str
    moe: bool  # the model with experts
    flat: bool  # the optimizer's state by parameter, without groups, as disjoint modules need it


@dataclass(frozen=True)
class Outcome:
    """What a job holds, all ranks together, and the losses of its next steps."""

    whole: dict[str, Any]
    losses: tuple[float, float]


def save(rank: int, half: Half, folder: Path) -> Outcome:
    """Train, save in every way, and train further."""
    with warnings.catch_warnings():
        _ignore_torchs()
        job = build(half.layout, half.optimizer, seed=1, moe=half.moe, flat=half.flat)
        for step in range(STEPS):
            job.train(step)
        state = take(job)
        for way, run in SAVES.items():
            run(state, folder / way)
        return Outcome(whole(job), (job.train(STEPS), job.train(STEPS + 1)))


def load(rank: int, half: Half, folder: Path) -> Outcome:
    """Load another job in every way, which must all give the same bits, and train it further."""
    with warnings.catch_warnings():
        _ignore_torchs()
        job = build(half.layout, half.optimizer, seed=2, moe=half.moe, flat=half.flat)
        found: dict[str, dict[str, Any]] = {}
        for way, run in LOADS.items():
            state = take(job)
            scramble(state)
            run(state, folder / way)
            found[way] = bits(state)
        for way, given in found.items():
            different = sorted(fqn for fqn, value in found["save"].items() if given[fqn] != value)
            assert not different, f"rank {rank}: {way} and save differ in {different}"
        give(job, state)
        return Outcome(whole(job), (job.train(STEPS), job.train(STEPS + 1)))


def _ignore_torchs() -> None:
    """Ignore torch's warnings: that there is no process group, and of its own deprecations."""
    warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")


def save_raw(rank: int, half: Half, folder: Path) -> Outcome:
    """Train, save the model and the optimizer as they are, and train further."""
    with warnings.catch_warnings():
        _ignore_torchs()
        job = build(half.layout, half.optimizer, seed=1)
        for step in range(STEPS):
            job.train(step)
        SAVES["save"]({"model": job.model, "optim": job.optimizer}, folder / "save")
        SAVES["torch"]({"model": job.model, "optim": job.optimizer}, folder / "torch")
        return Outcome(whole(job), (job.train(STEPS), job.train(STEPS + 1)))


def load_raw(rank: int, half: Half, folder: Path, way: str) -> Outcome:
    """Load into a new model and an optimizer that has taken no step, and train further."""
    with warnings.catch_warnings():
        _ignore_torchs()
        job = build(half.layout, half.optimizer, seed=2)
        LOADS[way]({"model": job.model, "optim": job.optimizer}, folder / way)
        return Outcome(whole(job), (job.train(STEPS), job.train(STEPS + 1)))
