"""Steps of several ranks: every live rank learns which ranks failed, are late or have ended."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dcpstore.collectives import Alone, RankGroup, in_step, in_turn
from dcpstore.compat.torch_private import group_store
from dcpstore.errors import DcpstoreError
from tests.ranks import RankPool

DEADLINE = 3  # seconds
Raised = tuple[str, str, dict[int, tuple[str, str]]]


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Three ranks that wait no longer than DEADLINE for one another."""
    pool = RankPool(3, tmp_path_factory.mktemp("ranks"))
    pool.run(set_deadline)
    yield pool
    pool.close()


@pytest.fixture(params=["file", pytest.param("tcp", marks=pytest.mark.slow)])
def ranks_to_end(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RankPool]:
    """Three ranks with a short deadline, for this test only, because some of them end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = f"tcp://127.0.0.1:{port}" if request.param == "tcp" else None
    pool = RankPool(3, tmp_path, rendezvous=rendezvous)
    pool.run(set_deadline)
    yield pool
    pool.close()


def set_deadline(rank: int) -> None:
    assert dist.group.WORLD is not None
    group_store(dist.group.WORLD).set_timeout(timedelta(seconds=DEADLINE))


def caught(call: Callable[[], Any]) -> Raised:
    """Return the class and text of what a call raises, and its ranks' failures."""
    try:
        call()
    except DcpstoreError as error:
        failures = getattr(error, "failures", {})
        return (
            type(error).__name__,
            str(error),
            {rank: (type(failure).__name__, str(failure)) for rank, failure in failures.items()},
        )
    return "nothing", "", {}


def share(ranks: RankGroup, step: str = "share") -> list[int]:
    """Return the numbers of all ranks, which each rank has sent."""
    return in_step(ranks, step, lambda: ranks.rank, list)


def refuse(*given: Any) -> Any:
    raise OSError(f"no {given}")


