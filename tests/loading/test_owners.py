"""What the owners of a state get back: modules, `Stateful` objects, containers."""

from __future__ import annotations

import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

import dcpstore
from dcpstore import MismatchError, PerRank, RankFailure
from dcpstore.state_dict import StateDictOptions, get_optimizer_state_dict
from tests.ranks import RankPool


class Holder:
    """An object with a state, which keeps what it gets."""

    def __init__(self, state: dict[str, Any], *, refuses: bool = False) -> None:
        self.state = state
        self._refuses = refuses

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._refuses:
            raise KeyError("mine")
        self.state = state_dict


def load_where_one_refuses(rank: int, folder: Path) -> str:
    try:
        dcpstore.load({"a": Holder({"n": 0}, refuses=rank == 1)}, folder)
    except RankFailure as error:
        return str(error)
    return "loaded"


def test_a_rank_that_refuses_its_state_fails_all(tmp_path: Path, two_ranks: RankPool) -> None:
    dcpstore.save({"a": Holder({"n": 1})}, tmp_path)
    first, second = two_ranks.run(load_where_one_refuses, tmp_path)
    assert first == second
    assert "load_state_dict failed on 1 of the ranks" in first
    assert "rank 1: KeyError: 'mine'" in first


class Tied(torch.nn.Module):
    """Two layers with one weight, and a norm, whose state has a version."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(3, 3, bias=False)
        self.b = torch.nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
        self.norm = torch.nn.BatchNorm1d(3)


def test_tied_weights_on_the_meta_device_stay_tied(tmp_path: Path) -> None:
    model = Tied()
    dcpstore.save({"model": model}, tmp_path)
    state = model.state_dict()
    dcpstore.save({"model": {k: state[k] for k in state if k != "a.weight"}}, tmp_path)
    for ref, options in ((1, {}), (2, {"strict": False})):
        with torch.device("meta"):
            empty = Tied()
        empty.a.weight.requires_grad_(False)
        dcpstore.load({"model": empty}, tmp_path, ref, **options)  # type: ignore[call-overload]
        assert empty.a.weight is empty.b.weight
        assert torch.equal(empty.a.weight, model.a.weight)
        assert not empty.a.weight.requires_grad
        assert int(empty.norm.num_batches_tracked or 0) == 0


def own_in_a_holder(rank: int, folder: Path) -> Any:
    holder = Holder({"rng": PerRank(torch.full((2,), rank)), "n": 1})
    if rank == 0:
        dcpstore.save({"h": holder}, folder / "one", no_dist=True)
    dcpstore.save({"h": holder}, folder / "two")
    found = []
    for name in ("two", "one"):
        other = Holder({"rng": PerRank(torch.full((2,), -1)), "n": 0})
        report = dcpstore.load({"h": other}, folder / name)
        assert isinstance(other.state["rng"], PerRank)
        found.append((other.state["rng"].value.tolist(), other.state["n"], report.missing))
    return found


def test_per_rank_values_of_a_stateful_are_restored_in_the_same_objects(
    tmp_path: Path, two_ranks: RankPool
) -> None:
    first, second = two_ranks.run(own_in_a_holder, tmp_path)
    missing = ("h.rng.rank-1",)
    assert first == [([0, 0], 1, ()), ([0, 0], 1, missing)]
    assert second == [([1, 1], 1, ()), ([-1, -1], 1, missing)]


def test_containers_next_to_a_per_rank_value_stay_the_callers_own(tmp_path: Path) -> None:
    def fill(rng: int, epoch: int) -> dict[str, Any]:
        inner = OrderedDict(rng=PerRank(rng), epoch=epoch, more=[{"own": PerRank(rng)}, epoch])
        return {"t": inner}

    dcpstore.save(fill(1, 3), tmp_path)
    state = fill(0, 0)
    inner = state["t"]
    own, more = inner["rng"], inner["more"]
    dcpstore.load(state, tmp_path)
    assert state["t"] is inner
    assert inner["rng"] is own
    assert inner["more"] is more
    assert (own.value, inner["epoch"], more[0]["own"].value, more[1]) == (1, 3, 1, 3)


# What an owner has now, and what was saved under it: it gets the second, whole.
GROWN: dict[str, tuple[Any, Any]] = {
    "a dict that was empty": ({}, {"x": 1, "y": {"z": 2.5}}),
    "a dict with other keys": ({"x": 0}, {"x": 1, "y": 2}),
    "tensors in a dict that was empty": ({}, {"t": torch.ones(2), "n": None}),
    "None that became a dict": (None, {"a": torch.ones(2), "b": 1}),
    "None that became a tensor": (None, torch.arange(3)),
    "a tensor that became None": (torch.ones(2), None),
    "a value that became a list of tensors": (0, [torch.ones(2), torch.zeros(1)]),
    "a list of tensors that was empty": ([], [torch.ones(2), torch.zeros((), dtype=torch.int8)]),
    "a list of tensors that was shorter": ([torch.zeros(2)], [torch.ones(2), torch.ones(3)]),
    "a list of tensors that was longer": ([torch.zeros(2)] * 3, [torch.ones(2)]),
    "a list of dicts that was empty": ([], [{"a": torch.ones(1)}, {"a": torch.zeros(1)}]),
    "a list of values": ([1], [1, "two", 3.0, None]),
    "a dict with numbers for keys": ({}, {0: torch.ones(1), 7: {"a": (1, 2)}}),
    "a tuple of tensors": (None, (torch.ones(1), torch.zeros(2))),
    "a tuple of tensors that was there": ((torch.zeros(1),), (torch.ones(1),)),
    "an ordered dict": ({}, OrderedDict(b=torch.ones(1), a=2)),
    "an empty dict": ({"x": {}}, {"x": {}, "y": []}),
    "a dict that was filled": ({"x": 1}, {}),
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_an_owner_gets_all_that_was_saved_below_it(
    tmp_path: Path, subtests: pytest.Subtests
) -> None:
    saved = {f"k{i}": after for i, (_, after) in enumerate(GROWN.values())}
    had = {f"k{i}": before for i, (before, _) in enumerate(GROWN.values())}
    dcpstore.save({"deep": [{"owner": Holder(saved)}]}, tmp_path)
    target = Holder(had)
    report = dcpstore.load({"deep": [{"owner": target}]}, tmp_path)
    assert (report.missing, report.unexpected) == ((), ())
    for i, name in enumerate(GROWN):
        with subtests.test(name):
            assert same(target.state[f"k{i}"], saved[f"k{i}"]), target.state[f"k{i}"]


def test_an_owner_does_not_get_what_is_excluded(tmp_path: Path) -> None:
    dcpstore.save({"h": Holder({"a": {"x": 1, "y": 2}, "b": [torch.ones(1)] * 2})}, tmp_path)
    target = Holder({"a": {}, "b": []})
    report = dcpstore.load({"h": target}, tmp_path, exclude=["h.a.y", "h.b.1"])
    assert same(target.state, {"a": {"x": 1}, "b": [torch.ones(1)]})
    assert report.unexpected == ("h.a.y", "h.b.1")
    renamed = Holder({"a": {}, "b": []})
    dcpstore.load({"g": renamed}, tmp_path, rename=lambda fqn: fqn.replace("g.", "h.", 1))
    assert same(renamed.state["a"], {"x": 1, "y": 2})
    before = Holder({"a": {}, "b": []})
    report = dcpstore.load({"h": before}, tmp_path, dry_run=True)
    assert (report.differences, report.unexpected) == ((), ())
    assert before.state == {"a": {}, "b": []}


class Extra(torch.nn.Linear):
    """A layer with an extra state of its own."""

    def __init__(self, extra: Any) -> None:
        super().__init__(2, 2)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


EXTRA: list[tuple[Any, Any]] = [
    ({}, {"amax": torch.ones(3), "recipe": {"margin": 0}}),
    ({"amax": torch.zeros(5)}, {"amax": torch.ones(3)}),
    (torch.zeros(4, dtype=torch.uint8), torch.arange(9, dtype=torch.uint8)),
    (torch.zeros(0, dtype=torch.uint8), torch.arange(9, dtype=torch.uint8)),
    (None, {"a": 1}),
    (1, "one"),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_module_gets_extra_state_of_any_form(tmp_path: Path, device: str) -> None:
    saved = torch.nn.Sequential(*(Extra(after) for _, after in EXTRA), torch.nn.BatchNorm1d(2))
    dcpstore.save({"model": saved}, tmp_path)
    with torch.device(device):
        target = torch.nn.Sequential(*(Extra(before) for before, _ in EXTRA))
        target.append(torch.nn.BatchNorm1d(2))
    report = dcpstore.load({"model": target}, tmp_path)
    assert (report.missing, report.unexpected) == ((), ())
    for layer, (_, after) in zip(target, EXTRA, strict=False):
        assert same(layer.extra, after)
        assert not layer.weight.is_meta


class Casting(Holder):
    """An object that keeps something else than it gets."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = {
            "half": state_dict["half"].half(),
            "scaled": state_dict["scaled"] * 2,
            "shape": state_dict["shape"].reshape(2, 2),
            "kind": float(state_dict["kind"]),
            "rounded": round(state_dict["rounded"], 1),
            "kept": state_dict["kept"],
            "copied": state_dict["copied"].clone(),
            "nan": state_dict["nan"] * 1,
        }


