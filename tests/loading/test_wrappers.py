"""Modules in every wrapper: filled, tied as before, and with memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import dcpstore
from dcpstore import MismatchError
from dcpstore.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from tests.parallel.layouts import named_mesh
from tests.ranks import RankPool


class Net(nn.Module):
    """A net whose head and first layer are one tensor, with buffers of both kinds."""

    def __init__(self, value: float, *, tied: bool = True) -> None:
        super().__init__()
        self.emb = nn.Linear(4, 4, bias=False)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 4, bias=False)
        if tied:
            self.head.weight = self.emb.weight
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("mask", torch.ones(2), persistent=False)
        with torch.no_grad():
            for i, tensor in enumerate((*self.parameters(), *self.buffers())):
                tensor.fill_(value + i)


def inner_checkpoints(net: Net) -> nn.Module:
    """Wrap the layers one by one, so that tied parameters are in different wrappers."""
    net.emb, net.block[0] = checkpoint_wrapper(net.emb), checkpoint_wrapper(net.block[0])
    return net


def compiled_parts(net: Net) -> nn.Module:
    net.emb = torch.compile(net.emb, backend="eager")  # type: ignore[assignment]
    net.block = torch.compile(net.block, backend="eager")  # type: ignore[assignment]
    return net


def compiled_in_place(net: Net) -> nn.Module:
    net.compile(backend="eager")
    return net


def several(net: Net) -> nn.Module:
    compiled: Any = torch.compile(inner_checkpoints(net), backend="eager")
    return checkpoint_wrapper(compiled)


WRAPPERS: dict[str, Callable[[Net], nn.Module]] = {
    "none": lambda net: net,
    "checkpoint layers": inner_checkpoints,
    "checkpoint whole": checkpoint_wrapper,
    "compile whole": lambda net: torch.compile(net, backend="eager"),  # type: ignore[return-value]
    "compile parts": compiled_parts,
    "compile in place": compiled_in_place,
    "all of them": several,
    "container": lambda net: nn.ModuleDict({"deep": nn.ModuleList([inner_checkpoints(net)])}),
}


def state_of(module: nn.Module) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_module_is_filled_and_tied(tmp_path: Path, name: str) -> None:
    wrap = WRAPPERS[name]
    saved = wrap(Net(1.0))
    dcpstore.save({"model": saved}, tmp_path)
    for device in ("cpu", "meta"):
        with torch.device(device):
            net = Net(5.0)
            net.block[0].weight.requires_grad_(False)
            target = wrap(net)
        first = next(module for module in target.modules() if isinstance(module, Net))
        report = dcpstore.load({"model": target}, tmp_path)
        assert state_of(target) == state_of(saved)
        assert (report.missing, report.unexpected) == ((), ())
        weights = [module.weight for module in first.modules() if isinstance(module, nn.Linear)]
        assert weights[0] is weights[-1]
        assert [weight.requires_grad for weight in weights] == [True, False, True]
        assert not any(parameter.is_meta for parameter in target.parameters())
        assert [name.rpartition(".")[2] for name in report.unfilled] == (
            ["mask"] if device == "meta" else []
        )


def test_a_tie_between_two_modules_on_the_meta_device_stays(tmp_path: Path) -> None:
    def two() -> tuple[nn.Module, nn.Module]:
        first, second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        second.weight = first.weight
        return first, second

    a, b = two()
    dcpstore.save({"a": a, "b": b}, tmp_path)
    with torch.device("meta"):
        one, other = two()
    dcpstore.load({"a": one, "b": other}, tmp_path)
    assert one.weight is other.weight
    assert torch.equal(one.weight, a.weight)


def test_names_of_one_tensor_whose_stored_contents_differ_are_refused(tmp_path: Path) -> None:
    dcpstore.save({"model": Net(1.0, tied=False)}, tmp_path)
    for device in ("cpu", "meta"):
        with torch.device(device):
            net = Net(5.0)
        with pytest.raises(MismatchError, match=r"'model\.emb\.weight' and 'model\.head\.weight'"):
            dcpstore.load({"model": net}, tmp_path)
        assert net.scale.is_meta == (device == "meta")


def test_a_name_that_a_version_lacks_is_filled_from_its_tied_tensor(tmp_path: Path) -> None:
    saved = Net(1.0)
    state = {name: tensor for name, tensor in saved.state_dict().items() if name != "head.weight"}
    dcpstore.save({"model": state}, tmp_path)
    for device in ("cpu", "meta"):
        with torch.device(device):
            net = Net(5.0)
        assert dcpstore.load({"model": net}, tmp_path).missing == ()
        assert net.head.weight is net.emb.weight
        assert state_of(net) == state_of(saved)


def test_parameters_that_have_memory_stay_the_same_objects(tmp_path: Path) -> None:
    """An optimizer may hold them, though the rest of the module is on the meta device."""
    dcpstore.save({"model": Net(1.0)}, tmp_path)
    with torch.device("meta"):
        net = Net(5.0)
    net.block[0] = nn.Linear(4, 4)
    held = net.block[0].weight
    dcpstore.load({"model": net}, tmp_path)
    assert net.block[0].weight is held
    assert torch.equal(held, Net(1.0).block[0].weight)


class OwnStateDict(nn.Linear):
    """A module with a state of its own names, and without torch's `keep_vars`."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("keep_vars", None)
        return {f"my.{name}": value for name, value in super().state_dict(**kwargs).items()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        own = {name.removeprefix("my."): value for name, value in state_dict.items()}
        return super().load_state_dict(own, strict=strict, assign=assign)


class Forgetful(nn.Linear):
    """A module that cannot be filled on the meta device, and says nothing."""

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return None


def test_what_is_still_on_the_meta_device_is_an_error(tmp_path: Path) -> None:
    dcpstore.save({"model": OwnStateDict(2, 2)}, tmp_path / "own")
    dcpstore.save({"model": Forgetful(2, 2)}, tmp_path / "forgetful")
    with torch.device("meta"):
        own, forgetful = OwnStateDict(2, 2), Forgetful(2, 2)
    dcpstore.load({"model": own}, tmp_path / "own")
    assert not own.weight.is_meta
    with pytest.raises(MismatchError, match=r"'model\.bias' is still on the meta device"):
        dcpstore.load({"model": forgetful}, tmp_path / "forgetful")


def sharded(net: nn.Module, tied: bool) -> nn.Module:
    """Shard a net by FSDP2; tied parameters must be in one group."""
    if not tied:
        fully_shard(net.block[0], mesh=named_mesh(("dp", 2)))  # type: ignore[index]
    return fully_shard(net, mesh=named_mesh(("dp", 2)))


def full(tensor: Any) -> Any:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).tolist()


