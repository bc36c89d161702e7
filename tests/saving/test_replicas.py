"""Items that several ranks hold: different contents are an error, and no save mixes ranks."""

from __future__ import annotations

import logging
import random
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import dcpstore
from dcpstore import InvalidInputError, PerRank, Repository
from dcpstore.catalog.read.user_sql import query_rows
from dcpstore.saving.replicas import fingerprint
from tests.ranks import RankPool, mesh
from tests.saving.conftest import assert_unchanged
from tests.saving.test_ranks import caught
from tests.soundness import Place

LARGE = 300_000  # float32: more than a MiB


def large(rank: int, *, at: int = 0) -> torch.Tensor:
    """Return a tensor that is sampled; ranks differ at one element of the first block."""
    tensor = torch.zeros(LARGE)
    tensor[at] = rank
    return tensor


def replicated(rank: int) -> torch.Tensor:
    """Return a DTensor that claims to be the same on both ranks."""
    tensor = distribute_tensor(torch.zeros(4, 2), mesh((2,)), [Replicate()])
    tensor.to_local().fill_(rank)
    return tensor


def half(rank: int) -> torch.Tensor:
    """Return a DTensor of which each rank holds its own rows."""
    return distribute_tensor(torch.arange(8.0), mesh((2,)), [Shard(0)])


