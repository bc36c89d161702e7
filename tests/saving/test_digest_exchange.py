"""What ranks send of their digests: all of them once, and then those that changed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor, Shard

import dcpstore
from dcpstore import Repository
from dcpstore.saving import save_pipeline
from dcpstore.saving.digest_exchange import Difference, received, to_send
from tests.exchanges import Sent, counted
from tests.ranks import RankPool, first_ranks, mesh
from tests.soundness import Place, assert_sound

TENSORS = 300
DIGESTS = 32 * TENSORS  # bytes that a rank sends of all its chunks
MESSAGE = 500  # bytes that suffice for a message without digests
WIDTH = 16

digests = st.lists(st.integers(0, 3), max_size=40).map(
    lambda drawn: b"".join(bytes([one]) * WIDTH for one in drawn)
)


@given(digests, digests)
def test_a_difference_gives_the_digests_back(before: bytes, now: bytes) -> None:
    sent = to_send(now, before, base="v", width=WIDTH)
    assert received([sent], [("v", before)], width=WIDTH) == [now]
    if before == now and now:
        assert isinstance(sent, Difference)
        assert sent.places == sent.digests == b""


@given(digests, digests, digests)
def test_a_difference_to_other_digests_is_not_used(before: bytes, now: bytes, other: bytes) -> None:
    sent = to_send(now, before, base="v", width=WIDTH)
    assert received([sent], [("v", other)], width=WIDTH) in ([now], None)
    if isinstance(sent, Difference):
        assert received([sent], [("w", before)], width=WIDTH) is None
        assert received([sent], [], width=WIDTH) is None


def state(ranks: int, changed: int) -> dict[str, Any]:
    """Return tensors of which each rank has its rows; the first `changed` differ; a value."""
    tensors: dict[str, Any] = {
        f"layer.{i}.weight": DTensor.from_local(
            torch.arange(8.0).reshape(2, 4) + i + 1000 * (i < changed),
            mesh((ranks,)),
            [Shard(0)],
            run_check=False,
        )
        for i in range(TENSORS)
    }
    return tensors | {"replica": torch.full((3,), float(changed)), "changed": changed}


def save_each(rank: int, place: Place, ranks: int, steps: list[str], early: bool) -> list[Sent]:
    """Save once for each step on the first ranks, and load what was saved; return what was sent."""
    group = first_ranks(ranks)
    mesh((ranks,))
    sent: list[Sent] = []
    if rank >= ranks:
        return sent
    with ExitStack() as stack:
        if early:
            stack.enter_context(patch("dcpstore.saving.coordinator._EARLY", 0))
        repo = place.open()
        for step in steps:
            what, _, argument = step.partition(" ")
            if what == "restart" and rank == int(argument):
                repo.close()
                repo = place.open()
            if what in ("save", "more"):
                given = state(ranks, int(argument))
                if what == "more":
                    given["another"] = torch.ones(4)
                with counted() as one:
                    dcpstore.save(given, repo, process_group=group)
                sent.append(one)
                target = state(ranks, 7)
                dcpstore.load(target, repo, process_group=group)
                for fqn, tensor in target.items():
                    if torch.is_tensor(tensor):
                        assert torch.equal(local(tensor), local(given[fqn])), (step, fqn)
            if what == "branch":
                with counted() as one:
                    dcpstore.save(state(ranks, 0), repo, branch=argument, process_group=group)
                sent.append(one)
        repo.close()
    return sent


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def saved(
    pool: RankPool, place: Place, ranks: int, steps: list[str], *, early: bool = False
) -> list[list[list[int]]]:
    """Return, by rank and save, the bytes of each message with digests."""
    place.open().close()
    done = pool.run(save_each, place, ranks, steps, early)
    with place.open() as repo:
        assert_sound(repo)
    return [[one["digest"] for one in by_rank] for by_rank in done[:ranks]]


@pytest.mark.parametrize("ranks", [2, 4])
def test_only_changed_digests_are_sent(place: Place, four_ranks: RankPool, ranks: int) -> None:
    steps = ["save 0", "save 0", "save 10", "branch other", "save 250"]
    for first, unchanged, ten, other, nearly_all in saved(four_ranks, place, ranks, steps):
        assert first[0] > DIGESTS
        assert unchanged[0] < MESSAGE
        assert 10 * 36 < ten[0] < 10 * 36 + MESSAGE
        assert other[0] < 10 * 36 + MESSAGE  # the last version of this plan, on any branch
        assert 250 * 36 < nearly_all[0] < 250 * 36 + MESSAGE


@pytest.mark.parametrize("restarted", [0, 1])
def test_a_restarted_rank_sends_all(place: Place, two_ranks: RankPool, restarted: int) -> None:
    steps = ["save 0", f"restart {restarted}", "save 0", "save 0"]
    for rank, (_, after, again) in enumerate(saved(two_ranks, place, 2, steps)):
        sends_all = restarted in (0, rank)
        assert (after[0] > DIGESTS) == sends_all
        assert again[0] < MESSAGE


def test_another_plan_begins_again(place: Place, two_ranks: RankPool) -> None:
    steps = ["save 0", "more 0", "save 0", "more 0"]
    for sent in saved(two_ranks, place, 2, steps):
        assert [one[0] > DIGESTS for one in sent] == [True, True, False, False]


def test_first_chunks_are_sent_by_difference_too(place: Place, two_ranks: RankPool) -> None:
    steps = ["save 0", "save 0", "save 1"]
    for first, unchanged, one in saved(two_ranks, place, 2, steps, early=True):
        assert [n > size for n, size in zip(first, (DIGESTS / 5, DIGESTS), strict=True)] == [
            True,
            True,
        ]
        assert [n < MESSAGE for n in unchanged] == [True, True]
        assert [n < MESSAGE + 2 * 36 for n in one] == [True, True]


def lying(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return `to_send` with a mistake: it leaves out the first change."""

    def to_send(*args: Any, **options: Any) -> Any:
        sent = call(*args, **options)
        if isinstance(sent, Difference) and sent.places:
            digest = sent.digests[options["width"] :]
            return Difference(sent.base, sent.count, sent.places[4:], digest, sent.check)
        return sent

    return to_send


