"""A nested state as flat items and back: flattening, what it records, and its inverse."""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from dcpstore import CorruptionError, InvalidInputError
from dcpstore.planning.save_planner import DefaultSavePlanner
from dcpstore.records import ObjectPath, StatePath
from dcpstore.state.tree import FlatPaths, flattened, joined_path, nested_state, recorded_paths


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass
class Moments:
    mean: torch.Tensor
    count: int


def back(state: Mapping[Any, Any]) -> Any:
    """Return a state after flattening and back, with its entries in the order of a catalog."""
    flat = flattened(state)
    paths = recorded_paths([pickle.loads(pickle.dumps(flat.paths))])
    return nested_state({fqn: flat.items[fqn] for fqn in sorted(flat.items)}, paths)


def shape(value: Any) -> Any:
    """Return what differs between different states: exact types, order of keys, tensor identity."""
    if isinstance(value, torch.Tensor):
        return id(value)
    if isinstance(value, Mapping):
        return (type(value), [(type(key), repr(key), shape(item)) for key, item in value.items()])
    if isinstance(value, list | tuple):
        return (type(value), [shape(item) for item in value])
    return (type(value), repr(value))


texts = st.text("ab01._", max_size=3)
keys = st.one_of(
    texts,
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
    st.binary(max_size=2),
    st.tuples(st.integers(-2, 2), texts),
)
tensors = st.builds(torch.zeros, st.just((1,)))
leaves = st.one_of(tensors, st.integers(), texts, st.none(), st.tuples(st.integers()))
states = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(keys, inner, max_size=3).map(OrderedDict),
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
    ),
    max_leaves=12,
)
plain = st.recursive(
    st.one_of(tensors, st.integers(), texts, st.tuples(st.integers())),
    lambda inner: st.one_of(
        st.dictionaries(st.one_of(texts, st.integers()), inner, min_size=1, max_size=3),
        st.lists(inner, max_size=3),
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.dictionaries(texts, states, max_size=4))
def test_a_state_is_restored_from_its_flat_items(state: dict[str, Any]) -> None:
    try:
        found = back(state)
    except InvalidInputError:  # two keys make one FQN
        return
    assert shape(found) == shape(state)


@settings(deadline=None)
@given(st.dictionaries(texts, plain, max_size=4))
def test_what_torch_keeps_has_torchs_names_and_paths(
    state: dict[str, Any],
) -> None:
    try:
        ours = flattened(state)
    except InvalidInputError:
        return
    theirs, paths = flatten_state_dict(state)
    assert list(theirs) == list(ours.items)
    assert all(theirs[fqn] is ours.items[fqn] for fqn in theirs)
    assert paths == ours.paths
    assert [[*map(type, path)] for path in paths.values()] == [
        [*map(type, path)] for path in ours.paths.values()
    ]


def test_an_empty_container_is_an_item() -> None:
    state: dict[str, Any] = {"a": {}, "b": [{}], "c": {"d": OrderedDict()}, "e": []}
    assert flattened(state).items == {"a": {}, "b.0": {}, "c.d": OrderedDict(), "e": []}
    assert flattened({"a": defaultdict(int), "b": MappingProxyType({})}).items == {"a": {}, "b": {}}
    assert type(flattened({"a": defaultdict(int)}).items["a"]) is dict


def test_a_tuple_that_holds_a_tensor_is_opened() -> None:
    tensor = torch.ones(2)
    flat = flattened(
        {
            "plain": (1, {"a": 2}),
            "deep": (1, [{"a": tensor}]),
            "listed": [[(tensor,)]],
            "named": Pair(tensor, 5),
            "data": Moments(tensor, 3),
            "size": torch.Size([1]),
        }
    )
    assert list(flat.items) == [
        "plain",
        "deep.0",
        "deep.1.0.a",
        "listed.0.0.0",
        "named.0",
        "named.1",
        "data.mean",
        "data.count",
        "size",
    ]
    assert nested_state(flat.items, recorded_paths([flat.paths])) == {
        "plain": (1, {"a": 2}),
        "deep": (1, [{"a": tensor}]),
        "listed": [[(tensor,)]],
        "named": (tensor, 5),
        "data": {"mean": tensor, "count": 3},
        "size": torch.Size([1]),
    }


def test_a_tuple_that_is_an_entry_stays_one() -> None:
    held = (torch.ones(2), 1)
    assert flattened({"a": held}, is_leaf={"a"}.__contains__).items == {"a": held}


def test_items_are_replaced_in_their_own_containers() -> None:
    state: dict[str, Any] = {
        "a": (torch.ones(1), [1, (2, torch.ones(1))]),
        "b": Pair(torch.ones(1), {3: 4}),
        "c": Moments(torch.ones(1), 5),
    }
    inner = state["b"].second
    places = flattened(state).places
    for fqn in ("a.1.0", "a.1.1.0", "b.1.3", "c.count"):
        assert places[fqn].is_open
        places[fqn].put(fqn)
    assert state["a"][1][0] == "a.1.0"
    assert state["a"][1][1][0] == "a.1.1.0"
    assert (type(state["b"]), state["b"].second) == (Pair, {3: "b.1.3"})
    assert state["b"].second is inner
    assert (type(state["c"]), state["c"].count) == (Moments, "c.count")


class Odd(tuple[Any, ...]):
    """Made of no list of items."""

    __slots__ = ()

    def __new__(cls, first: Any, second: Any) -> Odd:
        return super().__new__(cls, (first, second))


def test_a_container_that_cannot_be_rebuilt_is_not_open() -> None:
    places = flattened({"a": Odd(torch.ones(1), 2), "b": MappingProxyType({"c": 1})}).places
    assert (places["a.1"].is_open, places["a.1"].kind) == (False, "Odd")
    assert (places["b.c"].is_open, places["b.c"].kind) == (False, "mappingproxy")


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"x": {1: 5, "1": 6}}, ["1", "'1'", "'x.1'"]),
        ({"x": {1: {"a": 5}, "1": {"b": 6}}}, ["1", "'1'", "'x.1'"]),
        ({1: 5, "1": 6}, ["1", "'1'"]),
        ({"a.b": 1, "a": {"b": 2}}, ["['a.b']", "['a', 'b']"]),
        ({"a.0": torch.ones(1), "a": [torch.ones(1)]}, ["['a.0']", "['a', 0]"]),
        ({"a.b": {}, "a": {"b": 2}}, ["['a.b']", "['a', 'b']"]),
    ],
)
def test_two_items_with_one_name_are_refused(state: dict[Any, Any], named: list[str]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        flattened(state)
    assert all(name in str(caught.value) for name in named)


def test_a_state_that_contains_itself_is_refused_by_flattening() -> None:
    state: dict[str, Any] = {}
    state["again"] = [state]
    with pytest.raises(InvalidInputError, match="nested too deep"):
        flattened(state)


def test_keys_that_are_not_literals_are_restored_as_text() -> None:
    found = back({"a": {torch.float32: 1, frozenset([1]): 2, np.int64(3): 4, math.inf: 5}})
    assert found == {"a": {"torch.float32": 1, "frozenset({1})": 2, 3: 4, math.inf: 5}}


def test_torch_gets_paths_in_its_own_form() -> None:
    planner = DefaultSavePlanner()
    planner.set_up_planner({"a": {1: 2}}, is_coordinator=True)
    _, described = planner.create_global_plan([planner.create_local_plan()])
    paths = described.planner_data
    assert (type(paths), type(paths["a.1"]), paths) == (dict, tuple, {"a.1": ("a", "1")})


def of_ranks(*states: dict[Any, Any]) -> tuple[dict[str, Any], dict[str, ObjectPath]]:
    flat = [flattened(state) for state in states]
    items = {fqn: item for one in flat for fqn, item in one.items.items()}
    return {fqn: items[fqn] for fqn in sorted(items)}, recorded_paths([f.paths for f in flat])


def test_the_items_of_all_ranks_make_one_state() -> None:
    first = {"a": {}, "b": {0: 1, "x": 2}, "c": [], "d": {2: 1}}
    second = {"a": {"y": [{}]}, "b": {5: 1}, "c": [{}, {"z": 1}], "d": {"text": 1}}
    assert nested_state(*of_ranks(first, second)) == {
        "a": {"y": [{}]},
        "b": {0: 1, "x": 2, 5: 1},
        "c": [{}, {"z": 1}],
        "d": {2: 1, "text": 1},
    }


def test_one_name_at_two_paths_on_two_ranks_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"'a.b' in different places"):
        of_ranks({"a": {"b": 1}}, {"a.b": 1})