def load_wrapped(rank: int, folder: Path) -> list[str]:
    """Load into each wrapper that needs ranks; return what went wrong."""
    wrong = []
    expected = state_of(Net(1.0))

    def check(name: str, target: nn.Module, prefix: str = "") -> None:
        rename = (lambda fqn: fqn.replace(prefix, "")) if prefix else None
        report = dcpstore.load({"model": target}, folder, rename=rename)
        if any(parameter.is_meta for parameter in target.parameters()):
            wrong.append(f"{name}: on meta")
        found = {key.replace(prefix, ""): full(t) for key, t in target.state_dict().items()}
        if found != expected or report.missing:
            wrong.append(f"{name}: {found} {report.missing}")

    ddp = DistributedDataParallel(inner_checkpoints(Net(5.0)))
    check("DDP", ddp, "module.")
    if ddp.module.head.weight is not ddp.module.emb._checkpoint_wrapped_module.weight:
        wrong.append("DDP: untied")
    for own in (True, False):
        fsdp1 = FullyShardedDataParallel(
            Net(5.0), device_id=torch.device("cpu"), use_orig_params=own
        )
        check(f"FSDP1 {own}", fsdp1)
    check("FSDP2", sharded(inner_checkpoints(Net(5.0)), True))
    with torch.device("meta"):
        net = Net(5.0)
    check("FSDP2 on meta", sharded(net, True))
    if net.head.weight is not net.emb.weight:
        wrong.append("FSDP2 on meta: untied")
    return wrong


def test_wrappers_that_need_ranks_are_filled_and_tied(tmp_path: Path, two_ranks: RankPool) -> None:
    dcpstore.save({"model": Net(1.0)}, tmp_path)
    assert two_ranks.run(load_wrapped, tmp_path) == [[], []]


def stages(rank: int, folder: Path) -> Any:
    """Save and load what each stage of a pipeline holds, in an owner of that rank alone."""

    def stage(value: float) -> Holder:
        return Holder({f"layer{rank}": torch.full((2,), value), "counts": {f"n{rank}": int(value)}})

    own = stage(rank + 1.0)
    if rank == 0:
        own.state["grown"] = 7
    dcpstore.save({"stage": own}, folder)
    fresh = stage(0.0)
    report = dcpstore.load({"stage": fresh}, folder)
    return fresh.state[f"layer{rank}"].tolist(), fresh.state, report.unexpected


def stage_optimizers(rank: int, folder: Path) -> Any:
    """Save and load the optimizer of each stage by the names of its parameters."""

    def stage(rate: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        module = nn.ModuleDict({f"layer{rank}": nn.Linear(2, 2)})
        optimizer = torch.optim.SGD(module.parameters(), lr=rate, momentum=0.9)
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, rate)
        optimizer.step()
        return module, optimizer

    saved, optimizer = stage(0.5)
    dcpstore.save({"optim": get_optimizer_state_dict(saved, optimizer)}, folder)
    module, other = stage(0.25)
    state = {"optim": get_optimizer_state_dict(module, other)}
    dcpstore.load(state, folder)
    set_optimizer_state_dict(module, other, state["optim"])
    buffers = [float(held["momentum_buffer"].mean()) for held in other.state.values()]
    return other.param_groups[0]["lr"], buffers


def test_the_optimizers_of_pipeline_stages_keep_their_own_parameters(
    tmp_path: Path, two_ranks: RankPool
) -> None:
    assert two_ranks.run(stage_optimizers, tmp_path) == [(0.5, [0.5, 0.5])] * 2


class Holder:
    """An object with a state, which keeps what it gets."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


def test_an_owner_on_several_ranks_gets_only_what_no_rank_names(
    tmp_path: Path, two_ranks: RankPool
) -> None:
    for rank, (layer, state, unexpected) in enumerate(two_ranks.run(stages, tmp_path)):
        assert layer == [rank + 1.0] * 2
        assert set(state) == {f"layer{rank}", "counts", "grown"}
        assert state["counts"] == {f"n{rank}": rank + 1}
        assert state["grown"] == 7
        assert unexpected == ()
