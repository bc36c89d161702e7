"""`async_save` with torch's classes: futures, stagers, and the background process."""

from __future__ import annotations

import asyncio
import concurrent.futures as cf
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.tensor import Shard, distribute_tensor

import dcpstore
from dcpstore import ConflictError, DcpstoreError, InvalidInputError, Repository, Retention
from dcpstore.compat.torch_private import AsyncSaveResponse
from dcpstore.saving.staging import raise_unseen
from tests.asynchronous.test_async_save import Slow, break_storage
from tests.ranks import RankPool, mesh
from tests.soundness import Place, assert_sound
from tests.torch_release import DefaultStager, StagingOptions, since_2_9


def state(value: float = 1.0) -> dict[str, Any]:
    return {"w": torch.full((10,), value), "n": int(value)}


def test_a_pending_save_is_a_future_of_the_version(repo: Repository) -> None:
    go = threading.Event()
    pending = dcpstore.async_save(state(), repo, planner=Slow(go))
    called: list[cf.Future[dcpstore.Version]] = []
    pending.add_done_callback(called.append)
    assert isinstance(pending, cf.Future)
    assert isinstance(pending, AsyncSaveResponse)
    assert (pending.running(), pending.done(), pending.cancelled()) == (True, False, False)
    assert pending.cancel() is False
    for ask in (pending.result, pending.exception):
        with pytest.raises(TimeoutError):
            ask(timeout=0.01)
    assert cf.wait([pending], timeout=0.01).not_done == {pending}
    assert called == []
    go.set()
    assert cf.wait([pending], timeout=60).done == {pending}
    assert list(cf.as_completed([pending], timeout=60)) == [pending]
    assert (pending.running(), pending.done(), pending.cancel()) == (False, True, False)
    assert pending.exception() is None
    assert pending.staging_completion.result() is None
    assert pending.upload_completion.result() == pending.result() == repo.show()
    assert called == [pending]

    async def awaited() -> dcpstore.Version:
        return await asyncio.wrap_future(dcpstore.async_save(state(2), repo))

    assert asyncio.run(awaited()).number == 2


def see_by_callback(pending: dcpstore.PendingSave) -> None:
    """Read the failure in a callback, and wait for it: callbacks run after waiting threads wake."""
    is_asked = threading.Event()

    def ask(done: cf.Future[dcpstore.Version]) -> None:
        done.exception()
        is_asked.set()

    pending.add_done_callback(ask)
    assert is_asked.wait(60)


SEEN: dict[str, tuple[bool, Callable[[dcpstore.PendingSave], object]]] = {
    "exception": (True, lambda pending: pending.exception(60)),
    "callback": (True, see_by_callback),
    "upload": (True, lambda pending: pending.upload_completion.exception()),
    "wait": (False, lambda pending: cf.wait([pending], timeout=60)),
    "as_completed": (False, lambda pending: list(cf.as_completed([pending], timeout=60))),
    "empty callback": (False, lambda pending: pending.add_done_callback(lambda done: None)),
    "done": (False, lambda pending: (pending.done(), pending.running(), pending.cancel())),
    "staged": (False, lambda pending: pending.staged.result(60)),
}


def test_a_failure_counts_as_seen_if_a_call_returned_it(
    place: Place, subtests: pytest.Subtests
) -> None:
    for how, (is_seen, see) in SEEN.items():
        repo = place.open()
        packs = break_storage(repo)
        try:
            with subtests.test(how):
                pending = dcpstore.async_save(state(), repo)
                see(pending)
                pending.wait()
                if is_seen:
                    raise_unseen()
                else:
                    with pytest.raises(DcpstoreError, match="packs"):
                        raise_unseen()
                raise_unseen()  # once
        finally:
            packs.unlink()
            repo.close()


class Later(DefaultStager):
    """Stages in a thread, after `go` is set; so the call returns before the state is copied."""

    def __init__(self, go: threading.Event) -> None:
        super().__init__(StagingOptions(False, False, True, False))
        self.go = go
        self.is_closed = False

    def _stage(self, state_dict: Any, **kwargs: Any) -> Any:
        assert self.go.wait(60)
        return super()._stage(state_dict, **kwargs)

    def close(self) -> None:
        self.is_closed = True
        super().close()