def test_an_error_names_what_an_owner_does_not_keep(tmp_path: Path) -> None:
    def new() -> dict[str, Any]:
        tensors = {name: torch.ones(4) for name in ("half", "scaled", "shape", "kept", "copied")}
        return {**tensors, "kind": 3, "rounded": 1.25, "gone": 1, "nan": float("nan")}

    dcpstore.save({"t": Holder(new())}, tmp_path)
    with pytest.raises(MismatchError) as caught:
        dcpstore.load({"t": Casting(new())}, tmp_path)
    assert {line.split("'")[1] for line in caught.value.differences} == {
        f"t.{name}" for name in ("half", "scaled", "shape", "kind", "rounded", "gone")
    }
    assert "its owners do not hold what was stored" in str(caught.value)
    report = dcpstore.load({"t": Casting(new())}, tmp_path, strict=False)
    assert len(report.differences) == 6


class Clock(Holder):
    """An object whose state is different at each call."""

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.state["n"], "now": time.perf_counter_ns()}


def test_an_item_that_changes_by_itself_is_not_lost(tmp_path: Path) -> None:
    dcpstore.save({"t": Clock({"n": 1})}, tmp_path)
    target = Clock({"n": 0})
    assert dcpstore.load({"t": target}, tmp_path).differences == ()
    assert target.state["n"] == 1