def save_with_a_mistake(rank: int, place: Place, early: bool) -> list[list[int]]:
    wrong = lying(save_pipeline.to_send) if rank == 1 else save_pipeline.to_send
    with patch.object(save_pipeline, "to_send", wrong):
        done = save_each(rank, place, 2, ["save 0", "save 3", "save 3"], early)
    return [one["digest"] for one in done]


@pytest.mark.parametrize("early", [False, True])
def test_a_wrong_difference_is_asked_for_again(
    place: Place, two_ranks: RankPool, early: bool
) -> None:
    place.open().close()
    for first, wrong, last in two_ranks.run(save_with_a_mistake, place, early):
        assert len(first) == len(last) == 1 + early
        assert len(wrong) == 2 + early
        assert wrong[-1] > DIGESTS  # `save_each` has checked what was saved
    with place.open() as repo:
        assert_sound(repo)


def fail_when_asked_again(rank: int, place: Place) -> tuple[str, bool]:
    def refuse(work: Any) -> Any:
        raise OSError("no digests")

    wrong = lying(save_pipeline.to_send) if rank == 1 else save_pipeline.to_send
    with patch.object(save_pipeline, "to_send", wrong), place.open() as repo:
        dcpstore.save(state(2, 0), repo)
        try:
            with patch.object(save_pipeline.RankWork, "digest_whole", refuse if rank else _whole):
                dcpstore.save(state(2, 3), repo)
        except dcpstore.RankFailure as error:
            text = f"{error} {error.failures!r}"
        return text, saves_again(repo)


_whole = save_pipeline.RankWork.digest_whole


def saves_again(repo: Repository) -> bool:
    with counted() as sent:
        dcpstore.save(state(2, 0), repo)
    return sent["digest"][0] < MESSAGE


def test_a_rank_that_fails_when_asked_again_makes_all_raise(
    place: Place, two_ranks: RankPool
) -> None:
    place.open().close()
    first, second = two_ranks.run(fail_when_asked_again, place)
    assert first == second
    assert "digest failed on 1 of the ranks" in first[0]
    assert "no digests" in first[0]
    assert first[1]
    with place.open() as repo:
        assert len(repo.log()) == 2
