"""Processes that save at once: saves a second, errors, and the share of their time in the lock.

The lock is the one that mutations wait for: on SQLite the turn to write, on Postgres the
repository's row, from the statement that takes it until the connection goes back after the commit.
A writer's time in the lock is the time that it waits for it and the time that it holds it.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.synchronize import Barrier
from typing import Any
from unittest.mock import patch

import torch
from sqlalchemy import Engine, Pool, event

import dcpstore
from benchmarks.databases import Place, places
from benchmarks.growth.figures import Figure, Run
from benchmarks.states import State
from dcpstore.catalog.db.write_queue import WriteQueue

__all__ = ["measure_writers"]

DATABASES = ("sqlite", "postgres")
IN_LOCK = 0.2  # of the time of `TARGET_WRITERS` on branches of their own
TARGET_WRITERS = 8
_TENSORS, _ELEMENTS = 10, 256
_PATIENCE = 240.0  # seconds for all writers of one contest
_TAKES_LOCK = "UPDATE repository"


@dataclass(slots=True)
class _LockWatch:
    """Seconds that this process waits for the lock and holds it, of all its repositories."""

    waited: float = 0.0
    held: float = 0.0
    _asked: dict[int, float] = field(default_factory=dict)
    _taken: dict[int, float] = field(default_factory=dict)

    def listen(self, *, is_sqlite: bool) -> None:
        """Begin, for as long as the process lasts."""
        if is_sqlite:
            turn = WriteQueue.turn

            @contextmanager
            def watched(queue: WriteQueue) -> Iterator[None]:
                asked = time.perf_counter()
                with turn(queue):
                    if not _is_saving():
                        yield
                        return
                    taken = time.perf_counter()
                    self.waited += taken - asked
                    try:
                        yield
                    finally:
                        self.held += time.perf_counter() - taken

            patch.object(WriteQueue, "turn", watched).start()
        else:
            event.listen(Engine, "before_cursor_execute", self._before)
            event.listen(Engine, "after_cursor_execute", self._after)
            event.listen(Pool, "checkin", self._ended)

    def _before(self, connection: Any, cursor: object, statement: str, *_: object) -> None:
        key = id(connection.connection.dbapi_connection)
        if _is_saving() and statement.startswith(_TAKES_LOCK) and key not in self._taken:
            self._asked[key] = time.perf_counter()

    def _after(self, connection: Any, *_: object) -> None:
        key = id(connection.connection.dbapi_connection)
        if key in self._asked:
            now = time.perf_counter()
            self.waited += now - self._asked.pop(key)
            self._taken[key] = now

    def _ended(self, connection: object, *_: object) -> None:
        self._asked.pop(id(connection), None)  # it got no lock
        taken = self._taken.pop(id(connection), None)
        if taken is not None:
            self.held += time.perf_counter() - taken


def _is_saving() -> bool:
    """Tell whether this thread saves; that of the lease waits beside it."""
    return threading.current_thread() is threading.main_thread()


@dataclass(frozen=True, slots=True)
class _Result:
    """What one writer reports, in seconds; `error` is "" if every save succeeded."""

    took: float
    waited: float
    held: float
    error: str


def measure_writers(run: Run) -> Iterator[Figure]:
    """Let growing numbers of processes save small versions, on one branch and on many."""
    with places(run.folder) as made:
        for database in DATABASES:
            for writers in run.size.writers:
                for branches in ("one branch", "branches of their own")[: 2 if writers > 1 else 1]:
                    run.say(f"{writers} on {database}, {branches}")
                    place = made.new(database)
                    place.open(create=True).close()
                    yield from _contest(run, place, database, writers, branches)


def _contest(
    run: Run, place: Place, database: str, writers: int, branches: str
) -> Iterator[Figure]:
    is_one = branches == "one branch"
    names = ["main" if is_one else f"branch-{i}" for i in range(writers)]
    began, results = _results(place, names, run.size.saves)
    wall = time.perf_counter() - began
    errors = [result.error for result in results if result.error]
    with place.open() as repo:
        saved = len(repo.log())
    what = f"{writers} writer{'s' if writers > 1 else ''}, {branches}: "
    yield Figure(f"{what}errors", len(errors), "errors", 0, database, "; ".join(errors)[:200])
    note = f"{saved} saves in {wall:.1f} s"
    yield Figure(f"{what}saves a second", saved / wall, "saves/s", None, database, note)
    took, waited, held = (
        sum(getattr(result, name) for result in results) for name in ("took", "waited", "held")
    )
    is_held_to = writers == TARGET_WRITERS and not is_one
    yield Figure(
        f"{what}time in the lock",
        (waited + held) / took,
        "share",
        IN_LOCK if is_held_to else None,
        database,
        f"waits {100 * waited / took:.1f} %, holds {100 * held / took:.1f} %; "
        f"a save holds {1000 * held / max(saved, 1):.0f} ms",
    )


def _results(place: Place, branches: list[str], saves: int) -> tuple[float, list[_Result]]:
    """Start a writer for each branch; return when all began, and what each reports."""
    # Its children have torch loaded already.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dcpstore.api", __name__])
    barrier = context.Barrier(len(branches) + 1)
    pipes, processes = [], []
    try:
        for seed, branch in enumerate(branches):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_write, args=(place, branch, seed, saves, (barrier, theirs)), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        barrier.wait(_PATIENCE)
        began = time.perf_counter()
        results = []
        for seed, pipe in enumerate(pipes):
            left = began + _PATIENCE - time.perf_counter()
            if pipe.poll(max(left, 0)):
                results.append(pipe.recv())
            else:
                late = f"writer {seed} did not end in {_PATIENCE:.0f} s"
                results.append(_Result(_PATIENCE, 0.0, 0.0, late))
        return began, results
    finally:
        for process in processes:
            process.kill()
            process.join()


def _write(place: Place, branch: str, seed: int, saves: int, meet: tuple[Barrier, Any]) -> None:
    """Save some versions once all writers are ready, and report to the pipe."""
    barrier, pipe = meet
    torch.set_num_threads(1)
    dice = torch.Generator().manual_seed(seed)
    state: State = {f"w{i}": torch.randn(_ELEMENTS, generator=dice) for i in range(_TENSORS)}
    watch, error = _LockWatch(), ""
    with place.open() as repo:
        barrier.wait(_PATIENCE)
        watch.listen(is_sqlite=place.is_sqlite)
        began = time.perf_counter()
        try:
            for number in range(saves):
                state[f"w{number % _TENSORS}"].add_(1.0)
                dcpstore.save(state, repo, branch=branch, step=number)
        except Exception:
            error = traceback.format_exc().splitlines()[-1]
        pipe.send(_Result(time.perf_counter() - began, watch.waited, watch.held, error))
