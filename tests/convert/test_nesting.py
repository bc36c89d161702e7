"""Flat entries become the nested state that they came from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpstore import InvalidInputError
from dcpstore.convert.importing import flattened
from dcpstore.convert.nesting import nested_state

keys = st.text("ab01._", min_size=1, max_size=3)
# Lists of plain values alone stay values; DCP opens those that hold dicts or tensors. What is empty
# is forgotten, so no container here is.
leaves = st.one_of(st.integers(), st.text(max_size=3), st.lists(st.integers(), max_size=3))
states = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.dictionaries(keys, inner, min_size=1, max_size=3),
        st.lists(st.dictionaries(keys, inner, min_size=1, max_size=3), min_size=1, max_size=3),
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.dictionaries(keys, states, min_size=1, max_size=4))
def test_a_state_comes_back(state: dict[str, Any]) -> None:
    try:
        flat, paths = flattened(state)
    except InvalidInputError:  # two keys with dots flatten alike
        return
    assert nested_state(flat, paths) == state


def test_an_optimizer_has_its_numbers_again() -> None:
    state: dict[str, Any] = {
        "optim": {
            "state": {0: {"step": torch.tensor(1.0)}, 2: {"step": torch.tensor(2.0)}},
            "param_groups": [{"lr": 0.1, "params": [0, 1]}, {"lr": 0.2, "params": [2]}],
        }
    }
    back = nested_state(*flattened(state))
    assert list(back["optim"]["state"]) == [0, 2]
    assert back["optim"]["param_groups"] == state["optim"]["param_groups"]


def test_an_optimizer_of_names_keeps_them() -> None:
    state = {"state": {"0": {"m": 1}}, "param_groups": [{"params": ["0"]}]}
    assert nested_state(*flattened(state)) == state


def test_an_optimizer_without_state_has_an_empty_one() -> None:
    """So that load_state_dict takes it: DCP forgets what is empty."""
    state: dict[str, Any] = {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    assert nested_state(*flattened(state)) == state


def test_holes_are_none() -> None:
    assert nested_state({"a.2": 5}, {"a.2": ("a", 2)}) == {"a": [None, None, 5]}


@pytest.mark.parametrize("place", [10**12, -1])
def test_a_hostile_list_is_refused(place: int) -> None:
    with pytest.raises(InvalidInputError, match=r"'a'"):
        nested_state({"x": 1}, {"x": ("a", place)})


@pytest.mark.parametrize(
    "paths",
    [{"x": ("a",), "y": ("a", "b")}, {"x": ("a", "b"), "y": ("a",)}, {"x": ("a",), "y": ("a",)}],
)
def test_contradictions_are_refused(paths: dict[str, tuple[str | int, ...]]) -> None:
    with pytest.raises(InvalidInputError, match="'y'"):
        nested_state({"x": 1, "y": 2}, paths)


def test_a_value_that_is_a_dict_is_no_container() -> None:
    with pytest.raises(InvalidInputError, match="'y'"):
        nested_state({"x": {}, "y": 2}, {"x": ("a",), "y": ("a", "b", "c")})