def test_objects_may_be_anywhere_in_lists_and_dicts(tmp_path: Path) -> None:
    def new(value: float) -> dict[str, Any]:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=value, momentum=0.9)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.grad = parameter.fill_(value).clone()
        own = PerRank(torch.full((2,), value))
        inner = {"holder": Holder({"n": value, "rng": own}), "step": value}
        return {"all": [model, {"optim": (optimizer, value), 3: inner}], "last": value}

    saved, target = new(1.0), new(2.0)
    saved["all"][1]["optim"][0].step()
    dcpstore.save(saved, tmp_path)
    objects = (target["all"][0], target["all"][1]["optim"][0], target["all"][1][3]["holder"])
    report = dcpstore.load(target, tmp_path)
    assert (report.missing, report.unexpected) == ((), ())
    model, optimizer, holder = objects
    assert (target["all"][0], target["all"][1]["optim"][0]) == (model, optimizer)
    assert target["all"][1][3]["holder"] is holder
    assert torch.equal(model.weight, saved["all"][0].weight)
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert len(optimizer.state) == 2
    assert (holder.state["n"], target["all"][1][3]["step"], target["last"]) == (1.0, 1.0, 1.0)
    assert target["all"][1]["optim"] == (optimizer, 1.0)
    assert holder.state["rng"].value.tolist() == [1.0, 1.0]