def test_a_joined_path_keeps_the_marks_of_both() -> None:
    found = flattened({"x": {1: OrderedDict(b=1, a=2)}})
    path = joined_path(StatePath(("o", "x"), "S1v"), found.paths.recorded("x.1.b"))
    assert (path, path.marks) == (("o", "x", "1", "b"), "S1vvS")
    assert joined_path(("x",), StatePath(("x",))) == ("x",)


def test_the_parameter_numbers_of_an_optimizer_are_restored() -> None:
    """Of a version that recorded no types of keys."""
    state: dict[str, Any] = {
        "optim": {
            "state": {0: {"step": torch.tensor(1.0)}, 2: {"step": torch.tensor(2.0)}},
            "param_groups": [{"lr": 0.1, "params": [0, 1]}, {"lr": 0.2, "params": [2]}],
        }
    }
    found = nested_state(*flatten_state_dict(state))
    assert list(found["optim"]["state"]) == [0, 2]
    assert found["optim"]["param_groups"] == state["optim"]["param_groups"]


def test_the_parameter_names_of_an_optimizer_stay_text() -> None:
    state = {"state": {"0": {"m": 1}}, "param_groups": [{"params": ["0"]}]}
    assert nested_state(*flatten_state_dict(state)) == state
    state = {"state": {"0": {"m": 1}}, "param_groups": [{"params": [0]}]}
    assert back(state) == state


