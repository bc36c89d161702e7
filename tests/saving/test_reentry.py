"""A change that begins inside another one of the same thread is refused; the outer one goes on."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import dcpstore
from dcpstore import ConflictError, DefaultSavePlanner, RankFailure, Repository
from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.write.saves import touch_save
from tests.ranks import RankPool
from tests.soundness import Place

ALREADY = "this thread is already saving to"


class Calling:
    """A Stateful that makes a call in the middle of a save, and keeps its result or error."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self.ends: list[object] = []

    def state_dict(self) -> dict[str, Any]:
        try:
            self.ends.append(self._call())
        except dcpstore.DcpstoreError as error:
            self.ends.append(error)
        return {"w": torch.ones(3)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError


def test_no_change_begins_inside_a_save(repo: Repository, place: Place) -> None:
    state = {"w": torch.zeros(3)}
    dcpstore.save(state, repo, step=1)
    calls: dict[str, Callable[[], object]] = {
        "save": lambda: dcpstore.save(state, repo),
        "save, opened again": lambda: dcpstore.save(state, place.url),
        "async_save": lambda: dcpstore.async_save(state, repo),
        "tag": lambda: repo.tag("inner"),
        "branch": lambda: repo.branch("inner"),
        "rollback": lambda: repo.rollback(1),
        "undo": repo.undo,
        "expire": lambda: repo.expire(keep_last=1),
        "gc": repo.gc,
    }
    for step, (name, call) in enumerate(calls.items(), start=2):
        calling = Calling(call)
        version = dcpstore.save({"s": calling}, repo, step=step)
        assert (version.step, version.number) == (step, step), name
        (end,) = calling.ends
        assert isinstance(end, ConflictError), (name, end)
        assert ALREADY in str(end), (name, end)
        assert "dcpstore.on_preemption" in str(end)
        assert repo.tags() == []
    assert dcpstore.save(state, repo).number == len(calls) + 2


def test_a_read_or_another_repository_is_allowed_inside_a_save(
    repo: Repository, tmp_path: Path
) -> None:
    dcpstore.save({"w": torch.arange(3.0)}, repo)

    def load() -> object:
        filled = {"w": torch.zeros(3)}
        dcpstore.load(filled, repo)
        return filled["w"].tolist(), repo.read()["w"].tolist(), len(repo.log())

    def save_elsewhere() -> object:
        return dcpstore.save({"w": torch.ones(3)}, tmp_path / "other").number

    def save_in_a_thread() -> object:
        made: list[int | None] = []
        thread = threading.Thread(
            target=lambda: made.append(dcpstore.save({"x": torch.ones(1)}, repo).number)
        )
        thread.start()
        thread.join()
        return made

    for call, found in (
        (load, ([0.0, 1.0, 2.0], [0.0, 1.0, 2.0], 1)),
        (save_elsewhere, 1),
        (save_in_a_thread, [4]),
    ):
        calling = Calling(call)
        dcpstore.save({"s": calling}, repo)
        assert calling.ends == [found]


@contextmanager
def in_a_transaction(repo: Repository, call: Callable[[], object]) -> Iterator[None]:
    """Make `call` once, in the middle of the next transaction that adds an operation."""

    def see(statement: str) -> None:
        if "INTO operation" in statement and calls:
            calls.pop()()

    calls = [call]
    with repo.catalog.database.traced(see):
        yield
    assert not calls


def test_a_signal_a_finalizer_or_the_collector_cannot_change_inside_a_transaction(
    repo: Repository, place: Place
) -> None:
    state = {"w": torch.zeros(3)}
    ends: list[object] = []

    def change(*_: object) -> None:
        for call in (
            lambda: dcpstore.save(state, place.url),
            lambda: repo.tag("inner"),
            lambda: touch_save(repo.catalog, "nothing"),  # a change that adds no operation
        ):
            try:
                ends.append(call())
            except dcpstore.DcpstoreError as error:
                ends.append(error)

    class Finalized:
        def __del__(self) -> None:
            change()

    def delete() -> None:
        Finalized()

    def lose() -> None:
        owner = Calling(lambda: None)
        weakref.finalize(owner, change)
        del owner

    def collect() -> None:
        gc.callbacks.append(first := lambda phase, info: change() if phase == "start" else None)
        try:
            gc.collect()
        finally:
            gc.callbacks.remove(first)

    before = signal.signal(signal.SIGUSR1, change)
    try:
        ways: list[Callable[[], object]] = [
            lambda: os.kill(os.getpid(), signal.SIGUSR1),
            delete,
            lose,
            collect,
        ]
        for number, way in enumerate(ways, start=1):
            with in_a_transaction(repo, way):
                version = dcpstore.save({"w": torch.full((3,), number)}, repo)
            assert version.number == number
            assert len(ends) == 3
            for end in ends:
                assert isinstance(end, ConflictError)
                assert ALREADY in str(end)
            ends.clear()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_hook_of_a_planner_cannot_save(repo: Repository, place: Place) -> None:
    ends: list[object] = []

    class Planner(DefaultSavePlanner):
        def create_local_plan(self) -> Any:
            with pytest.raises(ConflictError, match=ALREADY) as refused:
                dcpstore.save({"w": torch.zeros(3)}, place.url)
            ends.append(refused.value)
            return super().create_local_plan()

    dcpstore.save({"w": torch.zeros(3)}, repo, planner=Planner())
    assert len(ends) == 1


def test_no_save_goes_to_a_repository_that_is_being_created(
    database_url: str, tmp_path: Path
) -> None:
    ends: list[object] = []

    def save() -> None:
        with (
            pytest.raises(ConflictError, match=ALREADY) as refused,
            dcpstore.open(database_url, data=tmp_path / "data") as repo,
        ):
            dcpstore.save({"w": torch.zeros(3)}, repo)
        ends.append(refused.value)

    Catalog.make(database_url, data_url=str(tmp_path / "data"), make_data=save).close()
    assert len(ends) == 1


def test_after_an_interrupted_save_the_thread_can_save_again(repo: Repository) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dcpstore.save({"s": Calling(interrupt)}, repo)
    with in_a_transaction(repo, interrupt), pytest.raises(KeyboardInterrupt):
        dcpstore.save({"w": torch.zeros(3)}, repo)
    assert dcpstore.save({"w": torch.zeros(3)}, repo).number == 1


def fork_inside(place: Place) -> tuple[int | None, list[object]]:
    """Save, and save in a process that is forked meanwhile; return the version and its exit."""
    repo = place.open()

    def fork() -> object:
        child = os.fork()
        if not child:
            code = 1
            try:
                code = 0 if dcpstore.save({"x": torch.ones(1)}, repo).number == 1 else 2
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    calling = Calling(fork)
    return dcpstore.save({"s": calling}, repo).number, calling.ends


def test_a_process_forked_inside_a_save_can_save(place: Place) -> None:
    """In a process of its own: the threads of other tests' libraries do not survive a fork."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        assert pool.submit(fork_inside, place).result(timeout=120) == (2, [0])


def save_inside(rank: int, where: str, call: str) -> tuple[object, object, int | None]:
    def inner() -> object:
        if rank == 0:
            return None
        state = {"w": torch.zeros(2)}
        if call == "save elsewhere":
            return dcpstore.save(state, f"{where}-other")
        if call == "load":
            return dcpstore.load(state, where)
        return dcpstore.async_save(state, where)

    first = dcpstore.save({"w": torch.zeros(2)}, where).number
    calling = Calling(inner)
    dcpstore.save({"s": calling}, where)
    return first, str(calling.ends[0]), dcpstore.save({"w": torch.ones(2)}, where).number


@pytest.mark.parametrize("call", ["save elsewhere", "load", "async_save"])
def test_a_call_inside_a_save_on_one_rank_does_not_disturb_the_exchanges(
    two_ranks: RankPool, tmp_path: Path, call: str
) -> None:
    other, calling = two_ranks.run(save_inside, str(tmp_path / "repo"), call)
    assert other == (1, "None", 3)
    assert ALREADY in calling[1]
    assert (calling[0], calling[2]) == (1, 3)


def fail_inside(rank: int, where: str) -> str:
    class Failing(Calling):
        def state_dict(self) -> dict[str, Any]:
            if rank:
                dcpstore.save({"w": torch.zeros(2)}, where)
            return {"w": torch.zeros(2)}

    with pytest.raises(RankFailure) as failed:
        dcpstore.save({"s": Failing(lambda: None)}, where)
    assert list(failed.value.failures) == [1]
    return str(failed.value)


def test_a_refusal_that_is_not_caught_is_raised_on_every_rank(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    messages = two_ranks.run(fail_inside, str(tmp_path / "repo"))
    assert messages[0] == messages[1]
    assert ALREADY in messages[0]
