"""Optimizers to load into: a target for all that a version holds, or the reason why not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Shard

from dcpstore.errors import InvalidInputError
from dcpstore.formats.composition import Entry, fold_entries
from dcpstore.state.load_options import LoadOptions
from dcpstore.state.optimizers import (
    is_by_number,
    lists_parameters,
    optional_names,
    prepare_optimizer,
)
from dcpstore.state.tree import flattened
from tests.state.entries import entries_of
from tests.state.fake_ranks import as_rank, cpu_mesh

Make = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]
MAKERS: dict[str, Make] = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "SGD momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "Adam": torch.optim.Adam,
    "AdamW amsgrad": lambda ps: torch.optim.AdamW(ps, amsgrad=True),
    "Adagrad": torch.optim.Adagrad,
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, momentum=0.9, centered=True),
    "NAdam": torch.optim.NAdam,
    "Adadelta": torch.optim.Adadelta,
    "Rprop": torch.optim.Rprop,
    "ASGD": torch.optim.ASGD,
    "LBFGS": torch.optim.LBFGS,
}
SHAPES = [(), (0, 3), (4,), (2, 3)]


def parameters(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32
) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]


def stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer after one step with a gradient for each parameter."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step(lambda: 1.0)
    return optimizer


def version_of(optimizer: torch.optim.Optimizer, key: str = "optim") -> list[Entry]:
    return fold_entries(entries_of({key: optimizer.state_dict()}))


def prepared(
    optimizer: torch.optim.Optimizer,
    entries: Sequence[Entry],
    *,
    dry_run: bool = False,
    **options: Any,
) -> tuple[dict[str, Any], list[str]]:
    """Return the plain state with its targets, and the differences."""
    state = optimizer.state_dict()
    found = prepare_optimizer(
        optimizer, ("optim",), state, entries, LoadOptions(**options), dry_run=dry_run
    )
    return state, found


def tensors_in(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    items = flattened(state).items
    return {fqn: item for fqn, item in items.items() if isinstance(item, torch.Tensor)}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_new_optimizer_gets_a_target_for_each_stored_tensor(
    make: Make, dtype: torch.dtype
) -> None:
    saved = stepped(make(parameters(dtype=dtype)))
    state, differences = prepared(make(parameters(dtype=dtype)), version_of(saved))
    assert differences == []
    expected, found = tensors_in(saved.state_dict()), tensors_in(state)
    assert list(found) == list(expected)
    for fqn, target in found.items():
        assert (target.shape, target.dtype) == (expected[fqn].shape, expected[fqn].dtype)
        assert not target.is_meta
    assert flattened(state).items.keys() == flattened(saved.state_dict()).items.keys()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_in_a_dry_run_no_target_has_memory(make: Make) -> None:
    entries = version_of(stepped(make(parameters())))
    optimizer = make(parameters())
    own = tensors_in(optimizer.state_dict())  # Adagrad has its state from the beginning
    state, differences = prepared(optimizer, entries, dry_run=True)
    assert differences == []
    assert all(t.is_meta or t is own.get(fqn) for fqn, t in tensors_in(state).items())


def test_tensors_that_the_optimizer_has_keep_their_memory() -> None:
    optimizer = stepped(torch.optim.Adam(parameters()))
    before = tensors_in(optimizer.state_dict())
    state, differences = prepared(optimizer, version_of(optimizer))
    assert differences == []
    after = tensors_in(state)
    assert len(after) == 3 * len(SHAPES)
    assert all(after[fqn] is tensor for fqn, tensor in before.items())


def test_a_parameter_that_was_frozen_until_now_gets_targets_of_its_own() -> None:
    saved = stepped(torch.optim.Adam(parameters([(2,), (3,)])))
    optimizer = torch.optim.Adam(parameters([(2,), (3,)]))
    first = optimizer.param_groups[0]["params"][0]
    first.grad = torch.ones_like(first)
    optimizer.step()
    state, differences = prepared(optimizer, version_of(saved))
    assert differences == []
    assert list(state["state"]) == [0, 1]
    assert state["state"][0]["exp_avg"] is optimizer.state[first]["exp_avg"]
    assert state["state"][1]["exp_avg"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_moment_is_split_over_the_ranks_as_its_parameter(*, dry_run: bool) -> None:
    entries = version_of(stepped(torch.optim.Adam(parameters([(6, 2)]))))
    with as_rank(1, 2):
        local = DTensor.from_local(torch.ones(3, 2), cpu_mesh(), [Shard(0)], run_check=False)
        optimizer = torch.optim.Adam([torch.nn.Parameter(local)])
        state, differences = prepared(optimizer, entries, dry_run=dry_run)
        moment, step = state["state"][0]["exp_avg"], state["state"][0]["step"]
        assert differences == []
        assert isinstance(moment, DTensor)
        assert (tuple(moment.shape), tuple(moment._local_tensor.shape)) == ((6, 2), (3, 2))
        assert moment.placements == local.placements
        assert moment._local_tensor.is_meta == dry_run
        assert not isinstance(step, DTensor)


def test_parameters_on_the_meta_device_are_refused() -> None:
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2, device="meta"))])
    with pytest.raises(InvalidInputError, match=r"parameters of optimizer 'optim' .* meta device"):
        prepared(optimizer, [])


class Foreign(torch.optim.Optimizer):
    """Keeps a state of its own form for each parameter."""

    def __init__(self, params: Iterable[torch.nn.Parameter], state: Any = None) -> None:
        super().__init__(params, {"lr": 0.1})
        for parameter in self.param_groups[0]["params"] if state is not None else ():
            self.state[parameter] = state

    def step(self, closure: Any = None) -> None:
        raise AssertionError("no step is taken here")


def nested() -> dict[str, Any]:
    return {
        "factors": [torch.ones(2, 2), torch.ones(3)],
        "deep": {"count": 7, "pair": (torch.ones(1, dtype=torch.int8), "kept")},
        5: {"of": torch.ones(2)},
        "note": "text",
    }


def test_nested_state_of_a_foreign_optimizer_gets_targets_at_any_depth() -> None:
    entries = version_of(Foreign(parameters([(2,), (2,)]), nested()))
    state, differences = prepared(Foreign(parameters([(2,), (2,)])), entries)
    assert differences == []
    for i in range(2):
        mine = state["state"][i]
        assert [tuple(factor.shape) for factor in mine["factors"]] == [(2, 2), (3,)]
        assert (type(mine["deep"]["pair"]), mine["deep"]["pair"][0].dtype) == (tuple, torch.int8)
        assert mine["deep"]["count"] is None  # the load sets values
        assert tuple(mine[5]["of"].shape) == (2,)
        assert mine["note"] is None


def test_what_a_foreign_optimizer_has_stays_beside_what_it_lacks() -> None:
    entries = version_of(Foreign(parameters([(2,)]), nested()))
    own = {"deep": {"count": 1, "extra": 2}, "factors": [torch.zeros(2, 2)]}
    optimizer = Foreign(parameters([(2,)]), own)
    state, differences = prepared(optimizer, entries)
    assert differences == []
    mine = state["state"][0]
    assert mine["factors"][0] is own["factors"][0]
    assert len(mine["factors"]) == 2
    assert (mine["deep"]["count"], mine["deep"]["extra"]) == (1, 2)
    assert own["deep"].keys() == {"count", "extra"}


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc], ids=str)
@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_a_composed_state_gets_a_composed_target(layout: torch.layout, *, dry_run: bool) -> None:
    moment = torch.eye(3).to_sparse(layout=layout)
    entries = version_of(Foreign(parameters([(3, 3)]), {"m": moment}))
    state, differences = prepared(Foreign(parameters([(3, 3)])), entries, dry_run=dry_run)
    assert differences == []
    made = state["state"][0]["m"]
    assert (made.layout, tuple(made.shape)) == (layout, (3, 3))
    assert made.to_dense().count_nonzero() == 0


def test_options_of_a_group_that_are_tensors_get_targets() -> None:
    saved = torch.optim.Adam(parameters([(2,)]), lr=torch.tensor(0.5))
    saved.param_groups[0]["initial_lr"] = torch.tensor(0.25)
    optimizer = torch.optim.Adam(parameters([(2,)]), lr=torch.tensor(0.1))
    own = optimizer.param_groups[0]["lr"]
    state, differences = prepared(optimizer, version_of(saved))
    assert differences == []
    assert state["param_groups"][0]["lr"] is own
    assert state["param_groups"][0]["initial_lr"].item() == 0
    assert state["param_groups"][0]["params"] == [0]


def test_a_state_by_name_is_refused_with_the_function_that_reads_it() -> None:
    by_name = {"state": {"a.weight": {"step": torch.tensor(1.0)}}, "param_groups": []}
    entries = fold_entries(entries_of({"optim": by_name}))
    _, (difference,) = prepared(torch.optim.Adam(parameters()), entries)
    assert "by name ('a.weight')" in difference
    assert "get_optimizer_state_dict(model, optimizer)" in difference


def test_a_flattened_state_by_name_is_refused_with_its_option() -> None:
    flat = {"state.a.weight.step": torch.tensor(1.0), "param_groups.a.weight.lr": 0.1}
    entries = fold_entries(entries_of({"optim": flat}))
    _, (difference,) = prepared(torch.optim.Adam(parameters()), entries)
    assert "flatten_optimizer_state_dict=True" in difference
    assert prepared(torch.optim.Adam(parameters()), entries, exclude=["optim.*"])[1] == []


def test_state_of_more_parameters_than_the_optimizer_has_is_not_dropped_silently() -> None:
    entries = version_of(stepped(torch.optim.Adam(parameters([(2,), (2,), (2,)]))))
    optimizer = torch.optim.Adam(parameters([(2,)]))
    state, differences = prepared(optimizer, entries)
    assert any("state of parameter 1, 2, which would be lost" in text for text in differences)
    assert state["state"] == {}
    exclude = ["optim.state.[12].*", "optim.param_groups.*"]
    state, differences = prepared(optimizer, entries, exclude=exclude)
    assert differences == []
    assert list(state["state"]) == [0]


def test_more_groups_than_the_optimizer_has_are_refused() -> None:
    groups = [{"params": parameters([(2,)])}, {"params": parameters([(2,)])}]
    entries = version_of(torch.optim.SGD(groups))
    _, (difference,) = prepared(torch.optim.SGD(parameters([(2,)])), entries)
    assert "has 1 parameter groups, and the version 2" in difference


def test_a_group_with_another_number_of_parameters_is_refused() -> None:
    entries = version_of(torch.optim.SGD(parameters([(2,), (2,)])))
    optimizer = torch.optim.SGD(parameters([(2,)]))
    _, (difference,) = prepared(optimizer, entries)
    assert difference.startswith("group 0 of optimizer 'optim' has 2 parameters in the version")
    assert prepared(optimizer, entries, exclude=["*.params"])[1] == []


def test_a_moment_of_another_shape_is_refused_by_its_fqn() -> None:
    entries = version_of(stepped(torch.optim.Adam(parameters([(2, 3)]))))
    _, differences = prepared(torch.optim.Adam(parameters([(3, 2)])), entries)
    assert [text.partition(" has shape ")[0] for text in differences] == [
        "'optim.state.0.exp_avg'",
        "'optim.state.0.exp_avg_sq'",
    ]


def test_shapes_are_not_checked_where_hooks_or_a_foreign_class_may_change_them() -> None:
    entries = version_of(stepped(torch.optim.Adam(parameters([(2, 3)]))))
    hooked = torch.optim.Adam(parameters([(3, 2)]))
    hooked.register_load_state_dict_pre_hook(lambda _, state: state)
    own = type("Own", (torch.optim.Adam,), {})(parameters([(3, 2)]))
    for optimizer in (hooked, own):
        state, differences = prepared(optimizer, entries)
        assert differences == []
        assert tuple(state["state"][0]["exp_avg"].shape) == (2, 3)


def test_a_part_of_the_state_of_a_parameter_is_refused() -> None:
    entries = version_of(stepped(torch.optim.Adam(parameters([(2,)]))))
    exclude = ["*.exp_avg_sq"]
    _, (difference,) = prepared(torch.optim.Adam(parameters([(2,)])), entries, exclude=exclude)
    assert "only a part of it, without 'optim.state.0.exp_avg_sq'" in difference
    own = stepped(torch.optim.Adam(parameters([(2,)])))
    assert prepared(own, entries, exclude=exclude)[1] == []


def test_a_part_of_a_list_is_refused() -> None:
    state = {"m": [torch.ones(1), torch.ones(1)]}
    entries = version_of(Foreign(parameters([(1,)]), state))
    optimizer = Foreign(parameters([(1,)]), {"m": []})
    _, (difference,) = prepared(optimizer, entries, exclude=["*.m.0"])
    assert "some items are asked for, and others not; include all of it" in difference
    assert prepared(optimizer, entries, exclude=["*.m.1"])[1] == []


RENAMES: dict[str, Any] = {
    "function": lambda fqn: fqn.replace("optim.", "old.", 1),
    "table": {
        f"optim.state.0.{name}": f"old.state.0.{name}" for name in ("step", "exp_avg", "exp_avg_sq")
    },
}
RENAMES["function that knows few names"] = RENAMES["table"].__getitem__


@pytest.mark.parametrize("rename", RENAMES.values(), ids=RENAMES)
def test_state_is_found_under_another_name(rename: Any) -> None:
    entries = version_of(stepped(torch.optim.Adam(parameters([(2,)]))), key="old")
    state, differences = prepared(torch.optim.Adam(parameters([(2,)])), entries, rename=rename)
    assert differences == []
    assert tensors_in(state).keys() == {
        f"state.0.{name}" for name in ("step", "exp_avg", "exp_avg_sq")
    }
    assert prepared(torch.optim.Adam(parameters([(2,)])), entries)[0]["state"] == {}


def test_a_version_without_this_optimizer_changes_nothing() -> None:
    entries = version_of(stepped(torch.optim.Adam(parameters())), key="another")
    optimizer = stepped(torch.optim.Adam(parameters()))
    before = tensors_in(optimizer.state_dict())
    state, differences = prepared(optimizer, entries)
    assert differences == []
    assert all(state is before[fqn] for fqn, state in tensors_in(state).items())


def test_an_optimizer_may_lack_state_and_what_others_add_to_its_groups() -> None:
    optimizer = torch.optim.SGD(parameters())
    assert optional_names(optimizer, ("a", 0)) == ["a.0.state"]
    optimizer.param_groups[0]["initial_lr"] = 0.1
    assert optional_names(optimizer, ("optim",)) == [
        "optim.state",
        "optim.param_groups.0.initial_lr",
    ]


@pytest.mark.parametrize(
    ("own", "is_one"),
    [
        ({"state": {}, "param_groups": []}, True),
        ({"state": {}, "param_groups": [], "more": 1}, True),
        ({"state.w.step": 1}, False),
        ([], False),
        (None, False),
    ],
)
def test_an_optimizer_is_known_by_its_state(own: Any, *, is_one: bool) -> None:
    assert is_by_number(torch.optim.SGD(parameters()), own) == is_one
    assert not is_by_number(torch.nn.Linear(1, 1), own)


@pytest.mark.parametrize(
    ("fqn", "value", "is_list"),
    [
        ("optim.param_groups.0.params", ["a", "b"], True),
        ("param_groups.12.params", [], True),
        ("optim.param_groups.0.params", [0, 1], False),
        ("optim.param_groups.0.params", "ab", False),
        ("optim.param_groups.0.lr", ["a"], False),
        ("optim.my_param_groups.0.params", ["a"], False),
        ("optim.param_groups.x.params", ["a"], False),
    ],
)
def test_the_parameters_of_a_group_are_known_by_their_place(
    fqn: str, value: object, *, is_list: bool
) -> None:
    assert lists_parameters(fqn, value) == is_list
