"""What ranks do with composed tensors that they hold together; called by name on each rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

import dcpstore
from dcpstore.encoding.composed_tensors import kind_of, parts_of
from tests.ranks import mesh
from tests.tensors import same


def columns(rank: int, fill: float | None = None) -> DTensor:
    """Return a table as torchrec shards it: two runs of columns on rank 0, one on rank 1."""
    table = torch.arange(32.0).reshape(4, 8)
    runs = [(0, 2), (2, 5)] if rank == 0 else [(5, 8)]
    pieces = [table[:, a:b].clone() for a, b in runs]
    if fill is not None:
        pieces = [torch.full_like(piece, fill) for piece in pieces]
    local = LocalShardsWrapper(pieces, [(0, a) for a, _ in runs])
    return DTensor.from_local(
        local, mesh((2,)), [Shard(1)], run_check=False, shape=torch.Size((4, 8)), stride=(8, 1)
    )


def round_trip_columns(rank: int, folder: str) -> None:
    """Save and load a table of column shards, by dcpstore and by torch, each read by the other."""
    kept = columns(rank)
    dcpstore.save({"t": kept}, f"{folder}/ours")
    with dcpstore.open(f"{folder}/ours") as repo:
        assert torch.equal(repo.read()["t"], torch.arange(32.0).reshape(4, 8))
    filled = columns(rank, -1.0)
    dcpstore.load({"t": filled}, f"{folder}/ours")
    writer = dcpstore.FileSystemWriter(f"{folder}/by-torch")
    dcp.save({"t": columns(rank)}, storage_writer=writer)
    again = columns(rank, -1.0)
    dcp.load({"t": again}, storage_reader=dcpstore.FileSystemReader(f"{folder}/by-torch"))
    for one in (filled, again):
        pairs = zip(
            one._local_tensor.local_shards(), kept._local_tensor.local_shards(), strict=True
        )
        assert all(same(a, b) for a, b in pairs)
    turned = torch.zeros(4, 8)
    dcpstore.load({"t": turned}, f"{folder}/ours")
    assert torch.equal(turned, torch.arange(32.0).reshape(4, 8))
    pending = dcpstore.async_save({"t": kept}, f"{folder}/ours")
    with dcpstore.open(f"{folder}/ours") as repo:
        assert pending.result().number == 2
        assert torch.equal(repo.read(2)["t"], torch.arange(32.0).reshape(4, 8))


def train(rows: int, optimizer: Any, steps: int, *, seed: int, ranks: int) -> Any:
    """Return a model over `ranks` ranks, and its optimizer after some steps."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(512, rows, bias=False), torch.nn.Linear(rows, 3))
    if ranks > 1:
        fully_shard(model, mesh=mesh((ranks,)))
    made = optimizer(model.parameters(), lr=1e-2)
    with torch.compiler.set_stance("force_eager"):
        for _ in range(steps):
            model(torch.randn(4, 512)).square().sum().backward()
            made.step()
            made.zero_grad()
    return model, made


def states(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return the bits of an optimizer's state on this rank."""
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, value in sorted(optimizer.state.get(parameter, {}).items()):
                local = value._local_tensor if isinstance(value, DTensor) else value
                kind = kind_of(local)
                parts = {"": local} if kind is None else parts_of(kind, local)[0]
                found.append((name, kind and kind.name, parts))
    return found


def alike(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) > 0 and all(
        a[:2] == b[:2] and all(same(a[2][part], b[2][part]) for part in a[2])
        for a, b in zip(one, other, strict=True)
    )


def round_trip_optimizer(rank: int, folder: str, name: str) -> list[str]:
    """Save an optimizer over two ranks; load it fresh, stepped, and by one rank."""
    from torchao import optim as ao  # noqa: PLC0415 (takes seconds to load)

    kind = getattr(ao, name)
    model, kept = train(32, kind, 2, seed=0, ranks=2)
    dcpstore.save({"model": model, "optim": kept}, folder)
    expected = states(kept)
    for steps in (0, 1):
        fresh_model, fresh = train(32, kind, steps, seed=1, ranks=2)
        report = dcpstore.load({"model": fresh_model, "optim": fresh}, folder)
        assert report.missing == report.unexpected == report.differences == ()
        assert alike(states(fresh), expected)
    if rank == 0:
        alone, whole = train(32, kind, 0, seed=1, ranks=1)
        dcpstore.load({"model": alone, "optim": whole}, folder, no_dist=True)
        for (_, _, parts), (_, _, mine) in zip(states(whole), expected, strict=True):
            for part, tensor in parts.items():
                held = mine[part]
                assert same(tensor[: len(held)] if tensor.dim() else tensor, held), part
        dcpstore.save({"model": alone, "optim": whole}, f"{folder}/one", no_dist=True)
    dist.barrier()
    fresh_model, fresh = train(32, kind, 0, seed=2, ranks=2)
    dcpstore.load({"model": fresh_model, "optim": fresh}, f"{folder}/one")
    assert alike(states(fresh), expected)
    return sorted({name for _, name, _ in expected if name})


def round_trip_weights(rank: int, folder: str) -> list[Any]:
    """Save and load float8 weights that two ranks hold: of a training, and quantized ones."""
    from torchao import quantization as ao  # noqa: PLC0415 (takes seconds to load)
    from torchao.float8 import (  # noqa: PLC0415
        Float8LinearConfig,
        convert_to_float8_training,
    )

    def training(seed: int) -> Any:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 16))
        config = Float8LinearConfig(enable_fsdp_float8_all_gather=True, emulate=True)
        return fully_shard(convert_to_float8_training(model, config=config), mesh=mesh((2,)))

    def quantized(seed: int, rows: slice) -> torch.Tensor:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
        with torch.no_grad():
            model[0].weight = torch.nn.Parameter(model[0].weight[rows].clone())
        ao.quantize_(model, ao.Float8WeightOnlyConfig())
        weight: torch.Tensor = model[0].weight.data
        return weight

    def split(seed: int) -> DTensor:
        half = quantized(seed, slice(16 * rank, 16 * rank + 16))
        size = torch.Size((32, 64))
        return DTensor.from_local(
            half, mesh((2,)), [Shard(0)], run_check=False, shape=size, stride=(64, 1)
        )

    kept, weight = training(0), split(0)
    dcpstore.save({"model": kept, "w": weight}, folder)
    fresh, filled = training(1), split(1)
    dcpstore.load({"model": fresh, "w": filled}, folder)
    for a, b in zip(kept.parameters(), fresh.parameters(), strict=True):
        ours, theirs = (p._local_tensor for p in (a, b))
        assert type(ours) is type(theirs)
        assert same(getattr(ours, "_tensor", ours), getattr(theirs, "_tensor", theirs))
    with dcpstore.open(folder) as repo:
        read = repo.read()["w"]
    for part in ("qdata", "scale"):
        assert same(getattr(filled._local_tensor, part), getattr(weight._local_tensor, part))
        assert same(getattr(read, part), getattr(quantized(0, slice(32)), part))
    return [type(read).__name__, type(fresh[0].weight._local_tensor).__name__]
