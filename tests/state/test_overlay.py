"""The overlay of a version on an owner's state: targets for all items, and memory that is kept."""

import dataclasses
from collections import OrderedDict
from typing import Any

import pytest
import torch

from dcpstore.formats.composition import Entry
from dcpstore.records import EntryRecord, TensorRecord
from dcpstore.state.overlay import ABSENT, GapError, Leaf, lay_over, new_target, tree_of


def tensor(*shape: int, dtype: str = "float32") -> Leaf:
    record = TensorRecord(1, "0" * 64, dtype, shape, "none", 0, ())
    return Leaf(EntryRecord("fqn", ("fqn",), "tensor", record))


def value(*, is_asked: bool = True) -> Leaf:
    return Leaf(EntryRecord("fqn", ("fqn",), "value", value="1"), is_asked)


def make(entry: Entry) -> torch.Tensor:
    return new_target(entry, dry_run=False)


def test_the_tensor_of_the_owner_keeps_its_memory() -> None:
    own = {"w": torch.ones(2)}
    assert lay_over(own, {"w": tensor(2)}, make) is own


def test_what_the_owner_lacks_gets_a_target_of_the_stored_kind() -> None:
    laid = lay_over({}, {"w": tensor(2, 3, dtype="bfloat16"), "n": value()}, make)
    assert (laid["w"].shape, laid["w"].dtype, laid["n"]) == ((2, 3), torch.bfloat16, None)


def test_what_the_version_lacks_stays_unchanged() -> None:
    own = {"kept": torch.ones(1), "w": torch.ones(2)}
    laid = lay_over(own, {"w": tensor(2), "new": tensor(1)}, make)
    assert list(laid) == ["kept", "w", "new"]
    assert laid["kept"] is own["kept"]
    assert "new" not in own


@pytest.mark.parametrize("replaces", [False, True])
def test_a_tensor_of_another_shape_is_replaced_only_on_request(*, replaces: bool) -> None:
    own = {"w": torch.ones(2)}
    laid = lay_over(own, {"w": tensor(3)}, make, replaces=replaces)
    assert laid["w"].shape == ((3,) if replaces else (2,))


def test_a_list_is_as_long_as_the_stored_one() -> None:
    laid = lay_over([torch.ones(1)], [tensor(1), tensor(1)], make)
    assert len(laid) == 2
    assert len(lay_over([1, 2, 3], [value()], make)) == 1
    assert lay_over((1, 2), [value(), value()], make) == (1, 2)


def test_a_list_with_only_some_of_its_items_is_refused() -> None:
    with pytest.raises(GapError, match="some items"):
        lay_over([], None, make)
    with pytest.raises(GapError, match="some items"):
        lay_over(ABSENT, [value(is_asked=False), value()], make)
    assert lay_over(ABSENT, [value(), value(is_asked=False)], make) == [None]


def test_what_is_not_asked_for_stays_unchanged() -> None:
    assert lay_over(ABSENT, {"n": value(is_asked=False)}, make) is ABSENT
    assert lay_over({"n": 5}, {"n": value(is_asked=False)}, make) == {"n": 5}


def test_keys_that_are_numbers_are_found_by_their_text() -> None:
    own = {0: 5}
    assert lay_over(own, {"0": value()}, make) is own
    assert lay_over({}, {0: value()}, make) == {0: None}


def test_an_ordered_dict_stays_one() -> None:
    laid = lay_over({"a": 1}, OrderedDict(a=value(), b=value()), make)
    assert (type(laid), list(laid)) == (OrderedDict, ["a", "b"])


def test_a_dataclass_is_copied_where_a_field_changes() -> None:
    @dataclasses.dataclass(frozen=True)
    class Group:
        lr: float
        buffer: Any = None

    own = Group(0.1)
    assert lay_over(own, {"lr": value()}, make) is own
    laid = lay_over(own, {"buffer": tensor(2)}, make)
    assert (laid.lr, laid.buffer.shape, own.buffer) == (0.1, (2,), None)


def test_the_targets_of_a_dry_run_have_no_memory() -> None:
    assert new_target(tensor(2).entry, dry_run=True).is_meta


def test_paths_become_the_containers_that_were_saved() -> None:
    leaf = value()
    assert tree_of([(("a", 0), leaf), (("a", 1), leaf), (("b",), leaf)]) == {
        "a": [leaf, leaf],
        "b": leaf,
    }
