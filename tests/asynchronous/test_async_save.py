"""Asynchronous saves: the staged state is saved, and every failure is raised or logged."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor

import dcpstore
from dcpstore import ConflictError, DcpstoreError, InvalidInputError, Repository
from dcpstore.catalog.read.user_sql import query_rows
from dcpstore.saving.staging import find_saver
from tests.ranks import RankPool, mesh
from tests.soundness import Place


def test_the_staged_state_is_saved(repo: Repository) -> None:
    state = {"w": torch.ones(1000), "l": [1, 2]}
    pending = dcpstore.async_save(state, repo, step=1, tags=["t"])
    assert pending.staged.done()
    state["w"].zero_()
    state["l"].append(3)
    version = pending.result()
    assert (version.step, version.tags) == (1, ("t",))
    assert torch.equal(repo.read()["w"], torch.ones(1000))
    assert repo.read()["l"] == [1, 2]


def test_conjugated_and_negated_views_are_staged(repo: Repository) -> None:
    pairs = torch.tensor([1 + 2j, 3 - 4j])
    state = {"conj": pairs.conj(), "in": [{"neg": pairs.conj().imag}], "w": pairs}
    dcpstore.async_save(state, repo).result()
    read = repo.read()
    assert torch.equal(read["conj"], pairs.conj())
    assert torch.equal(read["in.0.neg"], pairs.conj().imag)
    assert torch.equal(read["w"], pairs)


class Loss:
    """A metric that records in which thread it was read."""

    def __float__(self) -> float:
        self.read_by = threading.current_thread()
        return 2.5


def test_arguments_are_read_when_the_call_is_made(repo: Repository) -> None:
    loss, labels, tags = Loss(), {"lr": "1"}, ["t"]
    pending = dcpstore.async_save(
        {"w": torch.ones(3)}, repo, metrics={"loss": loss}, labels=labels, tags=tags
    )
    assert loss.read_by is threading.main_thread()
    labels["lr"] = "2"
    tags.append("u")
    version = pending.result()
    assert (version.metrics, version.labels, version.tags) == ({"loss": 2.5}, {"lr": "1"}, ("t",))


def test_bad_arguments_are_refused_before_a_version_is_begun(
    repo: Repository, subtests: pytest.Subtests
) -> None:
    bad: dict[str, dict[str, Any]] = {
        "one text": {"tags": "best"},
        "branch name": {"branch": "a b"},
        "give a number": {"metrics": {"loss": "low"}},
        "whole number": {"step": -1},
        "both of repo and": {"checkpoint_id": "elsewhere"},
        "text that a database": {"labels": {"a": "\0"}},
        "give bytes": {"staging_limit": "1"},
    }
    for message, arguments in bad.items():
        with subtests.test(message), pytest.raises(InvalidInputError, match=message):
            dcpstore.async_save({"w": torch.ones(3)}, repo, **arguments)
    assert repo.sql("SELECT count(*) AS begun FROM version")[0].begun == 0


def test_a_value_that_cannot_be_copied_is_named(repo: Repository) -> None:
    state = {"w": torch.ones(3), "deep": [1, {"lock": threading.Lock()}]}
    with pytest.raises(InvalidInputError, match=r"'deep\.1\.lock': a lock cannot be copied"):
        dcpstore.async_save(state, repo)
    assert dcpstore.async_save({"w": torch.ones(3)}, repo).result().number == 1


def test_a_relative_path_is_resolved_when_the_call_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    go = threading.Event()
    find_saver(None, no_dist=False)._thread.submit(go.wait, 30)
    monkeypatch.chdir(tmp_path / "here")
    pending = dcpstore.async_save({"w": torch.ones(3)}, "r")
    monkeypatch.chdir(tmp_path / "there")
    go.set()
    pending.result()
    assert [path.parent.name for path in tmp_path.glob("*/r")] == ["here"]


def test_a_forked_process_does_not_wait_for_saves_of_its_parent(tmp_path: Path) -> None:
    code = """
import gc, os, sys, threading, torch, dcpstore
from dcpstore.core.gc_pause import gc_paused
go_on = threading.Event()
class Held(dcpstore.DefaultSavePlanner):
    def finish_plan(self, new_plan):
        began.set()
        go_on.wait()
        return super().finish_plan(new_plan)
began = threading.Event()
state = {"w": torch.ones(3)}
with dcpstore.open("r") as repo:
    pending = dcpstore.async_save(state, repo, planner=Held())
    assert began.wait(60) and not gc.isenabled()
    child = os.fork()
    if not child:
        assert gc.isenabled()
        with gc_paused():
            assert not gc.isenabled()
        assert gc.isenabled()
        dcpstore.save(state, "child")
        dcpstore.async_save(state, "child").result(60)
        sys.exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    go_on.set()
    pending.result()
    assert gc.isenabled()
