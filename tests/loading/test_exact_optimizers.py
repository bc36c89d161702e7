"""Every optimizer gets back the bits, dtypes and types that were saved, fresh or stepped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dcpstore
from dcpstore import MismatchError
from tests.loading.test_optimizers import OF_TORCH

DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
    "mixed": (torch.bfloat16, torch.float32),
}


def made(
    kind: Any, dtypes: tuple[torch.dtype, ...], options: dict[str, Any], *, steps: int = 0
) -> torch.optim.Optimizer:
    parameters = [torch.nn.Parameter(torch.ones(3, 2, dtype=dtype)) for dtype in dtypes]
    optimizer: torch.optim.Optimizer = kind(parameters, lr=0.1, **options)
    for i in range(steps):
        for parameter in parameters:
            grad = torch.full_like(parameter, 0.3 + i)
            is_sparse = kind is torch.optim.SparseAdam
            parameter.grad = grad.to_sparse() if is_sparse else grad
        optimizer.step(lambda: torch.tensor(1.0))  # type: ignore[arg-type]  # takes a float
    return optimizer


def scheduled(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    return optimizer


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict | list) and value:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    else:
        yield path, value


def exact(value: Any) -> Any:
    """Return what differs between two different leaves, bit by bit."""
    if isinstance(value, torch.Tensor):
        bits = value.contiguous().reshape(-1).view(torch.uint8).tolist()
        return value.dtype, tuple(value.shape), bits
    return type(value), repr(value)


def held(optimizer: torch.optim.Optimizer) -> dict[tuple[Any, ...], Any]:
    return {path: exact(leaf) for path, leaf in leaves(optimizer.state_dict())}


@pytest.mark.parametrize(("kind", "options"), OF_TORCH)
def test_state_is_restored_bit_by_bit(tmp_path: Path, kind: Any, options: dict[str, Any]) -> None:
    names = [f"{name}-{suffix}" for name in DTYPES for suffix in ("plain", "scheduled")]
    # some optimizers change state for one dtype only, and cannot step in it
    usable = [name for name in names if can_step(kind, DTYPES[name.partition("-")[0]], options)]
    assert any(name.startswith("fp32") for name in usable)

    def several(steps: int, *, also_scheduled: bool = False) -> dict[str, torch.optim.Optimizer]:
        found = {}
        for name in usable:
            dtypes = DTYPES[name.partition("-")[0]]
            one = made(kind, dtypes, options, steps=steps)
            found[name] = scheduled(one) if also_scheduled or "scheduled" in name else one
        return found

    saved = several(3)
    dcpstore.save({"all": saved}, tmp_path)
    for target in (several(0), several(2), several(0, also_scheduled=True)):
        report = dcpstore.load({"all": target}, tmp_path)
        assert report.unexpected == ()
        for name, optimizer in target.items():
            found = held(optimizer)
            expected = held(saved[name])
            kept = {p: v for p, v in found.items() if p not in expected}
            assert all(path[-1] == "initial_lr" for path in kept), kept
            assert {path: found.get(path) for path in expected} == expected, name
    fresh = {name: made(kind, DTYPES[name.partition("-")[0]], options) for name in usable}
    report = dcpstore.load({"all": fresh}, tmp_path)
    assert (report.missing, report.unexpected) == ((), ())
    assert {name: held(one) for name, one in fresh.items()} == {
        name: held(one) for name, one in saved.items()
    }


def can_step(kind: Any, dtypes: tuple[torch.dtype, ...], options: dict[str, Any]) -> bool:
    try:
        made(kind, dtypes, options, steps=1)
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    return True


class Odd(torch.optim.Optimizer):
    """Keeps state of dtypes and types that torch's own optimizers do not have."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1, "mode": "fast"})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].update(
                    codes=torch.arange(6, dtype=torch.uint8),
                    count=torch.tensor(2**40, dtype=torch.int64),
                    scale=torch.tensor([1 / 3], dtype=torch.float64),
                    small=torch.ones(2, dtype=torch.float8_e4m3fn),
                    name="rowwise",
                    window=[torch.full((2,), 1 / 3, dtype=torch.float32)] * 2,
                    history=[0.1, 0.2],
                    nothing=None,
                    flag=True,
                    pair=(1, 2.5),
                    factors={0: torch.ones(2, dtype=torch.float64), 1: torch.zeros(1)},
                )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int32])
def test_a_foreign_optimizer_keeps_its_own_dtypes_and_types(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    def new(*, steps: int) -> Odd:
        weight = torch.ones(3, dtype=dtype)
        optimizer = Odd([torch.nn.Parameter(weight, requires_grad=weight.is_floating_point())])
        for _ in range(steps):
            optimizer.step()
        return optimizer

    saved = new(steps=1)
    dcpstore.save({"optim": saved}, tmp_path)
    for target in (new(steps=0), new(steps=1)):
        dcpstore.load({"optim": target}, tmp_path)
        assert held(target) == held(saved)


def lists_of(count: int) -> torch.optim.Optimizer:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state[weight]["window"] = [torch.full((2,), float(i)) for i in range(count)]
    return optimizer


@pytest.mark.parametrize("had", [0, 1, 2, 5])
def test_lists_in_the_state_get_the_stored_length(tmp_path: Path, had: int) -> None:
    dcpstore.save({"optim": lists_of(3)}, tmp_path)
    target = lists_of(had)
    report = dcpstore.load({"optim": target}, tmp_path)
    assert (report.missing, report.unexpected) == ((), ())
    (state,) = target.state.values()
    assert [t.tolist() for t in state["window"]] == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]


def test_state_that_the_optimizer_cannot_hold_is_an_error(tmp_path: Path) -> None:
    two = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    two.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.5})
    for group in two.param_groups:
        group["params"][0].grad = torch.ones(2)
    two.step()
    dcpstore.save({"optim": two, "w": torch.ones(2)}, tmp_path)
    weight = torch.zeros(2)
    one = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    with pytest.raises(MismatchError) as caught:
        dcpstore.load({"optim": one, "w": weight}, tmp_path)
    assert "has 1 parameters, and the version holds state of parameter 1" in str(caught.value)
    assert "has 1 parameter groups, and the version 2" in str(caught.value)
    assert weight.tolist() == [0.0, 0.0]
    assert one.state_dict()["state"] == {}
    dcpstore.load({"optim": one}, tmp_path, exclude=["optim.state.1.*", "optim.param_groups.1.*"])
    assert one.state_dict()["state"][0]["momentum_buffer"].tolist() == [1.0, 1.0]


def test_a_stored_none_replaces_a_tensor_and_a_tensor_replaces_none(
    tmp_path: Path,
) -> None:
    def new(buffer: torch.Tensor | None) -> torch.optim.Optimizer:
        weight = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        optimizer.state[weight]["momentum_buffer"] = buffer
        return optimizer

    for saved, had in ((None, torch.ones(2)), (torch.ones(2), None)):
        version = dcpstore.save({"optim": new(saved)}, tmp_path)
        target = new(had)
        dcpstore.load({"optim": target}, tmp_path, version.number)
        assert held(target) == held(new(saved))
