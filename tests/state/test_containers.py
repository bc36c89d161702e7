"""What counts as a container: each kind of container, with each kind of item of a state.

A container is a mapping, a list or a tuple, of any class. A dataclass is one for plain tensors
alone.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

import dcpstore
from dcpstore import InvalidInputError, PerRank, Repository, UnsafeDataError
from dcpstore.asynchronous.other_process import _check_state


class Pair(NamedTuple):
    k: Any
    n: int = 1


class Row(tuple[Any, ...]):
    """A tuple of a class of its own."""

    __slots__ = ()


class Stack(list[Any]):
    """A list of a class of its own."""


class Own(dict[Any, Any]):
    """A dict of a class of its own."""


@dataclass
class Data:
    k: Any


@dataclass(frozen=True)
class Frozen:
    k: Any


class Owner:
    """An object whose state is its constructor's argument."""

    def __init__(self, state: Any) -> None:
        self.state: Any = state
        self.given: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"s": self.state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.given = state_dict["s"]


# By kind, how one is made of an item, and the last part of the item's FQN.
CONTAINERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "dict": (lambda item: {"k": item}, "k"),
    "number": (lambda item: {3: item}, "3"),
    "ordered": (lambda item: OrderedDict(k=item), "k"),
    "default": (lambda item: defaultdict(int, k=item), "k"),
    "own": (lambda item: Own(k=item), "k"),
    "proxy": (lambda item: MappingProxyType({"k": item}), "k"),
    "user": (lambda item: UserDict(k=item), "k"),
    "list": (lambda item: [item], "0"),
    "stack": (lambda item: Stack([item]), "0"),
    "tuple": (lambda item: (item,), "0"),
    "pair": (Pair, "0"),
    "row": (lambda item: Row((item,)), "0"),
}
DATACLASSES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "data": (Data, "k"),
    "frozen": (Frozen, "k"),
}
ALL = {**CONTAINERS, **DATACLASSES}
each_container = pytest.mark.parametrize(("make", "part"), CONTAINERS.values(), ids=CONTAINERS)
each_dataclass = pytest.mark.parametrize(("make", "part"), DATACLASSES.values(), ids=DATACLASSES)
each_of_all = pytest.mark.parametrize(("make", "part"), ALL.values(), ids=ALL)
Kinds = dict[str, tuple[Callable[[Any], Any], str]]


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repository]:
    with dcpstore.open(tmp_path_factory.mktemp("containers") / "r") as repo:
        yield repo


def saved(state: dict[str, Any], repo: Repository) -> dict[str, Any]:
    """Return what a save of a state stores, which is what an asynchronous save of it stores."""
    first = dict(repo.read(dcpstore.save(state, repo).number))
    second = repo.read(dcpstore.async_save(state, repo).result().number)
    assert [*first] == [*second]
    assert all(
        torch.equal(torch.as_tensor(first[fqn]).to_dense(), torch.as_tensor(second[fqn]).to_dense())
        for fqn in first
    )
    return first


def refused(state: dict[str, Any], repo: Repository, match: str, error: type[Exception]) -> None:
    before = len(repo.log())
    for save in (dcpstore.save, lambda *given: dcpstore.async_save(*given).result()):
        with pytest.raises(error, match=match):
            save(state, repo)
    assert len(repo.log()) == before


def one_of_each(kinds: Kinds, item: Callable[[], object]) -> dict[str, Any]:
    """Return a state with a container of each kind."""
    return {kind: make(item()) for kind, (make, _) in kinds.items()}


def names(kinds: Kinds, below: str = "") -> list[str]:
    """Return the FQNs of the items in it."""
    return sorted(f"{kind}.{part}{below}" for kind, (_, part) in kinds.items())


def item_of(container: Any) -> Any:
    if isinstance(container, Data | Frozen):
        return container.k
    return next(iter(container.values() if isinstance(container, Mapping) else container))


