"""Containers of a state to load into: the caller's own stay, and tuples keep their class."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import dcpstore
from dcpstore import MismatchError


class Pair(NamedTuple):
    tensor: torch.Tensor
    value: Any


@dataclass(frozen=True)
class Moments:
    mean: torch.Tensor
    count: int


def test_empty_containers_stay_the_callers_own(tmp_path: Path) -> None:
    dcpstore.save({"a": {}, "b": [], "c": OrderedDict(), "d": [{}]}, tmp_path)
    state: dict[str, Any] = {"a": {}, "b": [], "c": OrderedDict(), "d": [{}]}
    held = dict(state), state["d"][0]
    report = dcpstore.load(state, tmp_path)
    assert (report.missing, report.unexpected) == ((), ())
    assert all(state[key] is own for key, own in held[0].items())
    assert state["d"][0] is held[1]


def test_an_empty_template_ignores_what_it_does_not_ask_for(tmp_path: Path) -> None:
    dcpstore.save({"a": {"x": 1}, "b": [torch.ones(1)], "c": 5}, tmp_path)
    state: dict[str, Any] = {"a": {}, "b": [], "c": {}, "none": {}}
    report = dcpstore.load(state, tmp_path)
    assert report.unexpected == ("a.x", "b.0")
    assert state == {"a": {}, "b": [], "c": 5, "none": {}}


def test_items_of_a_container_that_was_empty_are_missing(tmp_path: Path) -> None:
    dcpstore.save({"a": {}, "b": []}, tmp_path)
    with pytest.raises(MismatchError) as caught:
        dcpstore.load({"a": {"x": 1}, "b": [torch.ones(1)]}, tmp_path)
    assert ["'a.x'" in caught.value.differences[0], "'b.0'" in caught.value.differences[1]] == [
        True,
        True,
    ]


def test_tuples_and_dataclasses_keep_their_class(tmp_path: Path) -> None:
    saved = {
        "t": (torch.ones(2), 1, {3: (torch.full((), 2.0), "a")}),
        "p": Pair(torch.ones(2), [1]),
        "m": [Moments(torch.ones(2), 7)],
    }
    dcpstore.save(saved, tmp_path)
    tensor = torch.zeros(2)
    state: dict[str, Any] = {
        "t": (tensor, 0, {3: (torch.zeros(()), "")}),
        "p": Pair(torch.zeros(2), None),
        "m": [Moments(torch.zeros(2), 0)],
    }
    dcpstore.load(state, tmp_path)
    assert state["t"][0] is tensor
    assert (tensor.tolist(), state["t"][1]) == ([1, 1], 1)
    assert (float(state["t"][2][3][0]), state["t"][2][3][1]) == (2.0, "a")
    assert (type(state["p"]), state["p"].tensor.tolist(), state["p"].value) == (Pair, [1, 1], [1])
    (moments,) = state["m"]
    assert (type(moments), moments.mean.tolist(), moments.count) == (Moments, [1, 1], 7)
