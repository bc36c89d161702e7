"""A long training run in one process: saves and loads, with retention and gc, and what it holds.

Run in a child of its own, so that nothing else's memory is counted.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

import dcpstore
from dcpstore import Repository, Retention
from tests.torture.sites import Site, state

__all__ = ["Held", "soak"]

KEPT = 3
EVERY = 10  # steps from one gc to the next


@dataclass(frozen=True)
class Held:
    """What a process holds, and what lies in the data folder.

    Attributes:
        descriptors, threads: of the process.
        connections: to a Postgres server.
        memory: bytes of the process that are in memory.
        packs: bytes of all packs and manifests.
        journal: objects of the journal.
    """

    descriptors: int
    threads: int
    connections: int
    memory: int
    packs: int
    journal: int


def soak(site: Site, steps: int, asynchronously: bool) -> list[Held]:
    """Save and load `steps` times; return what is held after each gc."""
    torch.set_num_threads(2)
    held = []
    with site.open(create=True) as repo:
        for step in range(steps):
            _save(repo, step, asynchronously)
            template = {key: _blank(value) for key, value in state(0).items()}
            dcpstore.load(template, repo)
            assert template["number"] == step
            assert torch.equal(template["big"], state(step)["big"])  # type: ignore[arg-type]
            if step % EVERY == EVERY - 1:
                repo.gc(grace="0s")
                held.append(_look(repo))
    return held


def _save(repo: Repository, step: int, asynchronously: bool) -> None:
    save: Callable[..., object] = dcpstore.async_save if asynchronously else dcpstore.save
    pending = save(state(step), repo, step=step, retention=Retention(keep_last=KEPT))
    if asynchronously:
        pending.result()  # type: ignore[attr-defined]


def _blank(value: object) -> object:
    return torch.zeros_like(value) if isinstance(value, torch.Tensor) else None


def _look(repo: Repository) -> Held:
    gc.collect()
    connections = 0
    if "postgresql" in repr(repo):
        query = "SELECT count(*) AS n FROM pg_stat_activity WHERE datname = current_database()"
        connections = repo.sql(query)[0].n - 1  # this one
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    storage = repo.storage
    keys = [*storage.list("packs"), *storage.list("manifests")]
    return Held(
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=threading.active_count(),
        connections=connections,
        memory=resident,
        packs=sum(storage.size(key) for key in keys),
        journal=len(list(storage.list("operations"))),
    )
