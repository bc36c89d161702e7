"""`PerRank` values: as entries of one rank, and restored without replacing a container."""

from collections import namedtuple
from typing import Any

import torch

from dcpstore.state.per_rank import PerRank, give_own, own_names, with_own

Pair = namedtuple("Pair", "first second")


def state(value: Any = 1) -> dict[str, Any]:
    return {"rng": PerRank(value), "deep": [{"x": 2}, {"rng": PerRank(value)}], "plain": 3}


def test_the_names_of_per_rank_values_are_those_of_one_rank() -> None:
    assert own_names(state(), rank=3) == ["rng.rank-3", "deep.1.rng.rank-3"]
    assert own_names({"plain": [1, {"x": torch.ones(2)}]}, rank=0) == []


def test_each_per_rank_value_becomes_a_dict_and_the_rest_stays() -> None:
    given = state()
    plain = with_own(given, 2)
    assert plain == {
        "rng": {"rank-2": 1},
        "deep": [{"x": 2}, {"rng": {"rank-2": 1}}],
        "plain": 3,
    }
    assert plain["deep"][0] is given["deep"][0]
    assert isinstance(given["rng"], PerRank)


def test_a_tuple_with_a_per_rank_value_becomes_a_list() -> None:
    assert with_own({"a": (PerRank(1), 2)}, 0) == {"a": [{"rank-0": 1}, 2]}
    untouched = (1, 2)
    assert with_own({"a": untouched}, 0)["a"] is untouched


def test_loaded_values_are_set_in_the_objects_of_the_owner() -> None:
    owner = state()
    first, inner, deep = owner["rng"], owner["deep"][1]["rng"], owner["deep"]
    filled = {"rng": {"rank-1": 8}, "deep": [{"x": 9}, {"rng": {"rank-1": 7}}], "plain": 4}
    assert give_own(owner, filled, 1) is owner
    assert (first.value, inner.value, owner["plain"]) == (8, 7, 4)
    assert owner["deep"] is deep
    assert owner["deep"][0] == {"x": 9}


def test_a_new_tuple_is_made_only_if_an_item_changed() -> None:
    mine = PerRank(1)
    same = (mine, 2)
    assert give_own(same, [{"rank-0": 5}, 2], 0) is same
    assert mine.value == 5
    pair = give_own(Pair(mine, 2), [{"rank-0": 6}, 3], 0)
    assert (type(pair), pair.first, pair.second) == (Pair, mine, 3)


def test_an_object_with_a_state_of_its_own_stays() -> None:
    module = torch.nn.Linear(1, 1)
    owner = {"model": module, "step": 1}
    given = give_own(
        owner,
        {"model": {"weight": torch.ones(1, 1)}, "step": 2},
        0,
        is_owner=lambda value: isinstance(value, torch.nn.Module),
    )
    assert given is owner
    assert owner == {"model": module, "step": 2}