class Unpicklable(Exception):
    """Does not survive pickling."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(one + other)


def raise_unpicklable() -> None:
    raise Unpicklable(1, 2)


# What three ranks call; the rank for which the flag is True fails.
FAILING: dict[str, Callable[[RankGroup, bool], Any]] = {
    "local of a step": lambda r, fails: in_step(r, "s", refuse if fails else int, list),
    "local of a turn": lambda r, fails: in_turn(r, "s", refuse if fails else int, list),
    "unpicklable error": lambda r, fails: in_step(
        r, "s", raise_unpicklable if fails else int, list
    ),
    "unsendable value": lambda r, fails: in_turn(r, "s", lambda: share if not fails else r, list),
}


def fail(rank: int, what: str, failing: int) -> tuple[Raised, list[int]]:
    ranks = RankGroup()
    return caught(lambda: FAILING[what](ranks, rank == failing)), share(ranks)


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(
    ("what", "kind", "match"),
    [
        ("local of a step", "OSError", "no ()"),
        ("local of a turn", "OSError", "no ()"),
        ("unpicklable error", "DcpstoreError", "Unpicklable: 3"),
        ("unsendable value", "DcpstoreError", "cannot be pickled"),
    ],
)
def test_all_ranks_raise_what_one_raised(
    three_ranks: RankPool, what: str, kind: str, match: str, failing: int
) -> None:
    for raised, after in three_ranks.run(fail, what, failing):
        assert raised[0] == "RankFailure"
        assert raised[1].startswith("s failed on 1 of the ranks:")
        assert raised[2][failing][0] == kind
        assert match in raised[2][failing][1]
        assert after == [0, 1, 2]


COMBINING: dict[str, Callable[[RankGroup], Any]] = {
    "step": lambda r: in_step(r, "s", int, refuse),
    "turn": lambda r: in_turn(r, "s", int, refuse),
    "short": lambda r: in_turn(r, "s", int, lambda values: values[1:]),
    "unsendable": lambda r: in_step(r, "s", int, lambda _: r),
    "unsendable turn": lambda r: in_turn(r, "s", int, lambda _: [1, r, 1]),
}


def fail_to_combine(rank: int, what: str) -> tuple[Any, list[int]]:
    ranks = RankGroup()
    try:
        COMBINING[what](ranks)
    except Exception as error:
        return (type(error).__name__, str(error)), share(ranks)
    return None, share(ranks)


@pytest.mark.parametrize(
    ("what", "kind", "match", "raising"),
    [
        ("step", "OSError", "no ([0, 0, 0],)", {0, 1, 2}),
        ("turn", "OSError", "no ([0, 0, 0],)", {0, 1, 2}),
        ("short", "InvalidInputError", "2 results for 3 ranks", {0, 1, 2}),
        ("unsendable", "DcpstoreError", "cannot be pickled", {0, 1, 2}),
        ("unsendable turn", "DcpstoreError", "cannot be pickled", {1}),
    ],
)
def test_all_ranks_raise_what_the_coordinator_raised(
    three_ranks: RankPool, what: str, kind: str, match: str, raising: set[int]
) -> None:
    for rank, (raised, after) in enumerate(three_ranks.run(fail_to_combine, what)):
        assert (raised is not None) == (rank in raising)
        if raised is not None:
            assert raised[0] == kind
            assert match in raised[1]
        assert after == [0, 1, 2]


def arrive_late(
    rank: int, late: tuple[int, ...], where: str, folder: Path
) -> tuple[Raised, list[int]]:
    """Let some ranks arrive, or answer, only after the deadline of the others has passed."""

    def wait() -> int:
        until = time.monotonic() + 60
        while len(list(folder.iterdir())) < 3 - len(late):
            assert time.monotonic() < until, "the others did not stop waiting"
            time.sleep(0.02)
        return rank

    ranks = RankGroup()
    raised = caught(
        lambda: in_step(
            ranks,
            "write",
            wait if rank in late and where == "local" else lambda: rank,
            lambda _: wait() if where == "combine" else 0,
        )
    )
    (folder / f"{rank}").touch()
    return raised, share(ranks)


@pytest.mark.parametrize(
    ("late", "where", "names"),
    [
        ((2,), "local", "rank 2"),
        ((1, 2), "local", "ranks 1, 2"),
        ((0,), "local", "rank 0"),
        ((0,), "combine", "rank 0"),
    ],
)
def test_ranks_that_are_late_are_named_and_the_group_stays_usable(
    three_ranks: RankPool, tmp_path: Path, late: tuple[int, ...], where: str, names: str
) -> None:
    expected = dict.fromkeys(late, ("TimeoutError", f"did not arrive within {DEADLINE} s"))
    for raised, after in three_ranks.run(arrive_late, late, where, tmp_path):
        assert raised[0] == "RankFailure"
        assert raised[1].startswith(f"waiting for {names} in write:\n")
        assert raised[2] == expected
        assert after == [0, 1, 2]


def end_early(rank: int, ending: int, where: str) -> Raised:
    """Let one rank end at once: before a step, in it, or during an exchange of bytes."""
    ranks = RankGroup()
    assert share(ranks) == [0, 1, 2]
    end: Callable[..., Any] = lambda *args, **kwargs: os._exit(7)  # noqa: E731
    if rank == ending and where == "exchange":
        dist.gather_object = dist.broadcast_object_list = end
    local = end if rank == ending and where == "local" else lambda: rank
    combine = end if where == "combine" else list
    return caught(lambda: in_step(ranks, "write", local, combine))


@pytest.mark.parametrize(
    ("ending", "where"),
    [(1, "local"), (2, "exchange"), (0, "combine"), (0, "exchange")],
)
def test_ranks_that_end_are_named(ranks_to_end: RankPool, ending: int, where: str) -> None:
    results = ranks_to_end.run(end_early, ending, where, dying=[ending])
    assert len(results) == 2
    for raised in results:
        assert raised[0] == "RankFailure"
        assert set(raised[2]) == {ending}, raised
        assert "in write:" in raised[1]
        assert f"rank {ending}" in raised[1]


def test_one_process_alone_keeps_its_own_error() -> None:
    value = object()
    assert in_step(Alone(), "s", lambda: value, lambda values: values[0]) is value
    assert in_turn(Alone(), "s", lambda: value, lambda values: values) is value
    with pytest.raises(OSError, match="no"):
        in_step(Alone(), "s", refuse, list)


class OnlyOnRank0:
    """An answer that rank 1 cannot unpickle."""

    def __reduce__(self) -> tuple[Callable[[], str], tuple[()]]:
        return open_on_rank_0, ()


def open_on_rank_0() -> str:
    if dist.get_rank() == 1:
        raise ImportError("no module here")
    return "opened"


def open_answer(rank: int) -> str:
    try:
        return str(in_step(RankGroup(), "s", lambda: rank, lambda _: OnlyOnRank0()))
    except DcpstoreError as error:
        return str(error)


def test_an_answer_that_a_rank_cannot_unpickle_is_an_error_of_ours(three_ranks: RankPool) -> None:
    first, second, third = three_ranks.run(open_answer)
    assert (first, third) == ("opened", "opened")
    assert second.startswith("the coordinator's answer cannot be read on this rank (ImportError:")