sys.exit(code)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=120)
    for name, count in (("r", 1), ("child", 2)):
        with dcpstore.open(tmp_path / name, create=False) as repo:
            assert len(repo.log()) == count


def refused_on_ranks(rank: int, place: Place) -> str:
    with place.open() as repo:
        try:
            dcpstore.async_save({"w": torch.ones(3)}, repo, tags=["a b"])
        except InvalidInputError as error:
            return str(error)
    return "begun"


def test_bad_arguments_are_refused_on_every_rank(place: Place, two_ranks: RankPool) -> None:
    place.open().close()
    first, second = two_ranks.run(refused_on_ranks, place)
    assert first == second
    assert "'a b'" in first


def test_a_tensor_may_change_its_size_between_saves(repo: Repository) -> None:
    tensor = torch.ones(2)
    for size in (2, 50, 3):
        tensor.resize_(size).fill_(size)
        dcpstore.async_save({"w": tensor, "same": torch.ones(4)}, repo).result()
        assert torch.equal(repo.read()["w"], torch.full((size,), float(size)))


def test_the_staging_limit_counts_whole_storages(repo: Repository) -> None:
    whole = torch.ones(1000)
    state = {"a": whole[:1], "b": whole[1:2]}  # two views of 4,000 bytes
    assert dcpstore.async_save(state, repo, staging_limit=3999).done()
    go = threading.Event()
    pending = dcpstore.async_save(state, repo, staging_limit=4000, planner=Slow(go))
    assert not pending.done()
    go.set()
    pending.result()


def save_in_two_jobs(rank: int, folder: str) -> list[int]:
    """Save in a group of both ranks, then in one that each rank makes for itself."""
    ranks = [dcpstore.async_save({f"w{rank}": torch.ones(2)}, f"{folder}/both").result().ranks]
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/{rank}", rank=0, world_size=1)
    alone = dcpstore.async_save({f"w{rank}": torch.ones(2)}, f"{folder}/alone{rank}").result()
    return [*ranks, alone.ranks]


def test_a_new_process_group_has_savers_of_its_own(tmp_path: Path) -> None:
    pool = RankPool(2, tmp_path)  # for this test only, because it ends without its process group
    try:
        assert pool.run(save_in_two_jobs, str(tmp_path)) == [[2, 1]] * 2
    finally:
        pool.close()


def test_a_second_save_waits(repo: Repository) -> None:
    state = {"w": torch.zeros(1000)}
    pendings = []
    for step in range(5):
        state["w"].fill_(step)
        pendings.append(dcpstore.async_save(state, repo, step=step))
    assert [p.result().step for p in pendings] == list(range(5))
    for step in range(5):
        assert torch.equal(repo.read(f"main@step={step}")["w"], torch.full((1000,), float(step)))


class Slow(dcpstore.DefaultSavePlanner):
    """Waits in the planner until `go` is set."""

    def __init__(self, go: threading.Event) -> None:
        super().__init__()
        self.go = go

    def create_local_plan(self) -> dcpstore.SavePlan:
        assert self.go.wait(30)
        return super().create_local_plan()


def test_a_second_save_is_refused_with_if_busy_refuse(repo: Repository) -> None:
    go = threading.Event()
    pending = dcpstore.async_save({"w": torch.ones(3)}, repo, planner=Slow(go))
    assert not pending.done()
    with pytest.raises(ConflictError, match="still running"):
        dcpstore.async_save({"w": torch.ones(3)}, repo, if_busy="refuse")
    with pytest.raises(TimeoutError):
        pending.result(timeout=0.01)
    go.set()
    assert pending.result().number == 1
    assert dcpstore.async_save({"w": torch.ones(3)}, repo, if_busy="refuse").result().number == 2


def test_a_state_above_the_limit_is_saved_before_the_call_returns(repo: Repository) -> None:
    state = {"w": torch.ones(1000)}
    pending = dcpstore.async_save(state, repo, staging_limit=3999)
    assert pending.done()
    state["w"].zero_()
    assert pending.result().nbytes_written == 4000
    assert torch.equal(repo.read()["w"], torch.ones(1000))


def break_storage(repo: Repository) -> Path:
    packs = Path(repo.storage.url) / "packs"
    packs.write_text("not a folder")
    return packs