def sparse(value: float = 1.0) -> torch.Tensor:
    return torch.tensor([[0.0, value]]).to_sparse()


def test_a_tensor_is_an_entry(repo: Repository) -> None:
    state = one_of_each(ALL, lambda: torch.ones(1))
    kinds = {key: type(container) for key, container in state.items()}
    assert {*names(ALL)} < {*saved(state, repo)}  # and what else a named tuple holds
    state = one_of_each(ALL, lambda: torch.zeros(1))
    dcpstore.load(state, repo)
    assert {key: type(container) for key, container in state.items()} == kinds
    assert all(item_of(container).tolist() == [1] for container in state.values())


@each_of_all
def test_a_tensor_without_bytes_is_refused_by_its_fqn(
    make: Any, part: str, repo: Repository
) -> None:
    state = {"a": [make(torch.ones(1, device="meta"))]}
    refused(state, repo, rf"^'a\.0\.{part}': a tensor on the meta device", InvalidInputError)


def test_a_composed_tensor_is_an_entry(repo: Repository) -> None:
    state = one_of_each(CONTAINERS, sparse)
    kinds = {key: type(container) for key, container in state.items()}
    assert {*names(CONTAINERS)} < {*saved(state, repo)}
    state = one_of_each(CONTAINERS, lambda: sparse(2.0))
    dcpstore.load(state, repo)
    assert {key: type(container) for key, container in state.items()} == kinds
    assert all(item_of(container).to_dense().tolist() == [[0, 1]] for container in state.values())


@each_dataclass
def test_a_composed_tensor_in_a_dataclass_is_refused(
    make: Any, part: str, repo: Repository
) -> None:
    refused({"a": make(sparse())}, repo, rf"^'a\.{part}': a tensor of layout", InvalidInputError)


def test_an_object_with_a_state_is_an_owner(repo: Repository) -> None:
    found = saved(one_of_each(CONTAINERS, lambda: Owner(torch.ones(1))), repo)
    assert {*names(CONTAINERS, ".s")} < {*found}
    state = one_of_each(CONTAINERS, lambda: Owner(torch.zeros(1)))
    containers, owners = dict(state), {key: item_of(state[key]) for key in state}
    dcpstore.load(state, repo)
    assert all(state[key] is containers[key] for key in containers)
    assert all(item_of(state[key]) is owner for key, owner in owners.items())
    assert all(owner.given.tolist() == [1] for owner in owners.values())


def test_a_per_rank_value_is_one_entry_a_rank(repo: Repository) -> None:
    found = saved(one_of_each(CONTAINERS, lambda: PerRank(5)), repo)
    assert {*names(CONTAINERS, ".rank-0")} < {*found}
    state = one_of_each(CONTAINERS, lambda: PerRank(0))
    containers = dict(state)
    dcpstore.load(state, repo)
    assert all(state[key] is containers[key] for key in containers)
    assert {key: item_of(state[key]).value for key in state} == dict.fromkeys(state, 5)


def test_a_per_rank_value_may_be_in_the_state_of_an_owner(repo: Repository) -> None:
    state = {key: Owner(made) for key, made in one_of_each(CONTAINERS, lambda: PerRank(5)).items()}
    assert {name.replace(".", ".s.", 1) for name in names(CONTAINERS, ".rank-0")} < {
        *saved(state, repo)
    }
    state = {key: Owner(made) for key, made in one_of_each(CONTAINERS, lambda: PerRank(0)).items()}
    dcpstore.load(state, repo)
    for owner in state.values():
        own = item_of(owner.state)
        assert own.value == 5
        assert item_of(owner.given) is own
        assert isinstance(owner.given, tuple) == isinstance(owner.state, tuple)


def test_a_conjugated_tensor_is_stored_with_its_values(repo: Repository) -> None:
    found = saved(one_of_each(CONTAINERS, lambda: torch.tensor([1j]).conj()), repo)
    assert {fqn: found[fqn].tolist() for fqn in names(CONTAINERS)} == {
        fqn: [-1j] for fqn in names(CONTAINERS)
    }


