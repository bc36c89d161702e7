"""The walk through a nested state and the copy of one: paths, order, what is entered, no end."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch

from dcpstore import InvalidInputError
from dcpstore.state.walk import PLAIN, SCALARS, is_container, is_data, map_leaves, walk
from tests.state.test_containers import ALL, DATACLASSES, Data, Pair


def test_leaves_have_the_order_and_the_keys_of_the_state() -> None:
    state = {"b": [1, {}, (2, {3: "x"})], "a": Pair(None), None: torch.Size([1])}
    assert list(walk(state)) == [
        (("b", 0), 1),
        (("b", 2, 0), 2),
        (("b", 2, 1, 3), "x"),
        (("a", 0), None),
        (("a", 1), 1),
        ((None,), torch.Size([1])),
    ]
    assert list(walk({})) == []
    assert list(walk(5)) == [((), 5)]


def test_leaves_of_skipped_types_are_left_out_by_exact_type() -> None:
    tensor, parameter, text = (
        torch.ones(1),
        torch.nn.Parameter(torch.ones(1)),
        type("T", (str,), {}),
    )
    state = [1, tensor, parameter, text("x"), {1, 2}]
    assert [path for path, _ in walk(state, skips=PLAIN)] == [(3,), (4,)]
    assert [path for path, _ in walk(state, skips=SCALARS)] == [(1,), (2,), (3,), (4,)]
    assert list(walk(5, skips=SCALARS)) == []


@pytest.mark.parametrize(("kind", "make"), [(kind, make) for kind, (make, _) in ALL.items()])
def test_a_dataclass_is_entered_only_on_request(kind: str, make: Any) -> None:
    leaf = object()
    made = make(leaf)
    assert is_container(made) == (kind not in DATACLASSES)
    entered = [value for _, value in walk(made, enters=lambda v: is_container(v) or is_data(v))]
    assert entered[0] is leaf
    assert not is_data(type(made))


def test_containers_are_copied_only_if_a_leaf_changed() -> None:
    state: dict[str, Any] = {
        "same": {"x": [1.5]},
        "list": [1, [2.5]],
        "pair": Pair(2, 3),
        "ordered": OrderedDict(b=1, a="t"),
    }
    found = map_leaves(state, lambda path, value: -value if type(value) is int else value)
    assert found == {
        "same": {"x": [1.5]},
        "list": [-1, [2.5]],
        "pair": (-2, -3),
        "ordered": OrderedDict(b=-1, a="t"),
    }
    assert found["same"] is state["same"]
    assert found["list"][1] is state["list"][1]
    assert (type(found["pair"]), type(found["ordered"])) == (tuple, OrderedDict)
    assert map_leaves(state, lambda path, value: value) is state
    assert map_leaves((1,), lambda path, value: 2, tuples=list) == [2]


def test_the_change_is_called_with_each_leaf_and_its_path() -> None:
    asked: list[Any] = []

    def change(path: tuple[Any, ...], value: Any) -> Any:
        asked.append((path, value))
        return value

    data = Data(1)
    map_leaves({"a": [1, "b"], "c": (data,)}, change, skips=frozenset([int]), path=("top",))
    assert asked == [(("top", "a", 1), "b"), (("top", "c", 0), data)]


def test_a_state_that_contains_itself_is_refused_by_every_walk() -> None:
    state: dict[str, Any] = {"a": [1]}
    state["a"] += [state, state]
    with pytest.raises(InvalidInputError, match="contains itself"):
        list(walk(state))
    with pytest.raises(InvalidInputError, match="contains itself"):
        map_leaves(state, lambda path, value: value)