@since_2_9
def test_a_stager_that_stages_after_the_call_returns(repo: Repository) -> None:
    go = threading.Event()
    stager = Later(go)
    held = state()
    pending = dcpstore.async_save(held, repo, async_stager=stager)
    assert not pending.staged.done()
    assert pending.staging_completion is pending.staged
    held["w"].fill_(7)  # not allowed yet; it is saved, because the state was not staged
    go.set()
    pending.staging_completion.result(60)
    held["w"].zero_()
    pending.result()
    assert torch.equal(repo.read()["w"], torch.full((10,), 7.0))
    again = dcpstore.async_save(held, repo, async_stager=stager)
    again.result()
    assert torch.equal(repo.read()["w"], torch.zeros(10))
    assert not stager.is_closed  # its owner closes it
    stager.close()


class Deferred(BlockingAsyncStager):
    """Returns its buffer at once, and fills it in `synchronize_staging`."""

    _synchronize_after_execute = True

    def stage(self, state_dict: Any) -> Any:
        self.held = state_dict
        self.buffer = {"w": torch.full((10,), -1.0)}
        return self.buffer

    def synchronize_staging(self) -> None:
        self.buffer["w"].copy_(self.held["w"])


@since_2_9
def test_stagers_that_stage_before_the_call_returns(repo: Repository) -> None:
    for stager in (
        BlockingAsyncStager(),
        DefaultStager(StagingOptions(False, False, False, False)),
        DefaultStager(StagingOptions(False, True, False, False)),
        Deferred(),
    ):
        held = state(3)
        pending = dcpstore.async_save(held, repo, async_stager=stager)
        assert pending.staged.done()
        held["w"].zero_()
        pending.result()
        assert torch.equal(repo.read()["w"], torch.full((10,), 3.0))


class Bad(BlockingAsyncStager):
    """Fails in the way that `how` names."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self._synchronize_after_execute = how == "synchronize"

    def stage(self, state_dict: Any) -> Any:
        if self.how == "raises":
            raise OSError("no memory")
        if self.how == "future":
            failed: cf.Future[Any] = cf.Future()
            failed.set_exception(OSError("no memory"))
            return failed
        return ["no dict"] if self.how == "list" else dict(state_dict)

    def synchronize_staging(self) -> None:
        raise OSError("no memory")


def test_a_stager_that_fails(repo: Repository) -> None:
    with pytest.raises(OSError, match="no memory"):
        dcpstore.async_save(state(), repo, async_stager=Bad("raises"))
    with pytest.raises(InvalidInputError, match="gave a list; have it return the staged state"):
        dcpstore.async_save(state(), repo, async_stager=Bad("list"))
    for how in ("future", "synchronize"):
        pending = dcpstore.async_save(state(), repo, async_stager=Bad(how))
        with pytest.raises(OSError, match="no memory"):
            pending.staged.result(60)
        with pytest.raises(OSError, match="no memory"):
            pending.result(60)
    with pytest.raises(InvalidInputError, match=r"has no stage\(\)"):
        dcpstore.async_save(state(), repo, async_stager="default")  # type: ignore[call-overload]
    with pytest.raises(InvalidInputError, match="staging_limit bounds our own copy"):
        dcpstore.async_save(state(), repo, async_stager=Bad("list"), staging_limit=1)
    assert dcpstore.async_save(state(), repo).result().number == 1


def stage_on_ranks(rank: int, place: Place) -> list[str]:
    """Stage with another stager on each rank; return the failures."""
    messages = []
    with place.open() as repo:
        stager = Later(threading.Event())
        stager.go.set()
        held = state(float(rank))
        own = {f"own{rank}": held["w"]}
        dcpstore.async_save(own, repo, async_stager=stager if rank else None).result(60)
        for how in ("raises", "future"):
            try:
                bad = Bad(how) if rank else BlockingAsyncStager()
                dcpstore.async_save(own, repo, async_stager=bad).result(60)
            except DcpstoreError as error:
                messages.append(str(error))
        stager.close()
    return messages


def test_stagers_of_several_ranks(place: Place, two_ranks: RankPool) -> None:
    place.open().close()
    first, second = two_ranks.run(stage_on_ranks, place)
    assert first == second
    assert [text.splitlines()[1].strip() for text in first] == ["rank 1: OSError: no memory"] * 2
    with place.open() as repo:
        assert repo.read().keys() == {"own0", "own1"}
        assert_sound(repo)


def test_process_is_refused_if_it_cannot_be_used(repo: Repository) -> None:
    process = AsyncCheckpointerType.PROCESS
    with pytest.raises(InvalidInputError, match=r"needs a process group, .*THREAD"):
        dcpstore.async_save(state(), repo, async_checkpointer_type=process)
    with pytest.raises(InvalidInputError, match="'process'; pass one of torch's"):
        dcpstore.async_save(state(), repo, async_checkpointer_type="process")  # type: ignore[call-overload]
    assert repo.log() == []


class Locked(dcpstore.DefaultSavePlanner):
    """A planner that cannot be sent to another process."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Refusing(dcpstore.DefaultSavePlanner):
    """Fails on rank 1."""

    def create_local_plan(self) -> dcpstore.SavePlan:
        if torch.distributed.get_rank() == 1:
            raise OSError("no luck")
        return super().create_local_plan()