def test_a_mapping_with_its_own_setter_gets_each_loaded_item(tmp_path: Path) -> None:
    class Watched(dict[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            seen.append(key)
            super().__setitem__(key, value)

    seen: list[str] = []
    kept = {"w": torch.ones(2), "d": {"n": 1, "w": torch.ones(2)}, "o": Holder({"n": 1}), "n": 1}
    dcpstore.save(kept, tmp_path)
    inner = {"n": 0, "w": torch.zeros(2)}
    own = Holder({"n": 0})
    state = Watched(w=torch.zeros(2), d=inner, o=own, n=0)
    dcpstore.load(state, tmp_path)
    assert {*seen} == {"w", "d", "n"}  # torch's load sets them too, though they are filled in place
    assert state["d"] is inner
    assert state["o"] is own
    assert (own.state, inner["n"], state["n"]) == ({"n": 1}, 1, 1)


def test_a_mismatch_names_the_next_steps(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    wrapped = torch.nn.ModuleDict({"module": torch.nn.ModuleDict({"_orig_mod": model})})
    dcpstore.save({"model": wrapped}, tmp_path / "wrapped")
    dcpstore.save({"model": model}, tmp_path / "plain")
    dcpstore.save({"model": torch.nn.ModuleDict({"_orig_mod": model})}, tmp_path / "compiled")
    found = {}
    for name, state in (("plain", wrapped), ("compiled", model), ("wrapped", model)):
        with pytest.raises(MismatchError) as caught:
            dcpstore.load({"model": state}, tmp_path / name)
        found[name] = caught.value.differences[-1]
        assert "strict=False leaves what is missing" in str(caught.value)
    assert "such as {'model.module._orig_mod.weight': 'model.weight', ...}" in found["plain"]
    assert found["compiled"].endswith(
        "rename=lambda fqn: fqn.replace('model.', 'model._orig_mod.', 1)"
    )
    assert "such as {'model.weight': 'model.module._orig_mod.weight', ...}" in found["wrapped"]
    with pytest.raises(MismatchError, match="on_dtype='cast' converts it") as caught:
        dcpstore.load({"model": torch.nn.Linear(2, 2).half()}, tmp_path / "plain")
    assert "strict=False" not in str(caught.value)  # it helps only where something is missing
    with pytest.raises(MismatchError, match="has shape") as caught:
        dcpstore.load({"model": torch.nn.Linear(3, 2)}, tmp_path / "plain")
    assert "strict=False" not in str(caught.value)


def test_a_flat_optimizer_state_is_refused_with_the_next_step(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    dcpstore.save({"o": get_optimizer_state_dict(model, optimizer, options=options)}, tmp_path)
    with pytest.raises(MismatchError, match="flatten_optimizer_state_dict=True"):
        dcpstore.load({"o": optimizer}, tmp_path)


def test_overlapping_memory_of_the_state_is_refused(tmp_path: Path) -> None:
    saved = {"x": torch.ones(4), "y": torch.full((4,), 2.0), "same": torch.ones(4), "z": 5}
    dcpstore.save(saved, tmp_path)
    base = torch.zeros(8)
    meta = torch.empty(4, device="meta")
    refused: list[dict[str, Any]] = [
        {"x": base[:4], "y": base[:4]},
        {"x": base[:4], "y": base[2:6]},
        {"x": base[::2], "y": base[:4]},
        {"x": base[:4], "deep": [{"y": base[3:7]}]},
        {"x": meta, "y": meta},
        {"x": base[:4], "same": base[1:5]},
    ]
    for state in refused:
        rename = {"deep.0.y": "y"}
        with pytest.raises(MismatchError, match="share memory in the state"):
            dcpstore.load(state, tmp_path, rename=rename)
        assert not base.any()
    for state in (
        {"x": base[:4], "same": base[:4]},
        {"x": base[:4], "y": base[4:]},
        {"x": base[::2], "y": base[1::2]},
        {"x": base[:4].view(2, 2).t().t().reshape(4), "y": base[4:]},
    ):
        dcpstore.load(state, tmp_path)
        assert all(torch.equal(tensor, saved[name]) for name, tensor in state.items())