class Owner:
    """A Stateful with a different state on each rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def state_dict(self) -> dict[str, Any]:
        return {"seen": {"x": self.rank}, "same": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rank = state["seen"]["x"]


def model(rank: int) -> torch.nn.Module:
    """Return a model whose parameters differ between ranks."""
    net = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(net.weight, rank)
    torch.nn.init.constant_(net.bias, 0)
    return net


def optimizer(rank: int) -> torch.optim.Optimizer:
    """Return an optimizer that has taken a different step on each rank."""
    weight = torch.nn.Parameter(torch.ones(2))
    adam = torch.optim.Adam([weight])
    weight.grad = torch.full((2,), 1.0 + rank)
    adam.step()
    return adam


# States that differ between ranks, and a part of the error message for each.
DIFFERING: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "value": (r"'lr' (rank 0 differs from rank 1)", lambda r: {"lr": r, "same": [1, "a"]}),
    "bool and int": ("'x'", lambda r: {"x": True if r else 1}),
    "int and float": ("'x'", lambda r: {"x": 1.0 if r else 1}),
    "nested": ("'x.y'", lambda r: {"x": {"y": (1,)} if r else {"y": (2,)}}),
    "tuple and set": ("'x'", lambda r: {"x": (1,) if r else {1}}),
    "text": ("'deep.0.name'", lambda r: {"deep": [{"name": f"rank {r}"}]}),
    "long value": ("'x'", lambda r: {"x": tuple(range(r, 20_000 + r))}),
    "ordered": (
        "'x'",
        lambda r: {"x": (OrderedDict([("a", 1), ("b", 2)][:: -1 if r else 1]),)},
    ),
    "small tensor": ("'w'", lambda r: {"w": torch.full((3,), float(r))}),
    "one element": ("'w'", lambda r: {"w": large(r)[: LARGE // 2]}),
    "0-dimensional": ("'w'", lambda r: {"w": torch.tensor(r)}),
    "bf16": ("'w'", lambda r: {"w": torch.full((3,), r, dtype=torch.bfloat16)}),
    "large": ("'w'", lambda r: {"w": large(r)}),
    "large, the last": ("'w'", lambda r: {"w": torch.full((LARGE,), float(r))}),
    "numpy": ("'w'", lambda r: {"w": np.full(3, r)}),
    "random state": ("'rng.", lambda r: {"rng": seeded(r)}),
    "module": ("'m.weight'", lambda r: {"m": model(r)}),
    "optimizer": ("'o.state.0.exp_avg'", lambda r: {"o": optimizer(r)}),
    "stateful": ("'s.seen.x'", lambda r: {"s": Owner(r)}),
    "replicated": ("'d'", lambda r: {"d": replicated(r)}),
    "with shards": ("'lr'", lambda r: {"d": half(r), "lr": r}),
    "with own values": ("'lr'", lambda r: {"lr": r, "rng": PerRank(r), f"only {r}": 1}),
}


def seeded(rank: int) -> dict[str, Any]:
    """Return the random states of this rank, as a trainer keeps them."""
    version, words, gauss = random.Random(rank).getstate()
    numpy_state = np.random.RandomState(rank).get_state(legacy=False)
    return {
        "torch": torch.Generator().manual_seed(rank).get_state(),
        "python": [version, list(words), gauss],
        "numpy": numpy_state["state"],
    }


# States that may be saved: what several ranks hold is equal.
SMALL = torch.arange(6.0).reshape(2, 3)
SQUARE = torch.arange(1e6).reshape(1000, 1000)
EQUAL: dict[str, Callable[[int], dict[str, Any]]] = {
    "values": lambda r: {"nan": float("nan"), "inf": float("inf"), "none": None, "t": (1, "a")},
    "dicts in any order": lambda r: {"x": (dict([("a", 1), ("b", 2)][:: -1 if r else 1]),)},
    "keys of any kind": lambda r: {"x": (dict([(1, 1), ((2,), 2)][:: -1 if r else 1]),)},
    "sets": lambda r: {"x": set(["a", "b", "c", "d"][:: -1 if r else 1])},
    "tensors": lambda r: {"w": torch.arange(6.0), "nan": torch.full((2,), float("nan"))},
    "special tensors": lambda r: {
        "zero": torch.tensor(1.0),
        "empty": torch.empty(0, 3),
        "bool": torch.ones(2) > 0,
    },
    "large": lambda r: {"w": large(0)},
    "other strides": lambda r: {
        "small": SMALL.t().contiguous().t() if r else SMALL,
        "large": SQUARE.t().contiguous().t() if r else SQUARE,
        "view": torch.arange(LARGE + 5)[5:] if r else torch.arange(5, LARGE + 5),
        "expanded": torch.ones(1).expand(LARGE) if r else torch.ones(LARGE),
    },
    "own values": lambda r: {"rng": PerRank(seeded(r)), "lr": 0.1},
    "stages": lambda r: {f"stage{r}.w": torch.full((3,), float(r)), f"n{r}": r, "shared": 1},
    "held by one": lambda r: {"only": torch.ones(2)} if r else {},
    "shards": lambda r: {"d": half(r)},
    "replicated": lambda r: {"d": replicated(0)},
}


CALLS: dict[str, Callable[[dict[str, Any], Repository], object]] = {
    "save": dcpstore.save,
    "async": lambda state, repo: dcpstore.async_save(state, repo).result(),
    "torch's planner": lambda state, repo: dcpstore.save(
        state, repo, planner=dcp.DefaultSavePlanner()
    ),
    "process": lambda state, repo: dcpstore.async_save(
        state, repo, async_checkpointer_type=AsyncCheckpointerType.PROCESS
    ).result(),
}
FEW = {"value", "small tensor", "large", "module", "stateful", "values", "tensors", "own values"}


def save_each(rank: int, place: Place, call: str, *, differ: bool) -> dict[str, Any]:
    """Save each of the states, and through another call only a few; return what each raises."""
    states = {what: make for what, (_, make) in DIFFERING.items()} if differ else EQUAL
    if call != "save":
        states = {what: make for what, make in states.items() if what in FEW}
    save = CALLS[call]
    raised = {}
    with place.open() as repo:
        for what, make in states.items():
            raised[what] = caught(partial(lambda make: save(make(rank), repo), make))
    return raised


@pytest.mark.parametrize("call", CALLS)
def test_contents_that_differ_are_refused_on_every_rank(
    kept: Repository, place: Place, two_ranks: RankPool, call: str, subtests: pytest.Subtests
) -> None:
    before = sorted([*kept.storage.list("packs"), *kept.storage.list("manifests")])
    first, second = two_ranks.run(partial(save_each, differ=True), place, call)
    assert set(first) == (set(DIFFERING) if call == "save" else set(DIFFERING) & FEW)
    for what in first:
        message = DIFFERING[what][0]
        with subtests.test(what=what):
            assert first[what] == second[what]
            assert first[what][0] == "InvalidInputError", first[what]
            assert message in first[what][1]
            assert "dcpstore.PerRank" in first[what][1]
            assert "'same'" not in first[what][1]
    assert_unchanged(kept)
    assert sorted([*kept.storage.list("packs"), *kept.storage.list("manifests")]) == before
    assert query_rows(kept.catalog, "SELECT uid FROM version WHERE status = 'pending'", {}) == []


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("call", ["save", "async", "torch's planner"])
def test_contents_that_are_equal_are_saved(place: Place, two_ranks: RankPool, call: str) -> None:
    place.open().close()
    raised = two_ranks.run(partial(save_each, differ=False), place, call)
    assert set(raised[0]) == (set(EQUAL) if call == "save" else set(EQUAL) & FEW)
    assert raised == [dict.fromkeys(raised[0], ("nothing", "", {}))] * 2


def save_twice(rank: int, place: Place) -> list[str]:
    """Save three times with one plan, which is cached: equal states twice, then different ones."""
    names = []
    with place.open() as repo:
        for difference in (0, 0, 1):
            state = {"w": torch.full((3,), float(difference * rank)), "d": half(rank)}
            names.append(caught(partial(dcpstore.save, state, repo))[0])
    return names


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_difference_is_found_with_a_cached_plan_too(place: Place, two_ranks: RankPool) -> None:
    place.open().close()
    names = two_ranks.run(save_twice, place)
    assert names == [["nothing", "nothing", "InvalidInputError"]] * 2


def save_large(rank: int, place: Place) -> tuple[str, str, dict[int, str]]:
    """Save a state so large that its first chunks are written before the others are digested."""
    state = {"a": torch.zeros(20 << 20), "b": torch.ones(20 << 20), "z": torch.tensor(rank)}
    with place.open() as repo:
        return caught(lambda: dcpstore.save(state, repo))


@pytest.mark.slow
def test_nothing_of_a_large_save_is_written_before_it_is_compared(
    kept: Repository, place: Place, two_ranks: RankPool
) -> None:
    first, second = two_ranks.run(save_large, place)
    assert first == second
    assert first[0] == "InvalidInputError"
    assert len(list(kept.storage.list("packs"))) == 1
    assert_unchanged(kept)


class Net(torch.nn.Module):
    """A batch norm, and a buffer that each rank fills differently."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(1000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += x.sum()
        out: torch.Tensor = self.norm(x)
        return out