def test_the_missing_state_of_an_optimizer_is_an_empty_dict() -> None:
    """So that load_state_dict takes it: torch forgets what is empty."""
    state: dict[str, Any] = {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    assert nested_state(*flatten_state_dict(state)) == state
    assert back({"param_groups": state["param_groups"]}) == {"param_groups": state["param_groups"]}


def test_missing_items_of_a_list_are_none() -> None:
    assert nested_state({"a.2": 5}, {"a.2": ("a", 2)}) == {"a": [None, None, 5]}


@pytest.mark.parametrize("place", [10**12, -1, -(10**12)])
def test_a_hostile_list_is_refused(place: int) -> None:
    with pytest.raises(CorruptionError, match=rf"'a' .*{place}"):
        nested_state({"x": 1}, {"x": ("a", place)})


@pytest.mark.parametrize(
    "paths",
    [
        {"x": ("a",), "y": ("a", "b")},
        {"x": ("a", "b"), "y": ("a",)},
        {"x": ("a",), "y": ("a",)},
        {"x": (), "y": ()},
        {"y": ("a",) * 5000, "x": ("b",)},
    ],
)
def test_paths_that_contradict_each_other_are_refused(
    paths: dict[str, tuple[str | int, ...]],
) -> None:
    with pytest.raises(CorruptionError, match=r"'[xy]'"):
        nested_state({"x": 1, "y": 2}, paths)


@pytest.mark.parametrize(
    ("parts", "marks"),
    [
        (("a",), ".."),
        (("a",), "?"),
        (("a",), "v"),
        (("(" * 5000,), "v"),
        (("9" * 5000,), "v"),
        (("01",), "v"),
        (("1_0",), "v"),
        (("[1]",), "v"),
        (("__import__('os')",), "v"),
        (("a",), f".{'9' * 50}"),
    ],
)
def test_hostile_marks_are_refused(parts: ObjectPath, marks: str) -> None:
    with pytest.raises(CorruptionError):
        nested_state({"x": 1}, {"x": StatePath(parts, marks)})


def test_two_equal_keys_are_refused() -> None:
    paths: dict[str, ObjectPath] = {
        "x": StatePath(("1",), "v"),
        "y": StatePath(("True",), "v"),
    }
    with pytest.raises(CorruptionError, match="are equal"):
        nested_state({"x": 1, "y": 2}, paths)


def test_paths_of_a_rank_survive_pickling() -> None:
    paths = flattened({"a": {1: OrderedDict(b=2)}, "c": {"d": {2: 3, "e": 4}}}).paths
    again = pickle.loads(pickle.dumps(paths))
    assert isinstance(again, FlatPaths)
    assert (again, again.marks) == (paths, paths.marks)
