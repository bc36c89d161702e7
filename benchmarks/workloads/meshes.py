"""(f) 2 and 4 real ranks: saved and loaded on the same mesh, and on others.

The state is GPT-2's with Adam, fp32, as DTensors: each rank makes its own shards. Chunks are stored
as they are (codec "none"), so that the bytes read are bytes of tensors and can be held to those
that the ranks need. A time is that of the slowest rank, from a barrier to a barrier.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, empty

import dcpstore
from benchmarks.files import sync, warm
from benchmarks.ranks import Ranks, first_ranks, mesh, started
from benchmarks.scale import Scale
from benchmarks.states import MOMENTS, gpt_shapes
from benchmarks.stores import DCP_DEFAULT, OURS
from benchmarks.table import Row
from benchmarks.timing import Contender, Samples
from benchmarks.workloads.bench import Bench

__all__ = ["measure_meshes"]


@dataclass(frozen=True, slots=True)
class _Mesh:
    """A mesh, and the tensor dimension that each of its dimensions shards."""

    name: str
    shape: tuple[int, ...]
    shards: tuple[int, ...]

    @property
    def ranks(self) -> int:
        return math.prod(self.shape)


TWO_ROWS = _Mesh("2 (rows)", (2,), (0,))
FOUR_ROWS = _Mesh("4 (rows)", (4,), (0,))
TWO_COLUMNS = _Mesh("2 (columns)", (2,), (1,))
FOUR_BOTH = _Mesh("2x2 (rows, columns)", (2, 2), (0, 1))

# Saved on, and then loaded on.
CASES = {
    TWO_ROWS: (TWO_ROWS, FOUR_ROWS, FOUR_BOTH),
    FOUR_ROWS: (FOUR_ROWS, TWO_ROWS, TWO_COLUMNS),
}
READ, NEEDED = "bytes read", "bytes needed"


@dataclass(frozen=True, slots=True)
class _Done:
    """What one rank tells of a save or load; the bytes are of all ranks where ours reads them."""

    seconds: float
    nbytes_read: int = 0
    nbytes_needed: int = 0
    checksum: int = 0


def measure_meshes(bench: Bench) -> list[Row]:
    """(f) Times on real ranks, and the bytes that a resharding load reads."""
    checksums: dict[tuple[str, int], int] = {}
    with bench.place("ranks") as folder, started(4, folder) as ranks:
        ranks.run(prepare)

        def contender(store: str) -> Contender:
            return lambda number: _round(bench, ranks, store, number, checksums)

        measured = bench.in_turns({name: contender(name) for name in (DCP_DEFAULT, OURS)})
    theirs, ours = measured[DCP_DEFAULT], measured[OURS]
    nbytes = 4 * sum(math.prod(shape) for shape in gpt_shapes(bench.scale).values())
    nbytes *= 1 + len(MOMENTS)
    rows, read = [], []
    for saved_on, loaded_on in CASES.items():
        what = f"save on {saved_on.name}"
        rows.append(_row(what, theirs[what], ours[what], {"write": nbytes}))
        for on in loaded_on:
            what = _load_name(on, saved_on)
            work = {"read": nbytes, "digest": nbytes}
            rows.append(_row(what, theirs[what], ours[what], work))
            read.append(_bytes_row(what, ours, is_resharded=on != saved_on))
    return rows + read


def _row(what: str, theirs: Samples, ours: Samples, least_work: Mapping[str, int]) -> Row:
    return Row("f", what, DCP_DEFAULT, theirs, ours, least_work=least_work)


def _bytes_row(what: str, ours: Mapping[str, Samples], *, is_resharded: bool) -> Row:
    return Row(
        "f",
        f"{what}: {READ}",
        "what the ranks need",
        ours[f"{what}: {NEEDED}"],
        ours[f"{what}: {READ}"],
        unit="bytes",
        kind="share",
        target=1.1 if is_resharded else None,
    )


def _load_name(on: _Mesh, saved_on: _Mesh) -> str:
    return f"load on {on.name} of {saved_on.name}"


def _round(
    bench: Bench, ranks: Ranks, store: str, number: int, checksums: dict[tuple[str, int], int]
) -> Mapping[str, float]:
    """Save on each mesh and load on others, by one store; both must load the same values."""
    found: dict[str, float] = {}
    for saved_on, loaded_on in CASES.items():
        with bench.place("checkpoint") as place:
            if store == OURS:
                chunk = dcpstore.ChunkDefaults(codec="none")
                dcpstore.open(place, chunk=chunk).close()
            saved = ranks.run(save, bench.scale, saved_on, store, place, ranks=saved_on.ranks)
            found[f"save on {saved_on.name}"] = _slowest(saved)
            warm(place)
            for target in loaded_on:
                what = _load_name(target, saved_on)
                loaded = ranks.run(load, bench.scale, target, store, place, ranks=target.ranks)
                found[what] = _slowest(loaded)
                if store == OURS:
                    found[f"{what}: {READ}"] = loaded[0].nbytes_read
                    found[f"{what}: {NEEDED}"] = sum(done.nbytes_needed for done in loaded)
                checksum = sum(done.checksum for done in loaded)
                if checksums.setdefault((what, number), checksum) != checksum:
                    raise SystemExit(f"{what}: the stores loaded different values")
    return found


def _slowest(done: list[_Done]) -> float:
    return max(one.seconds for one in done)


def prepare(rank: int) -> None:
    """Make every mesh and group, on all ranks together."""
    for made in (TWO_ROWS, FOUR_ROWS, TWO_COLUMNS, FOUR_BOTH):
        mesh(made.shape)
        first_ranks(made.ranks)


def save(rank: int, scale: Scale, on: _Mesh, store: str, place: Path) -> _Done:
    """Save this rank's shards, durably."""
    group, state = first_ranks(on.ranks), make_state(scale, on)
    dice = torch.Generator().manual_seed(100 + rank)
    for tensor in state.values():
        tensor.to_local().normal_(0, 0.02, generator=dice)
    if store == OURS:
        with dcpstore.open(place, create=False) as repo:
            return _Done(_timed(group, lambda: dcpstore.save(state, repo, process_group=group)))

    def by_dcp() -> None:
        dcp_save(state, storage_writer=FileSystemWriter(place), process_group=group)
        if rank == 0:
            sync(place)
            sync(place.parent)

    return _Done(_timed(group, by_dcp))