def save_in_processes(rank: int, place: Place) -> dict[str, Any]:
    """Save in torch's background process, with success and with each kind of failure."""
    whole = torch.arange(24.0).reshape(8, 3)
    process: dict[str, Any] = {"async_checkpointer_type": AsyncCheckpointerType.PROCESS}
    results: dict[str, Any] = {}
    with place.open() as repo:

        def begin(state: Mapping[str, Any], **asked: Any) -> dcpstore.PendingSave:
            return dcpstore.async_save(dict(state), repo, **process, **asked)

        tensor = distribute_tensor(whole, mesh((2,)), [Shard(0)])
        held = {"w": tensor, "own": dcpstore.PerRank(rank), "nest": {"lr": [0.5, (1, 2)]}}
        pending = begin(
            held,
            branch="b",
            step=3,
            tags=["t"],
            message="m",
            metrics={"loss": 2.5},
            labels={"a": 1},
        )
        tensor.to_local().fill_(-1)
        results["first"] = pending.result(110)
        tensor.to_local().copy_(whole[rank * 4 : rank * 4 + 4] + 1)
        stager = DefaultStager(StagingOptions(False, True, True, False))
        begin(held, branch="b", step=4, async_stager=stager).result(110)
        stager.close()
        bad: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
            "tip": (held, {"expect_tip": "v1", "branch": "b"}),
            "planner": (held, {"planner": Locked()}),
            "group": (held, {"process_group": torch.distributed.new_group([0, 1])}),
            "no_dist": (held, {"no_dist": True}),
            "rank": (held, {"planner": Refusing()}),
            "ranks": (held, {"step": rank}),
        }
        for name, (what, asked) in bad.items():
            try:
                begin(what, **asked).result(110)
            except DcpstoreError as error:
                results[name] = type(error).__name__, str(error)
        keep = Retention(keep_last=1)
        results["last"] = begin(held, branch="b", retention=keep).result(110).number
    return results


@since_2_9  # in 2.8 a save that fails ends torch's process, and no other one is begun
@pytest.mark.slow_on_postgres
def test_process_saves_as_thread_does(place: Place, two_ranks: RankPool) -> None:
    place.open().close()
    first, second = two_ranks.run(save_in_processes, place)
    assert first == second
    version = first["first"]
    asked = (version.branch, version.step, version.tags, version.message, version.metrics)
    assert asked == ("b", 3, ("t",), "m", {"loss": 2.5})
    assert version.labels == {"a": "1"}
    assert version.ranks == 2
    assert first["tip"][0] == ConflictError.__name__
    assert first_words(first["planner"]) == "planner: a Locked cannot be sent"
    assert "one group for the whole job" in first["group"][1]
    assert "needs a process group" in first["no_dist"][1]
    assert first["rank"][0] == "RankFailure"
    assert "rank 1: OSError: no luck" in first["rank"][1]
    assert "disagree about step" in first["ranks"][1]
    with place.open() as repo:
        assert [v.number for v in repo.log("b")] == [first["last"], 1]  # version 1 has a tag
        read = repo.read("b")
        assert torch.equal(read["w"], torch.arange(24.0).reshape(8, 3) + 1)
        assert (read["own.rank-0"], read["own.rank-1"]) == (0, 1)
        assert read["nest.lr"] == [0.5, (1, 2)]
        assert torch.equal(repo.read("t")["w"], torch.arange(24.0).reshape(8, 3))
        assert_sound(repo)


def first_words(raised: tuple[str, str]) -> str:
    return " ".join(raised[1].split()[:6])


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_three_saves_that_overlap_onto_new_folders(tmp_path: Path) -> None:
    """With torch's own call, which begins a save while another one is running."""
    writers: list[Any] = [dcpstore.FileSystemWriter, dcp.FileSystemWriter]
    for writer in writers:
        base = tmp_path / writer.__module__
        futures = [
            dcp.async_save(state(step), storage_writer=writer(base / f"step{step}"))
            for step in range(3)
        ]
        for future in futures:
            future.result()
    for step in range(3):
        found = state(-1)
        dcpstore.load(found, tmp_path / dcpstore.FileSystemWriter.__module__ / f"step{step}")
        assert torch.equal(found["w"], torch.full((10,), float(step)))