@pytest.mark.parametrize("raised_by", ["result", "next async", "next", "close"])
def test_a_failure_is_raised_once_and_recorded(place: Place, raised_by: str) -> None:
    repo = place.open()
    packs = break_storage(repo)
    pending = dcpstore.async_save({"w": torch.ones(3)}, repo)
    calls: dict[str, Callable[[], object]] = {
        "result": pending.result,
        "next async": lambda: dcpstore.async_save({"w": torch.ones(3)}, repo),
        "next": lambda: dcpstore.save({"w": torch.ones(3)}, repo),
        "close": repo.close,
    }
    with pytest.raises(DcpstoreError, match="packs"):
        calls[raised_by]()
    packs.unlink()
    with place.open() as again:
        (row,) = query_rows(again.catalog, "SELECT status, error FROM version", {})
        assert row.status == "aborted"
        assert "packs" in row.error
        assert dcpstore.async_save({"w": torch.ones(3)}, again).result().number == 1
    repo.close()


@pytest.mark.slow
def test_a_failure_at_exit_is_logged(tmp_path: Path) -> None:
    code = f"""
import torch, dcpstore, pathlib
repo = dcpstore.open({str(tmp_path / "r")!r})
(pathlib.Path(repo.storage.url) / "packs").write_text("in the way")
dcpstore.async_save({{"w": torch.ones(3)}}, repo)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "an asynchronous save failed" in done.stderr
    assert "packs" in done.stderr


@pytest.mark.slow
def test_a_save_that_is_running_at_exit_is_finished(tmp_path: Path) -> None:
    code = f"""
import torch, dcpstore
dcpstore.async_save({{"w": torch.arange(6e6)}}, {str(tmp_path / "r")!r}, tags=["last"])
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with dcpstore.open(tmp_path / "r") as repo:
        assert torch.equal(repo.read("last")["w"], torch.arange(6e6))


def mutate_on_ranks(rank: int, place: Place) -> list[int]:
    whole = torch.arange(64.0).reshape(8, 8)
    with place.open() as repo:
        pendings = []
        for step in range(3):
            tensor = distribute_tensor(whole + step, mesh((2,)), [Shard(0)])
            own = torch.full((5,), float(step))
            state = {"w": tensor, "own": own, "step": step}
            pendings.append(dcpstore.async_save(state, repo, step=step))
            tensor.to_local().fill_(-1)
            own.fill_(-1)
            state["step"] = -1
        return [pending.result().number for pending in pendings]


def test_changing_tensors_after_staging_never_changes_what_is_saved(
    place: Place, two_ranks: RankPool
) -> None:
    place.open().close()
    assert two_ranks.run(mutate_on_ranks, place) == [[1, 2, 3]] * 2
    with place.open() as repo:
        for step in range(3):
            read = repo.read(f"main@step={step}")
            assert torch.equal(read["w"], torch.arange(64.0).reshape(8, 8) + step)
            assert torch.equal(read["own"], torch.full((5,), float(step)))
            assert read["step"] == step


def fail_on_one_rank(rank: int, place: Place) -> tuple[str, dict[int, str]]:
    class Failing(dcpstore.DefaultSavePlanner):
        def create_local_plan(self) -> dcpstore.SavePlan:
            if rank == 1:
                raise OSError("no luck")
            return super().create_local_plan()

    with place.open() as repo:
        pending = dcpstore.async_save({"w": torch.ones(3)}, repo, planner=Failing())
        try:
            pending.result()
        except dcpstore.RankFailure as error:
            return str(error), {r: type(e).__name__ for r, e in error.failures.items()}
    return "saved", {}


def test_one_rank_that_fails_makes_every_result_raise(place: Place, two_ranks: RankPool) -> None:
    place.open().close()
    first, second = two_ranks.run(fail_on_one_rank, place)
    assert first == second
    assert first[1] == {1: "OSError"}


def open_resources() -> tuple[int, int]:
    """Return the descriptors and threads of this process.

    Those of SQLite are left out: a lease that is renewed during a query of the save takes one more
    connection, which the pool then keeps.
    """
    process = psutil.Process(os.getpid())
    pooled = sum("catalog.db" in file.path for file in process.open_files())
    return process.num_fds() - pooled, threading.active_count()


def save_twenty_times(rank: int, place: Place) -> tuple[tuple[int, int], tuple[int, int]]:
    with place.open() as repo:
        state = {"w": torch.zeros(100)}
        dcpstore.async_save(state, repo).result()
        first = open_resources()
        for step in range(20):
            state["w"].fill_(step)
            dcpstore.async_save(state, repo, step=step).result()
        return first, open_resources()


@pytest.mark.slow
def test_twenty_saves_leave_descriptors_and_threads_as_they_were(
    place: Place, two_ranks: RankPool
) -> None:
    place.open().close()
    for first, last in two_ranks.run(save_twenty_times, place):
        assert last == first