def load(rank: int, scale: Scale, on: _Mesh, store: str, place: Path) -> _Done:
    """Load into this rank's shards; tell the bytes that were needed and a sum over the values."""
    group, state = first_ranks(on.ranks), make_state(scale, on)
    shards = [tensor.to_local() for tensor in state.values()]
    for shard in shards:
        shard.zero_()
    nbytes_read = 0

    def by_us() -> None:
        nonlocal nbytes_read
        nbytes_read = dcpstore.load(state, place, process_group=group).nbytes_read

    def by_dcp() -> None:
        dcp_load(state, storage_reader=FileSystemReader(place), process_group=group)

    seconds = _timed(group, by_us if store == OURS else by_dcp)
    return _Done(
        seconds,
        nbytes_read,
        sum(shard.nbytes for shard in shards),
        sum(int(shard.view(torch.int32).sum(dtype=torch.int64)) for shard in shards),
    )


def make_state(scale: Scale, on: _Mesh) -> dict[str, DTensor]:
    """Return empty DTensors of GPT-2 with Adam; vectors, without columns, are replicated there."""
    state = {}
    for name, shape in gpt_shapes(scale).items():
        placements: list[Placement] = [
            Shard(dim) if dim < len(shape) else Replicate() for dim in on.shards
        ]
        for fqn in (f"model.{name}", *(f"optim.{name}.{moment}" for moment in MOMENTS)):
            state[fqn] = empty(*shape, device_mesh=mesh(on.shape), placements=placements)
    return state


def _timed(group: dist.ProcessGroup, call: Callable[[], object]) -> float:
    dist.barrier(group)
    began = time.perf_counter()
    call()
    dist.barrier(group)
    return time.perf_counter() - began
