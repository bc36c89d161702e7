"""ShardedTensors of which a rank holds several shards, none, or empty ones."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import Shard as ShardOf
from torch.distributed._shard.sharded_tensor import ShardedTensor, ShardMetadata
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import dcpstore
from dcpstore import InvalidInputError, MismatchError
from tests.ranks import RankPool, mesh
from tests.soundness import Place, assert_sound

# torch warns at each method
pytestmark = pytest.mark.filterwarnings("ignore:Please use DTensor", "ignore:torch.distributed is")
WHOLE = torch.arange(18.0).reshape(6, 3)
Spans = Sequence[tuple[int, int]]  # rows, as [start, end)
# The rows that each of two ranks holds; of the last layout, one rank holds all.
LAYOUTS: dict[str, tuple[Spans, Spans]] = {
    "interleaved": (((0, 2), (4, 5)), ((2, 4), (5, 6))),
    "none": (((0, 4), (4, 6)), ()),
    "empty": (((0, 0), (0, 3), (3, 3)), ((3, 3), (3, 6), (6, 6))),
    "only empty": (((0, 6),), ((6, 6),)),
}


def sharded(spans: Spans, rank: int, *, filled: bool, device: str = "cpu") -> ShardedTensor:
    """Return a ShardedTensor of the whole, of which this rank holds these rows."""
    shards = [
        ShardOf(
            (WHOLE[start:end].clone() if filled else torch.zeros(end - start, 3)).to(device),
            ShardMetadata([start, 0], [end - start, 3], f"rank:{rank}/{device}"),
        )
        for start, end in spans
    ]
    made: ShardedTensor = ShardedTensor._init_from_local_shards(shards, 6, 3)
    return made


def assert_filled(tensor: Any, spans: Spans) -> None:
    found = [shard.tensor for shard in tensor.local_shards()]
    for (start, end), local in zip(spans, found, strict=True):
        assert torch.equal(local, WHOLE[start:end])


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    place = tempfile.mkdtemp(dir=tmp_path)
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


ALONE: tuple[Spans, ...] = (
    ((0, 6),),
    ((0, 2), (2, 6)),
    ((0, 0), (0, 6)),
    ((0, 1), (1, 1), (1, 6)),
    ((4, 6), (0, 4)),
)


@pytest.mark.usefixtures("alone")
def test_several_shards_of_one_rank(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for i, spans in enumerate(ALONE):
        with subtests.test(spans=spans):
            folder = tmp_path / str(i)
            nested = {"t": sharded(spans, 0, filled=True), "l": [{"n": 3}]}
            dcpstore.save({"a": nested, "plain": WHOLE.clone()}, folder)
            for other in ALONE:
                found = {"a": {"t": sharded(other, 0, filled=False), "l": [{"n": 0}]}}
                report = dcpstore.load(found, folder)
                assert report.missing == ()
                assert_filled(found["a"]["t"], other)
                into = {"plain": sharded(other, 0, filled=False)}
                dcpstore.load(into, folder)
                assert_filled(into["plain"], other)
            plain = {"a": {"t": torch.zeros(6, 3)}}
            dcpstore.load(plain, folder)
            assert torch.equal(plain["a"]["t"], WHOLE)
            with dcpstore.open(folder) as repo:
                assert torch.equal(repo.read()["a.t"], WHOLE)
                assert_sound(repo)


@pytest.mark.usefixtures("alone")
def test_options_of_a_load_and_a_copy(tmp_path: Path) -> None:
    spans = ((0, 2), (2, 6))
    held = {"s": sharded(spans, 0, filled=True), "deep": [{"s": sharded(spans, 0, filled=True)}]}
    pending = dcpstore.async_save(held, tmp_path)
    for shard in held["s"].local_shards():
        shard.tensor.fill_(-1)
    pending.result()
    again = dcpstore.async_save({"s": held["s"]}, tmp_path, branch="b")  # the same buffers
    again.result()
    with dcpstore.open(tmp_path) as repo:
        read = repo.read("main")
        assert torch.equal(read["s"], WHOLE)
        assert torch.equal(read["deep.0.s"], WHOLE)
        assert torch.equal(repo.read("b")["s"], torch.full((6, 3), -1.0))
    found = {"q": sharded(spans, 0, filled=False), "s": sharded(spans, 0, filled=False)}
    assert dcpstore.load(found, tmp_path, dry_run=True).differences
    with pytest.raises(MismatchError, match="'q' is not in the version"):
        dcpstore.load(found, tmp_path)
    assert dcpstore.load(found, tmp_path, strict=False).missing == ("q",)
    assert_filled(found["s"], spans)
    initialised: list[str] = []
    dcpstore.load(found, tmp_path, init_missing=lambda fqn, tensor: initialised.append(fqn))
    assert initialised == ["q"]
    half = ShardedTensor._init_from_local_shards(
        [
            ShardOf(
                torch.zeros(n, 3, dtype=torch.bfloat16),
                ShardMetadata([at, 0], [n, 3], "rank:0/cpu"),
            )
            for at, n in ((0, 2), (2, 4))
        ],
        6,
        3,
    )
    with pytest.raises(MismatchError, match="has dtype"):
        dcpstore.load({"s": half}, tmp_path)
    dcpstore.load({"s": half}, tmp_path, on_dtype="cast")
    assert_filled(half, spans)
    meta = sharded(spans, 0, filled=False, device="meta")
    with pytest.raises(InvalidInputError, match=r"'s', a ShardedTensor .* is on the meta device"):
        dcpstore.load({"s": meta}, tmp_path)


def shard_on_ranks(rank: int, place: Place) -> None:
    """Save each layout with each call, and load it into each of the others."""
    with place.open() as repo:
        for name, layout in LAYOUTS.items():

            def state(*, filled: bool, spans: Spans = layout[rank]) -> dict[str, Any]:
                return {"s": sharded(spans, rank, filled=filled), "n": [{"k": 5 * filled}]}

            dcpstore.save(state(filled=True), repo, tags=[f"save-{name}".replace(" ", "-")])
            dcpstore.async_save(state(filled=True), repo).result(60)
            planners: list[Any] = [dcpstore.DefaultSavePlanner()]
            if name != "empty":  # torch's own confuses two shards that begin at the same place
                planners.append(dcp.DefaultSavePlanner())
            for planner in planners:
                writer = dcpstore.RepositoryWriter(repo)
                dcp.save(state(filled=True), storage_writer=writer, planner=planner)
                loaders: list[Any] = [dcpstore.DefaultLoadPlanner()]
                if name != "none":  # torch's own treats the version as one of an older torch
                    loaders.append(dcp.DefaultLoadPlanner())
                for loader in loaders:
                    found = state(filled=False)
                    dcp.load(found, storage_reader=dcpstore.RepositoryReader(repo), planner=loader)
                    assert_filled(found["s"], layout[rank])
                    assert found["n"] == [{"k": 5}]
            for other in LAYOUTS.values():
                found = state(filled=False, spans=other[rank])
                dcpstore.load(found, repo)
                assert_filled(found["s"], other[rank])
            for placement in (Shard(0), Shard(1), Replicate()):
                into = distribute_tensor(torch.zeros(6, 3), mesh((2,)), [placement])
                dcpstore.load({"s": into}, repo)
                assert torch.equal(into.full_tensor(), WHOLE)
                assert isinstance(into, DTensor)
                whole = distribute_tensor(WHOLE, mesh((2,)), [placement])
                dcpstore.save({"s": whole}, repo, branch="dtensor")
                target = {"s": sharded(layout[rank], rank, filled=False)}
                dcpstore.load(target, repo, "dtensor")
                assert_filled(target["s"], layout[rank])


@pytest.mark.slow_on_postgres
def test_shards_of_several_ranks(place: Place, two_ranks: RankPool) -> None:
    place.open().close()
    two_ranks.run(shard_on_ranks, place)
    with place.open() as repo:
        for version in repo.log():
            assert torch.equal(repo.read(version.number)["s"], WHOLE)
        assert_sound(repo)
