"""Each parallelism: how a model is distributed over ranks, and how it is trained there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import dcpstore.state_dict as dsd
from tests.parallel.nets import EXPERTS, PARTS, Experts, Net, batch


@dataclass(frozen=True)
class Layout:
    """A parallelism on a number of ranks; with `meta` the model is built on the meta device."""

    kind: str
    ranks: int = 1
    meta: bool = False

    def __str__(self) -> str:
        return f"{self.kind}{'@meta' if self.meta else ''}x{self.ranks}"


@dataclass
class Job:
    """A model and its optimizer on this rank, and how to train them one step."""

    layout: Layout
    model: nn.Module
    optimizer: torch.optim.Optimizer
    train: Callable[[int], float]
    options: dsd.StateDictOptions


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD momentum": partial(torch.optim.SGD, momentum=0.9),
    "AdamW": partial(torch.optim.AdamW, foreach=False),
    "AdamW foreach": partial(torch.optim.AdamW, foreach=True),
    "AdamW fused": partial(torch.optim.AdamW, fused=True),
    "Adafactor": torch.optim.Adafactor,
}


@cache
def named_mesh(*dims: tuple[str, int]) -> DeviceMesh:
    """Return a mesh of all ranks, made once: each new mesh makes process groups."""
    names, sizes = zip(*dims, strict=True)
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def build(
    layout: Layout, optimizer: str, *, seed: int, moe: bool = False, flat: bool = False
) -> Job:
    """Return a job of this layout; every rank of the pool calls it.

    The seed changes the parameters and the learning rate, so that a load has both to restore.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    with torch.device("meta" if layout.meta else "cpu"):
        model = _model(layout, rank, seed, moe=moe)
    model = _LAY_OUT[layout.kind](model, layout)
    if layout.meta:
        model.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    made = OPTIMIZERS[optimizer](model.parameters(), lr=0.02 / seed)
    options = dsd.StateDictOptions(
        full_state_dict=layout.kind == "FSDP1 full", flatten_optimizer_state_dict=flat
    )
    train = _TRAIN.get(layout.kind, _train)
    return Job(layout, model, made, lambda step: train(model, made, step), options)


def _model(layout: Layout, rank: int, seed: int, *, moe: bool) -> nn.Module:
    if layout.kind == "expert":
        count = EXPERTS // layout.ranks
        return Experts(seed, range(rank * count, (rank + 1) * count))
    if moe:
        return Experts(seed)
    if layout.kind == "pipeline":
        return Net(seed, stages(layout.ranks)[rank])
    return Net(seed)


def stages(ranks: int) -> list[list[str]]:
    """Return the parts of each pipeline stage, the same number for each."""
    parts, count = list(PARTS), len(PARTS) // ranks
    return [parts[i * count : (i + 1) * count] for i in range(ranks)]


def _as_is(model: nn.Module, layout: Layout) -> nn.Module:
    return model


def _ddp(model: nn.Module, layout: Layout) -> nn.Module:
    return DistributedDataParallel(model)


def _fsdp1(model: nn.Module, layout: Layout) -> nn.Module:
    return FullyShardedDataParallel(
        model,
        device_id=torch.device("cpu"),
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
        sharding_strategy=ShardingStrategy.FULL_SHARD,
        use_orig_params=layout.kind == "FSDP1",
        device_mesh=named_mesh(("dp", layout.ranks)) if layout.kind == "FSDP1" else None,
    )


def _fully_shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for part in model.modules():
        if isinstance(part, nn.Linear):
            fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _fsdp2(model: nn.Module, layout: Layout) -> nn.Module:
    return _fully_shard(model, named_mesh(("dp", layout.ranks)))


def _hsdp(model: nn.Module, layout: Layout) -> nn.Module:
    return _fully_shard(model, named_mesh(("replicate", 2), ("shard", layout.ranks // 2)))


def _tp(model: nn.Module, layout: Layout) -> nn.Module:
    return _split(model, named_mesh(("tp", layout.ranks)))


def _split(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Lay the parts of a `Net` out over `mesh`.

    The output of `up` stays a DTensor: from a plain tensor `down` could not know the uneven split.
    """
    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "up": ColwiseParallel(use_local_output=False),
        "down": RowwiseParallel(),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, plan)


def _fsdp2_tp(model: nn.Module, layout: Layout) -> nn.Module:
    mesh = named_mesh(("dp", 2), ("tp", layout.ranks // 2))
    return _fully_shard(_split(model, mesh["tp"]), mesh["dp"])


_LAY_OUT: dict[str, Callable[[nn.Module, Layout], nn.Module]] = {
    "single": _as_is,
    "DDP": _ddp,
    "FSDP1": _fsdp1,
    "FSDP1 full": _fsdp1,
    "FSDP2": _fsdp2,
    "HSDP": _hsdp,
    "TP": _tp,
    "FSDP2+TP": _fsdp2_tp,
    "pipeline": _as_is,
    "expert": _as_is,
}


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    tokens, targets = batch(step)
    loss = _loss(model(tokens), targets)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (output - targets).square().mean(dim=(-1, -2)).sum()


def _train_pipeline(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    """Train one step, stage after stage; activations go forward and gradients back."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    tokens, targets = batch(step)
    entered = received = tokens
    output = loss = torch.zeros(())
    for stage in range(last + 1):
        if stage == rank:
            entered = received.requires_grad_(received.is_floating_point())
            output = model(entered)
        if stage < last:
            received = _broadcast(output if stage == rank else None, stage)
    if rank == last:
        loss = _loss(output, targets)
        loss.backward()
    for stage in range(last, 0, -1):
        grad = _broadcast(entered.grad if stage == rank else None, stage)
        if stage == rank + 1:
            output.backward(grad)
    optimizer.step()
    optimizer.zero_grad()
    return float(_broadcast(loss if rank == last else None, last))


def _broadcast(tensor: torch.Tensor | None, source: int) -> torch.Tensor:
    """Return on every rank the tensor of rank `source`, without its graph."""
    box = [None if tensor is None else tensor.detach()]
    dist.broadcast_object_list(box, src=source)
    assert box[0] is not None
    return box[0].clone()


def _train_experts(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    tokens, targets = batch(step)
    loss = _loss(model(tokens), targets)
    loss.backward()
    dist.all_reduce(model.embed.weight.grad)
    optimizer.step()
    optimizer.zero_grad()
    loss = loss.detach()
    dist.all_reduce(loss)
    return loss.item()


_TRAIN = {"pipeline": _train_pipeline, "expert": _train_experts}
