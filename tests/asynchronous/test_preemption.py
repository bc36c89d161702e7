"""Preemption: one save, of one step on all ranks, whenever the signal arrives and on which rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

import dcpstore
from dcpstore import DefaultSavePlanner, InvalidInputError, Repository
from tests.ranks import RankPool
from tests.soundness import Place, assert_sound

GRACE = 10.0  # seconds that a scheduler allows


class Case(NamedTuple):
    """When signals are sent, to which ranks, and how the run saves.

    Attributes:
        points: when rank 0 sends a signal to each target: in a step, in a save, in the last save.
        targets: the ranks that get it.
        stops: the step after which the run ends.
        steps: the steps that have a version then.
    """

    points: tuple[str, ...]
    targets: tuple[int, ...]
    stops: int
    steps: tuple[int, ...]
    is_async: bool = False
    number: int = signal.SIGTERM


ALL = (0, 1, 2)
CASES = {
    "between-saves-one": Case(("step 4",), (2,), 4, (3, 4)),
    "between-saves-all": Case(("step 4",), ALL, 4, (3, 4)),
    "in-a-save-one": Case(("save 3",), (1,), 3, (3,)),
    "in-a-save-all": Case(("save 3",), ALL, 3, (3,), number=signal.SIGUSR1),
    "in-an-async-save-one": Case(("save 3",), (2,), 3, (3,), is_async=True),
    "in-an-async-save-all": Case(("save 3",), ALL, 3, (3,), is_async=True),
    "twice": Case(("step 5", "save 5"), ALL, 5, (3, 5)),
    "twice-async": Case(("step 5", "save 5"), (0, 1), 5, (3, 5), is_async=True),
}


class Planner(DefaultSavePlanner):
    """Calls `send` while its save is running, in the thread that saves."""

    def __init__(self, send: Callable[[], None]) -> None:
        super().__init__()
        self._send = send

    def create_local_plan(self) -> Any:
        self._send()
        return super().create_local_plan()


def train(rank: int, place: Place, name: str, *, is_resumed: bool) -> tuple[int, int | None]:
    """Run some steps on the branch `name`; return the last one, and the signal that ended it."""
    case = CASES[name]
    state: dict[str, Any] = {"w": torch.zeros(4), "step": 0}
    sent: list[str] = []
    pids: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    before = signal.getsignal(case.number)
    with place.open() as repo:
        if is_resumed:
            dcpstore.load(state, repo, name)
            assert state["w"].tolist() == [state["step"]] * 4

        def send(point: str) -> None:
            if rank == 0 and not is_resumed and point in case.points and point not in sent:
                for target in case.targets:
                    os.kill(pids[target], case.number)
            sent.append(point)

        def save() -> Any:
            step = state["step"]
            call = dcpstore.async_save if case.is_async else dcpstore.save
            planner = Planner(lambda: send(f"save {step}"))
            return call(state, repo, branch=name, step=step, planner=planner)

        def wait_for_signal(point: str) -> None:
            """Wait until a signal that is sent to this rank at this point has arrived."""
            if rank in case.targets and point == case.points[0] and not is_resumed:
                while not preemption._noted:
                    time.sleep(0.01)

        with dcpstore.on_preemption(save) as preemption:
            while state["step"] < 7:
                state["step"] += 1
                state["w"] += 1
                if state["step"] % 3 == 0:
                    preemption.save()
                    wait_for_signal(f"save {state['step']}")
                send(f"step {state['step']}")
                wait_for_signal(f"step {state['step']}")
                if preemption.check():
                    break
        assert preemption.check() is (preemption.signal is not None)
    assert signal.getsignal(case.number) == before
    return state["step"], preemption.signal


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    pool = RankPool(3, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


def train_all(rank: int, place: Place) -> dict[str, list[tuple[int, int | None]]]:
    return {
        name: [train(rank, place, name, is_resumed=is_resumed) for is_resumed in (False, True)]
        for name in CASES
    }


def test_one_step_is_saved_once_on_all_ranks(three_ranks: RankPool, place: Place) -> None:
    ended = three_ranks.run(train_all, place)
    assert ended[0] == ended[1] == ended[2]
    with place.open() as repo:
        for name, case in CASES.items():
            assert ended[0][name] == [(case.stops, case.number), (7, None)], name
            steps = [version.step for version in reversed(repo.log(name))]
            assert steps == [*case.steps, *(s for s in (3, 6) if s > case.stops)], name
        assert_sound(repo)


def end_at_signal(rank: int, where: str) -> None:
    state: dict[str, Any] = {"step": 0, "w": torch.zeros(4)}
    with dcpstore.on_preemption(
        lambda: dcpstore.save(state, where, step=state["step"])
    ) as preemption:
        while not preemption.check():
            state["step"] += 1
            Path(f"{where}-{rank}").touch()
    assert preemption.signal is not None
    sys.exit(128 + preemption.signal)


def test_a_scheduler_ends_the_run_within_its_grace_time(
    three_ranks: RankPool, tmp_path: Path
) -> None:
    where = tmp_path / "repo"

    def schedule() -> None:
        while not all(Path(f"{where}-{rank}").exists() for rank in ALL):
            time.sleep(0.01)
        for process in three_ranks._processes:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGTERM)
        if not ended.wait(GRACE):
            for process in three_ranks._processes:
                process.kill()

    ended = threading.Event()
    scheduler = threading.Thread(target=schedule)
    scheduler.start()
    three_ranks.run(end_at_signal, str(where), dying=ALL)
    ended.set()
    scheduler.join()
    assert [process.exitcode for process in three_ranks._processes] == [143] * 3
    with dcpstore.open(where) as repo:
        (version,) = repo.log()
        assert repo.read()["step"] == version.step
        assert_sound(repo)


def unexpected_save() -> None:
    pytest.fail("save was called")


def test_a_signal_in_the_middle_of_a_save_does_not_disturb_it(repo: Repository) -> None:
    state = {"w": torch.ones(3)}
    steps = iter(range(10))

    class Planner(DefaultSavePlanner):
        def create_local_plan(self) -> Any:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGUSR1)
            return super().create_local_plan()

    def save() -> dcpstore.Version:
        return dcpstore.save(state, repo, step=next(steps), planner=Planner())

    with dcpstore.on_preemption(save) as preemption:
        assert not preemption.check()
        assert save().step == 0  # not through `preemption.save`, so check() saves once more
        assert preemption.check()
        assert preemption.signal == signal.SIGTERM
        assert preemption.check()
        signal.raise_signal(signal.SIGTERM)
    assert [version.step for version in repo.log()] == [1, 0]


def test_a_failed_earlier_save_does_not_prevent_the_last_one(
    repo: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    repo.branch("taken", at=dcpstore.save({"w": torch.ones(3)}, repo).number)
    tags = [["taken"], ["free"]]

    def save() -> dcpstore.PendingSave:
        return dcpstore.async_save({"w": torch.ones(3)}, repo, tags=tags.pop(0))

    with dcpstore.on_preemption(save) as preemption:
        signal.raise_signal(signal.SIGTERM)
        preemption.save()
        assert preemption.check()
    assert [version.tags for version in repo.log()] == [("free",), ()]
    assert "the save of this step failed, so it is saved again" in caplog.text
    assert "SIGTERM arrived: saved v2" in caplog.text

    dcpstore.async_save({"w": torch.ones(3)}, repo, tags=["taken"])  # its result is not asked for
    with dcpstore.on_preemption(lambda: dcpstore.save({"w": torch.ones(3)}, repo)) as preemption:
        signal.raise_signal(signal.SIGTERM)
        assert preemption.check()
    assert len(repo.log()) == 3
    assert "an asynchronous save failed" in caplog.text


def test_the_failure_of_the_last_save_is_raised_and_check_can_retry(repo: Repository) -> None:
    tips: list[int | None] = [7, None]

    def save() -> dcpstore.Version:
        return dcpstore.save({"w": torch.ones(3)}, repo, expect_tip=tips.pop(0))

    with dcpstore.on_preemption(save) as preemption:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(dcpstore.NotFoundError):
            preemption.check()
        assert preemption.signal is None
        assert preemption.check()
    assert len(repo.log()) == 1


def test_a_signal_after_the_last_check_saves_when_the_block_ends(repo: Repository) -> None:
    with dcpstore.on_preemption(lambda: dcpstore.save({"w": torch.ones(3)}, repo)) as preemption:
        assert not preemption.check()
        signal.raise_signal(signal.SIGUSR1)
    assert preemption.signal == signal.SIGUSR1
    assert len(repo.log()) == 1


def test_handlers_are_restored_whatever_ends_the_block(
    caplog: pytest.LogCaptureFixture,
) -> None:
    handled: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: handled.append(number))
    try:
        with suppress(KeyError), dcpstore.on_preemption(unexpected_save, [signal.SIGTERM]):
            signal.raise_signal(signal.SIGTERM)
            raise KeyError
        assert handled == []
        assert "SIGTERM arrived, and nothing was saved for it" in caplog.text
        signal.raise_signal(signal.SIGTERM)
        preemption = dcpstore.on_preemption(unexpected_save, [signal.SIGTERM])
        preemption.close()
        preemption.close()
        signal.raise_signal(signal.SIGTERM)
        assert handled == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


FORKS = """
import os, signal, time, dcpstore
preemption = dcpstore.on_preemption(lambda: None)
for _ in range(20):
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    os.kill(child, signal.SIGTERM)  # as early as possible
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
signal.raise_signal(signal.SIGUSR1)
assert preemption.check()  # in the parent, signals are still noted
"""


def test_a_forked_process_is_ended_by_the_signal() -> None:
    # in a process without other threads: forking with threads is not safe
    subprocess.run([sys.executable, "-c", FORKS], check=True, timeout=120)


def test_bad_arguments_of_on_preemption_are_refused(subtests: pytest.Subtests) -> None:
    watch: Any = dcpstore.on_preemption
    before = signal.getsignal(signal.SIGTERM)
    for message, arguments in {
        "is not a function": (3,),
        "is empty": (unexpected_save, []),
        "give a list": (unexpected_save, signal.SIGTERM),
        "not a signal that a process can catch": (
            unexpected_save,
            [signal.SIGTERM, signal.SIGKILL],
        ),
        "'SIGTERM' is not": (unexpected_save, ["SIGTERM"]),
    }.items():
        with subtests.test(message), pytest.raises(InvalidInputError, match=message):
            watch(*arguments)
    ends: list[object] = []

    def call() -> None:
        try:
            ends.append(watch(unexpected_save))
        except InvalidInputError as error:
            ends.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "only the main thread" in str(ends[0])
    assert signal.getsignal(signal.SIGTERM) == before
