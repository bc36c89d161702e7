"""Ranks that disagree or fail: all raise the same error, and the repository shows nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

import dcpstore
from dcpstore import DcpstoreError, RankFailure, Repository
from dcpstore.catalog.read.user_sql import query_rows
from tests.ranks import RankPool, mesh
from tests.saving.conftest import Opaque, W, assert_unchanged
from tests.soundness import Place


def caught(call: Callable[[], Any]) -> tuple[str, str, dict[int, str]]:
    """Return the class and text of what a call raises, and the classes of its ranks' failures."""
    try:
        call()
    except DcpstoreError as error:
        failures = getattr(error, "failures", {})
        kinds = {rank: type(failure).__name__ for rank, failure in failures.items()}
        return type(error).__name__, str(error), kinds
    return "nothing", "", {}


def sharded(rows: int) -> DTensor:
    return DTensor.from_local(torch.ones(rows, 3), mesh((2,)), [Shard(0)], run_check=False)


def partial() -> DTensor:
    return DTensor.from_local(torch.ones(3), mesh((2,)), [Partial()], run_check=False)


# What two ranks call together; the flag is True on the second rank, which then differs.
WRONG: dict[str, Callable[[Repository, bool], Any]] = {
    "name": lambda r, differs: dcpstore.save({"x" * 2001 if differs else "w": W["w"]}, r),
    "metrics": lambda r, differs: dcpstore.save(W, r, metrics={"loss": float(differs)}),
    "metrics_from": lambda r, differs: dcpstore.save(
        W, r, metrics={"loss": float(differs)}, metrics_from="all" if differs else "rank0"
    ),
    "metrics_from invalid": lambda r, differs: dcpstore.save(W, r, metrics_from=cast("Any", 0)),
    "branch": lambda r, differs: dcpstore.save(W, r, branch="b" if differs else "main"),
    "tags": lambda r, differs: dcpstore.save(W, r, tags=["t"] if differs else []),
    "parent": lambda r, differs: dcpstore.save(W, r, parent=1 if differs else None),
    "shape": lambda r, differs: dcpstore.save({"w": torch.ones(4 if differs else 3)}, r),
    "dtype": lambda r, differs: dcpstore.save({"w": W["w"].int() if differs else W["w"]}, r),
    "kind": lambda r, differs: dcpstore.save({"w": 3 if differs else W["w"]}, r),
    "shards": lambda r, differs: dcpstore.save(
        {"w": sharded(2) if differs else torch.ones(4, 3)}, r
    ),
    "half": lambda r, differs: dcpstore.save({} if differs else {"w": sharded(2)}, r),
    "partial": lambda r, differs: dcpstore.save({"w": partial()}, r),
    "not a member": lambda r, differs: dcpstore.save(
        W, r, process_group=dist.GroupMember.NON_GROUP_MEMBER
    ),
    "meta": lambda r, differs: dcpstore.save({"w": W["w"].to("meta") if differs else W["w"]}, r),
    "object": lambda r, differs: dcpstore.save({f"o{differs}": Opaque() if differs else 1}, r),
    "ref": lambda r, differs: dcpstore.load(dict(W), r, "main" if differs else "best"),
    "no ref": lambda r, differs: dcpstore.load(dict(W), r, "bets"),
    "missing": lambda r, differs: dcpstore.load({"v" if differs else "u": torch.ones(3)}, r),
    "repository": lambda r, differs: dcpstore.save(W, f"{r.storage.url}-other" if differs else r),
    "no repository": lambda r, differs: dcpstore.load(dict(W), f"{r.storage.url}-none"),
}


def call_wrongly(rank: int, place: Place, what: str) -> tuple[str, str, dict[int, str]]:
    with place.open() as repo:
        return caught(lambda: WRONG[what](repo, rank == 1))


EXPECTED = {
    "name": ("InvalidInputError", "'… has 2001 bytes"),
    "metrics": ("InvalidInputError", "disagree about metrics:"),
    "metrics_from": ("InvalidInputError", "disagree about metrics_from"),
    "metrics_from invalid": ("InvalidInputError", "metrics_from=0; write 'all'"),
    "branch": ("InvalidInputError", "disagree about branch"),
    "tags": ("InvalidInputError", "disagree about tags"),
    "parent": ("InvalidInputError", "disagree about parent"),
    "shape": ("InvalidInputError", r"'w' is float32 (3,) on rank 0, float32 (4,) on rank 1"),
    "dtype": ("InvalidInputError", r"'w' is float32 (3,) on rank 0, int32 (3,) on rank 1"),
    "kind": ("InvalidInputError", r"'w' is float32 (3,) on rank 0, a value on rank 1"),
    "shards": ("InvalidInputError", "overlaps"),
    "half": ("InvalidInputError", "rank 0 hold 6 of 12 elements"),
    "partial": ("InvalidInputError", "redistribute"),
    "not a member": ("InvalidInputError", "is not a member of the process group"),
    "meta": ("RankFailure", "'w': a tensor on the meta device has no data"),
    "object": ("RankFailure", "Opaque"),
    "ref": ("InvalidInputError", "pass the same ref"),
    "no ref": ("NotFoundError", "'best'"),
    "missing": ("MismatchError", "'u' is not in the version"),
    "repository": ("InvalidInputError", "pass the same repository"),
    "no repository": ("NotFoundError", "data-none"),
}


