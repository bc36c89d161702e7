"""Optimizers that have taken no step yet get the state of those that have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dcpstore
from dcpstore import MismatchError
from dcpstore.state_dict import get_optimizer_state_dict

Job = tuple[torch.nn.Module, torch.optim.Optimizer]


def fresh(kind: Callable[..., torch.optim.Optimizer]) -> Job:
    torch.manual_seed(1)
    model = torch.nn.Linear(3, 2)
    return model, kind(model.parameters(), lr=0.1)


def step(job: Job) -> Job:
    model, optimizer = job

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found: torch.Tensor = (model(torch.arange(6.0).reshape(2, 3)) ** 2).mean()
        found.backward()
        return found

    optimizer.step(loss)  # type: ignore[arg-type]  # torch's stub takes a float
    return job


def assert_same(one: Job, other: Job) -> None:
    """Check that both train in the same way from here on."""
    for (_, a), (_, b) in zip(
        step(one)[0].named_parameters(), step(other)[0].named_parameters(), strict=True
    ):
        assert torch.equal(a, b)


def short_lbfgs(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(*args, **kwargs, max_iter=4)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, short_lbfgs])
def test_state_of_any_depth_is_restored(tmp_path: Path, kind: Any) -> None:
    saved = step(fresh(kind))
    dcpstore.save({"model": saved[0], "optim": saved[1]}, tmp_path)
    new = fresh(kind)
    report = dcpstore.load({"model": new[0], "optim": new[1]}, tmp_path)
    assert (report.missing, report.unexpected) == ((), ())
    found, held = new[1].state_dict()["state"][0], saved[1].state_dict()["state"][0]
    assert {key: type(value) for key, value in found.items()} == {
        key: type(value) for key, value in held.items()
    }
    assert_same(saved, new)


def swapped(fqn: str) -> str:
    """Rename an optimizer, and number its two parameters the other way round."""
    name = fqn.replace("optim.", "optimizer.", 1)
    return name.translate(str.maketrans("01", "10")) if ".state." in name else name


def test_rename_finds_the_state_of_a_new_optimizer(tmp_path: Path) -> None:
    model, optimizer = step(fresh(torch.optim.AdamW))
    dcpstore.save({"optimizer": optimizer}, tmp_path)
    named: dict[str, Callable[[str], str]] = {
        "function": lambda fqn: fqn.replace("optim.", "optimizer.", 1),
        "swapped": swapped,
    }
    other = torch.nn.ParameterList([torch.zeros(2), torch.zeros(2, 3)])
    for how, parameters in (("function", [*model.parameters()]), ("swapped", [*other])):
        new = torch.optim.AdamW(parameters)
        report = dcpstore.load({"optim": new}, tmp_path, rename=named[how])
        assert (report.missing, report.unexpected) == ((), ())
        found, held = new.state_dict()["state"], optimizer.state_dict()["state"]
        for index in (0, 1):
            stored = held[1 - index if how == "swapped" else index]
            assert torch.equal(found[index]["exp_avg"], stored["exp_avg"])


@pytest.mark.parametrize("has_stepped", [False, True])
def test_state_by_name_is_refused_with_the_next_step(tmp_path: Path, has_stepped: bool) -> None:
    model, optimizer = step(fresh(torch.optim.AdamW))
    dcpstore.save({"optim": get_optimizer_state_dict(model, optimizer)}, tmp_path)
    _, other = step(fresh(torch.optim.AdamW)) if has_stepped else fresh(torch.optim.AdamW)
    with pytest.raises(MismatchError, match=r"'bias', 'weight'(.|\n)*set_optimizer_state_dict"):
        dcpstore.load({"optim": other}, tmp_path)
    dcpstore.load({"optim": other}, tmp_path, exclude=["optim.*"])


def test_groups_of_other_sizes_are_refused_before_anything_changes(tmp_path: Path) -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    dcpstore.save({"optim": torch.optim.SGD(parameters), "w": torch.ones(2)}, tmp_path)
    state = {"optim": torch.optim.SGD(parameters[:2]), "w": torch.zeros(2)}
    with pytest.raises(MismatchError, match="group 0 of optimizer 'optim' has 3 parameters"):
        dcpstore.load(state, tmp_path)
    assert torch.equal(state["w"], torch.zeros(2))  # type: ignore[arg-type]


def test_a_part_of_the_state_is_refused_and_no_state_stays_no_state(tmp_path: Path) -> None:
    _, optimizer = step(fresh(torch.optim.AdamW))
    dcpstore.save({"optim": optimizer}, tmp_path)
    _, new = fresh(torch.optim.AdamW)
    with pytest.raises(MismatchError, match=r"without 'optim.state.0.exp_avg_sq'"):
        dcpstore.load({"optim": new}, tmp_path, exclude=["*.exp_avg_sq"])
    dcpstore.load({"optim": new}, tmp_path, exclude=["optim.state.*"])
    assert new.state_dict()["state"] == {}


def test_a_dry_run_allocates_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer = step(fresh(torch.optim.AdamW))
    dcpstore.save({"optim": optimizer}, tmp_path)
    _, new = fresh(torch.optim.AdamW)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("allocated")

    monkeypatch.setattr(torch, "zeros_like", refuse)
    report = dcpstore.load({"optim": new}, tmp_path, dry_run=True)
    assert (report.differences, report.missing, report.unexpected) == ((), (), ())
    assert not new.state_dict()["state"]


# Each of torch's optimizers, with the options with which it has all its possible state.
KINDS: dict[type[torch.optim.Optimizer], list[dict[str, Any]]] = {
    torch.optim.ASGD: [{}],
    torch.optim.Adadelta: [{}],
    torch.optim.Adafactor: [{}],
    torch.optim.Adagrad: [{}],
    torch.optim.Adam: [{"amsgrad": True}],
    torch.optim.AdamW: [{"amsgrad": True}],
    torch.optim.Adamax: [{}],
    torch.optim.LBFGS: [{"max_iter": 4}],
    torch.optim.NAdam: [{}],
    torch.optim.RAdam: [{}],
    torch.optim.RMSprop: [{"centered": True, "momentum": 0.9}],
    torch.optim.Rprop: [{}],
    torch.optim.SGD: [{}, {"momentum": 0.9}],
    torch.optim.SparseAdam: [{}],
}
if hasattr(torch.optim, "Muon"):  # not in torch 2.8
    KINDS[torch.optim.Muon] = [{}]
OF_TORCH = [(kind, options) for kind, several in KINDS.items() for options in several]


def of_shapes(
    kind: Callable[..., torch.optim.Optimizer], *shapes: tuple[int, ...], **options: Any
) -> torch.optim.Optimizer:
    return kind([torch.nn.Parameter(torch.ones(shape)) for shape in shapes], lr=0.1, **options)


def parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    is_sparse = isinstance(optimizer, torch.optim.SparseAdam)
    for parameter in parameters(optimizer):
        grad = torch.full_like(parameter, 0.5)
        parameter.grad = grad.to_sparse() if is_sparse else grad
    optimizer.step(lambda: torch.tensor(1.0))  # type: ignore[arg-type]  # takes a float
    return optimizer


def test_every_optimizer_of_torch_is_known() -> None:
    own = {
        kind
        for kind in vars(torch.optim).values()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    }
    assert own - {torch.optim.Optimizer} == KINDS.keys()


@pytest.mark.parametrize(("kind", "options"), OF_TORCH)
def test_state_of_any_shape_that_torch_makes_is_accepted(
    tmp_path: Path, kind: Any, options: dict[str, Any]
) -> None:
    shapes: list[tuple[int, ...]] = [(3, 4), (5,), (1,), (2, 3, 4), ()]
    if kind is getattr(torch.optim, "Muon", None):  # which takes matrices only
        del shapes[1:]
    saved, new = of_shapes(kind, *shapes, **options), of_shapes(kind, *shapes, **options)
    dcpstore.save({"p": parameters(stepped(saved)), "optim": saved}, tmp_path)
    state = {"p": parameters(new), "optim": new}
    assert dcpstore.load(state, tmp_path, dry_run=True).differences == ()
    dcpstore.load(state, tmp_path)
    for a, b in zip(parameters(stepped(saved)), parameters(stepped(new)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("kind", "options"), OF_TORCH)
def test_moments_of_another_shape_than_the_parameter_are_refused(
    tmp_path: Path, kind: Any, options: dict[str, Any]
) -> None:
    is_flat = kind is torch.optim.Adafactor  # which factors what has two dimensions
    saved = stepped(of_shapes(kind, (1,) if is_flat else (1, 4), **options))
    dcpstore.save({"optim": saved, "w": torch.ones(2)}, tmp_path)
    held = saved.state_dict()["state"].get(0, {})
    moments = {
        name
        for name, value in held.items()
        if isinstance(value, torch.Tensor) and value.dim() and kind is not torch.optim.LBFGS
    }
    shape = (3,) if is_flat else (3, 4)
    new, w = of_shapes(kind, shape, **options), torch.zeros(2)
    before = str(new.state_dict())  # Adagrad's has a state already
    differences = dcpstore.load({"optim": new, "w": w}, tmp_path, dry_run=True).differences
    assert {line.split("'")[1].rsplit(".", 1)[1] for line in differences} == moments
    assert all(f"{shape} in the state" in line for line in differences)
    if moments:
        with pytest.raises(MismatchError, match=r"'optim\.state\.0\.\w+' has shape"):
            dcpstore.load({"optim": new, "w": w}, tmp_path)
        assert str(new.state_dict()) == before
        assert torch.equal(w, torch.zeros(2))
    dcpstore.load({"optim": new, "w": w}, tmp_path, exclude=["optim.state.*"])
    assert torch.equal(w, torch.ones(2))


class Pooled(torch.optim.AdamW):
    """Somebody else's, which keeps what it likes under a name of torch's."""


def test_shapes_that_cannot_be_checked_are_accepted(tmp_path: Path) -> None:
    dcpstore.save({"optim": stepped(of_shapes(torch.optim.AdamW, (1, 4)))}, tmp_path)
    pooled = of_shapes(Pooled, (3, 4))
    dcpstore.load({"optim": pooled}, tmp_path)
    assert pooled.state_dict()["state"][0]["exp_avg"].shape == (1, 4)

    def widen(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        for name in ("exp_avg", "exp_avg_sq"):
            state["state"][0][name] = state["state"][0][name].repeat(3, 1)

    hooked = of_shapes(torch.optim.AdamW, (3, 4))
    hooked.register_load_state_dict_pre_hook(widen)
    dcpstore.load({"optim": hooked}, tmp_path)
    assert hooked.state_dict()["state"][0]["exp_avg"].shape == (3, 4)
    stepped(hooked)
