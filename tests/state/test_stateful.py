"""Owners of a state: called in the same order on every rank, at any depth."""

from collections import UserDict
from types import MappingProxyType
from typing import Any

import pytest
import torch

from dcpstore.errors import InvalidInputError
from dcpstore.state.per_rank import PerRank
from dcpstore.state.stateful import check_fillable, check_keys, common_growth, take_state


class Counter:
    """An owner that adds its name to a list whenever its `state_dict()` is called."""

    def __init__(self, name: str, asked: list[str]) -> None:
        self.name, self.asked = name, asked

    def state_dict(self) -> dict[str, Any]:
        self.asked.append(self.name)
        return {"name": self.name, "rng": PerRank(len(self.asked))}

    def load_state_dict(self, given: dict[str, Any]) -> None:
        raise AssertionError("nothing is loaded here")


def test_owners_are_called_in_the_order_of_their_paths_not_of_the_dict() -> None:
    asked: list[str] = []
    state = {
        "z": Counter("z", asked),
        "a": {"y": Counter("a.y", asked), "b": [1, Counter("a.b.1", asked)]},
    }
    taken = take_state(state, sorted(state), rank=0)
    assert asked == ["a.b.1", "a.y", "z"]
    assert taken["a"]["b"][1] == {"name": "a.b.1", "rng": {"rank-0": 1}}


def test_keys_that_only_other_ranks_have_are_skipped() -> None:
    assert take_state({"mine": 1}, ["mine", "theirs"], rank=0) == {"mine": 1}


def test_a_container_without_an_owner_is_not_copied() -> None:
    inner = {"x": [torch.ones(2)]}
    assert take_state({"inner": inner}, ["inner"], rank=0)["inner"] is inner


def test_a_class_with_a_state_dict_is_not_an_owner() -> None:
    state = {"kind": Counter}
    assert take_state(state, ["kind"], rank=0) == state


@pytest.mark.parametrize("state", [[1], None, torch.ones(1)])
def test_a_state_is_a_mapping(state: Any) -> None:
    with pytest.raises(InvalidInputError, match="pass a dict"):
        check_keys(state)


def test_the_keys_of_a_state_are_text() -> None:
    assert check_keys({"b": 1, "a": 2}) == ("a", "b")
    with pytest.raises(InvalidInputError, match="3 is not; rename it"):
        check_keys({"a": 1, 3: 2})


def test_a_state_to_load_into_can_be_changed() -> None:
    assert check_fillable(UserDict(a=1)) == ("a",)
    with pytest.raises(InvalidInputError, match="is immutable; pass a dict"):
        check_fillable(MappingProxyType({"a": 1}))


def test_what_one_rank_names_is_not_added_on_any_rank() -> None:
    ranks = [
        {"optim": frozenset({"optim.a", "optim.b"}), "other": frozenset({"other.x"})},
        {"optim": frozenset({"optim.b", "optim.c"})},
    ]
    assert common_growth(ranks) == {"optim": {"optim.b"}, "other": {"other.x"}}