@each_dataclass
@pytest.mark.parametrize("item", [PerRank(5), Owner(5)])
def test_objects_with_state_inside_a_dataclass_are_not_found(
    item: Any, make: Any, part: str, repo: Repository
) -> None:
    refused({"a": make(item)}, repo, "^'a': a value of type", UnsafeDataError)


@each_container
def test_a_value_that_cannot_be_copied_is_refused_by_its_fqn(
    make: Any, part: str, repo: Repository
) -> None:
    state = {"a": make([threading.Lock()])}
    with pytest.raises(InvalidInputError, match=rf"^'a\.{part}\.0': a lock cannot be copied"):
        dcpstore.async_save(state, repo, allow_pickle=True).result()
    with pytest.raises(InvalidInputError, match=rf"^'a\.{part}\.0': a lock cannot be sent"):
        _check_state(state)


@each_dataclass
def test_a_dataclass_is_copied_as_a_whole(make: Any, part: str, repo: Repository) -> None:
    state = {"a": make(threading.Lock())}
    with pytest.raises(InvalidInputError, match=f"^'a': a {type(state['a']).__name__} cannot be"):
        dcpstore.async_save(state, repo, allow_pickle=True).result()
    with pytest.raises(InvalidInputError, match=f"^'a': a {type(state['a']).__name__} cannot be"):
        _check_state(state)


def test_an_empty_container_is_a_value(repo: Repository) -> None:
    state = {"dict": {"k": {}}, "list": [{}], "tuple": ({},), "pair": Pair({}), "data": Data({})}
    dcpstore.save(state, repo)
    assert repo.read(nested=True) == {**state, "pair": ({}, 1), "data": {"k": {}}}


def test_one_object_in_two_places_is_two_entries(repo: Repository) -> None:
    shared = {"w": torch.ones(1), "own": PerRank(1), "s": [sparse(), 2]}
    found = saved({"a": shared, "b": [shared], "c": (shared, {"again": shared})}, repo)
    below = ("w", "own.rank-0", "s.0", "s.1")
    assert {*found} == {f"{at}.{name}" for at in ("a", "b.0", "c.0", "c.1.again") for name in below}


def endless(make: Callable[[Any], Any]) -> Any:
    inner: list[Any] = []
    inner.append(make(inner))
    return inner


def deep(make: Callable[[Any], Any], depth: int, item: object) -> Any:
    for _ in range(depth):
        item = make(item)
    return item


@each_of_all
def test_a_state_that_contains_itself_is_refused(make: Any, part: str, repo: Repository) -> None:
    state = {"a": endless(make), "w": torch.ones(1)}
    refused(state, repo, "nested too deep, or contains itself", InvalidInputError)


@each_container
def test_a_state_of_too_many_levels_is_refused(make: Any, part: str, repo: Repository) -> None:
    refused({"a": deep(make, 3000, torch.ones(1))}, repo, "nested too deep", InvalidInputError)


@each_container
def test_a_template_of_too_many_levels_is_refused(make: Any, part: str, repo: Repository) -> None:
    dcpstore.save({"a": torch.ones(1)}, repo)
    for state in ({"a": endless(make)}, {"a": deep(make, 3000, torch.ones(1))}):
        with pytest.raises(InvalidInputError, match="nested too deep"):
            dcpstore.load(state, repo)


def test_a_hundred_levels_are_saved(repo: Repository) -> None:
    for item, name in ((torch.ones(1), ""), (PerRank(5), ".rank-0"), (Owner(5), ".s")):
        state = {kind: deep(make, 100, item) for kind, (make, _) in CONTAINERS.items()}
        found = saved(state, repo)
        for kind, (_, part) in CONTAINERS.items():
            assert ".".join([kind, *[part] * 100]) + name in found