class Warnings(logging.Handler):
    """Collects the warnings that are logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def train_and_save(rank: int, place: Place, call: str) -> tuple[list[str], dict[str, Any], str]:
    """Train a model under DDP until its buffers differ between ranks, and save it twice."""
    net = DistributedDataParallel(Net())
    net(torch.full((8, 4), 1.0 + rank) + torch.arange(8.0)[:, None]).sum().backward()
    warnings = Warnings()
    logging.getLogger("dcpstore").addHandler(warnings)
    state: dict[str, Any] = {"deep": [{"net": net}]} if call == "nested" else {"net": net}
    if call == "dict":
        state = {"net": {"norm": net.module.norm.state_dict()}}
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=call == "torch's, lowest")
    try:
        with place.open() as repo:
            for _ in range(2):
                if call == "async":
                    raised = caught(lambda: dcpstore.async_save(state, repo).result())
                elif call.startswith("torch's"):
                    raised = caught(lambda: dcpstore.save(state, repo, planner=planner))
                else:
                    raised = caught(lambda: dcpstore.save(state, repo))
    finally:
        logging.getLogger("dcpstore").removeHandler(warnings)
    own = {name: tensor.clone() for name, tensor in net.module.state_dict().items()}
    return warnings.messages, own, raised[0]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("call", ["save", "async", "dict", "torch's", "torch's, lowest"])
def test_buffers_of_a_module_are_those_of_the_lowest_rank(
    place: Place, two_ranks: RankPool, call: str
) -> None:
    place.open().close()
    (messages, own, raised), (messages_of_rank_1, others, _) = two_ranks.run(
        train_and_save, place, call
    )
    assert not torch.equal(own["norm.running_mean"], others["norm.running_mean"])
    assert messages_of_rank_1 == []
    if call == "torch's":  # which spreads buffers over the ranks
        assert raised == "InvalidInputError"
        return
    assert raised == "nothing"
    assert all("norm.running_mean" in message for message in messages)
    assert len(messages) == (2 if call == "torch's, lowest" else 1), messages
    with place.open() as repo:
        read = {
            name.split("net.")[-1].removeprefix("module."): t for name, t in repo.read().items()
        }
        assert all(torch.equal(read[name], own[name]) for name in read)
        assert read.keys() >= {"norm.running_mean", "norm.running_var"}


def test_a_fingerprint_sees_every_element_of_a_mebibyte() -> None:
    whole = torch.zeros(1 << 18)
    for at in (0, 100_000, -1):
        other = whole.clone()
        other[at] = 1
        assert fingerprint(other) != fingerprint(whole)


def test_a_fingerprint_of_a_large_tensor_sees_the_documented_blocks() -> None:
    whole = torch.zeros(10, 50_000)
    size, count = 1024, 64
    step = (whole.numel() - size) // (count - 1)
    inside = {i * step + j for i in (0, 1, count - 1) for j in (0, size - 1)}
    outside = {i * step + j for i in (0, count - 2) for j in (size, step - 1)}
    for made in (whole.clone, lambda: whole.t().contiguous().t()):
        for at in inside | outside:
            other = made()
            other[divmod(at, 50_000)] = 1
            assert (fingerprint(other) != fingerprint(whole)) == (at in inside)


@pytest.mark.parametrize(
    "dtype",
    ["bool", "uint8", "int64", "bfloat16", "float16", "float64", "float8_e4m3fn", "complex64",
     "complex128", "uint16"],
)  # fmt: skip
def test_a_fingerprint_does_not_depend_on_strides(dtype: str) -> None:
    whole = torch.arange(2_400_000).remainder(2).to(getattr(torch, dtype)).reshape(1200, 2000)
    words = whole.view(torch.int64) if whole.itemsize == 8 else whole
    transposed = words.t().clone(memory_format=torch.contiguous_format).t().view(whole.dtype)
    assert not transposed.is_contiguous()
    assert fingerprint(transposed) == fingerprint(whole)
    assert fingerprint(whole[:3, :5]) == fingerprint(whole[:3, :5].clone())


def test_a_fingerprint_of_a_conjugated_view_is_of_its_values() -> None:
    for numel in (10, 300_000):
        whole = torch.complex(torch.zeros(numel), torch.ones(numel))
        resolved = torch.complex(torch.zeros(numel), -torch.ones(numel))
        assert fingerprint(whole.conj()) == fingerprint(resolved) != fingerprint(whole)
        assert fingerprint(whole.conj().imag) == fingerprint(resolved.imag)


def gather_fingerprints(rank: int) -> bytes:
    return fingerprint(torch.arange(1e6))


def test_ranks_agree_on_a_fingerprint(two_ranks: RankPool) -> None:
    assert two_ranks.run(gather_fingerprints) == [fingerprint(torch.arange(1e6))] * 2


def save_many(rank: int, place: Place) -> tuple[str, str, dict[int, str]]:
    state = {f"w{i}": torch.tensor(rank) for i in range(30)}
    assert dist.get_world_size() == 2
    with place.open() as repo:
        return caught(lambda: dcpstore.save(state, repo))


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_message_stays_short(place: Place, two_ranks: RankPool) -> None:
    place.open().close()
    raised, _ = two_ranks.run(save_many, place)
    assert "and 22 more" in raised[1]
    assert InvalidInputError.__name__ == raised[0]