def test_ranks_that_disagree_all_raise_the_same_error(
    kept: Repository, place: Place, two_ranks: RankPool, subtests: pytest.Subtests
) -> None:
    assert EXPECTED.keys() == WRONG.keys()
    for what, (kind, message) in EXPECTED.items():
        with subtests.test(what=what):
            first, second = two_ranks.run(call_wrongly, place, what)
            assert first == second
            assert first[0] == kind, first
            assert message in first[1]
            if what == "object":
                assert first[2] == {1: "UnsafeDataError"}
            if what == "missing":
                assert "'v' is not in the version" in first[1]
            assert_unchanged(kept)


def save_in_any_order(rank: int, place: Place) -> tuple[tuple[str, ...], dict[str, float]]:
    order = -1 if rank else 1
    metrics, labels = {"x": float("nan"), "y": 2.0}, {"b": "1", "a": "2"}
    with place.open() as repo:
        version = dcpstore.save(
            W,
            repo,
            tags=["a", "b", "c"][::order],
            metrics=dict([*metrics.items()][::order]),
            labels=dict([*labels.items()][::order]),
        )
    return version.tags, dict(version.labels)


def test_ranks_may_name_things_in_any_order(place: Place, two_ranks: RankPool) -> None:
    place.open().close()
    results = two_ranks.run(save_in_any_order, place)
    assert results == [(("a", "b", "c"), {"b": "1", "a": "2"})] * 2


def save_by_rank0(rank: int, place: Place) -> list[tuple[dict[str, float], dict[str, str]]]:
    """Give each rank its own metrics; those of the second are not even numbers."""
    metrics: dict[str, Any] = {"loss": "unread"} if rank else {"loss": torch.tensor(2.0)}
    labels: dict[str, Any] = {f"of rank {rank}": rank}
    made = []
    with place.open() as repo:
        for save in (dcpstore.save, lambda *at, **how: dcpstore.async_save(*at, **how).result()):
            version = save(W, repo, metrics=metrics, labels=labels, metrics_from="rank0")
            made.append((dict(version.metrics), dict(version.labels)))
    return made


def test_only_the_metrics_of_rank_0_count_with_metrics_from_rank0(
    place: Place, two_ranks: RankPool
) -> None:
    place.open().close()
    made = two_ranks.run(save_by_rank0, place)
    assert made == [[({"loss": 2.0}, {"of rank 0": "0"})] * 2] * 2


def save_alone(rank: int, place: Place) -> tuple[str, str, dict[int, str]]:
    """Save on each rank alone a tensor of which the second one holds nothing."""
    whole = distribute_tensor(torch.ones(1, 4), mesh((2,)), [Shard(0)])
    state = {"w": whole, "b": torch.ones(1)}
    with place.open() as repo:
        return caught(lambda: dcpstore.save(state, repo, branch=f"rank{rank}", no_dist=True))


def test_a_rank_that_saves_alone_must_hold_whole_tensors(place: Place, two_ranks: RankPool) -> None:
    place.open().close()
    first, second = two_ranks.run(save_alone, place)
    assert first[0] == "nothing"
    assert second[0] == "InvalidInputError"
    assert "'w' of shape (1, 4): rank 0 hold 0 of 4 elements" in second[1]


def fail_in_write(rank: int, place: Place) -> tuple[str, str, dict[int, str]]:
    """Let the planner of rank 1 fail between plan and write."""
    with place.open() as repo:

        class Failing(dcpstore.DefaultSavePlanner):
            def resolve_data(self, write_item: Any) -> Any:
                if rank == 1:
                    raise OSError("the device is lost")
                return super().resolve_data(write_item)

        state = {f"w{rank}": torch.ones(3)}
        return caught(lambda: dcpstore.save(state, repo, planner=Failing()))


def test_one_rank_that_fails_makes_all_raise_and_shows_nothing(
    kept: Repository, place: Place, two_ranks: RankPool
) -> None:
    first, second = two_ranks.run(fail_in_write, place)
    assert first == second
    assert first[0] == "RankFailure"
    assert first[2] == {1: "OSError"}
    assert_unchanged(kept)
    aborted = query_rows(kept.catalog, "SELECT status, error FROM version WHERE number IS NULL", {})
    assert [(row.status, "device is lost" in row.error) for row in aborted] == [("aborted", True)]
    assert dcpstore.save(W, kept).number == 2


def test_rank_failure_is_a_dcpstore_error() -> None:
    assert issubclass(RankFailure, DcpstoreError)
