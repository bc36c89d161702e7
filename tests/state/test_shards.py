"""What each rank holds of a tensor: its boxes and views of their data, for every class of torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from dcpstore.compat.torch_private import (
    LocalShardsWrapper,
    ShardedTensor,
    ShardOf,
    StridedShard,
    sharded_metadata,
)
from dcpstore.errors import InvalidInputError
from dcpstore.geometry.boxes import Box
from dcpstore.geometry.placements import Split
from dcpstore.state.shards import (
    distributed_like,
    flat_shards,
    is_on_meta,
    is_sharded,
    local_of,
    local_shards,
    no_shard,
    splits_of,
    with_shards,
)
from tests.state.fake_ranks import as_rank, cpu_mesh, distributed
from tests.tensors import DTYPES, raw

# Torch warns at each use of a ShardedTensor.
pytestmark = pytest.mark.filterwarnings("ignore:Please use DTensor", "ignore:torch.distributed is")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (4, 2)], ids=str)
def test_a_plain_tensor_is_one_box_with_its_own_memory(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = raw(dtype, *shape)
    (shard,) = local_shards("w", tensor)
    assert shard.box == Box.whole(shape)
    assert shard.data is tensor
    assert not is_sharded(tensor)
    assert local_of(tensor) is tensor


def test_a_parameter_is_a_plain_tensor_too() -> None:
    assert not is_sharded(torch.nn.Parameter(torch.ones(2)))
    assert not is_sharded(torch.nn.Buffer(torch.ones(2)))


# By name: the shape of the mesh, and how each of its dimensions splits a tensor.
LAYOUTS: dict[str, tuple[tuple[int, ...], list[Placement]]] = {
    "replicate": ((3,), [Replicate()]),
    "rows": ((2,), [Shard(0)]),
    "rows, uneven": ((3,), [Shard(0)]),
    "rows, some ranks without": ((8,), [Shard(0)]),
    "columns": ((4,), [Shard(1)]),
    "rows and columns": ((2, 2), [Shard(0), Shard(1)]),
    "rows twice": ((2, 3), [Shard(0), Shard(0)]),
    "replicated rows": ((2, 2), [Replicate(), Shard(0)]),
}


@pytest.mark.parametrize(("mesh", "placements"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_the_boxes_of_all_ranks_tile_a_dtensor_and_view_its_data(
    mesh: tuple[int, ...], placements: list[Placement], dtype: torch.dtype
) -> None:
    whole = torch.arange(7 * 6).reshape(7, 6).to(dtype)
    found = torch.zeros_like(whole)
    count = torch.zeros(7, 6, dtype=torch.int64)
    size = torch.Size(mesh).numel()
    for rank in range(size):
        with as_rank(rank, size):
            tensor = distributed(whole, cpu_mesh(*mesh), placements)
            for shard in local_shards("w", tensor):
                assert shard.data.shape == shard.box.sizes
                found[shard.box.slices] = shard.data
                count[shard.box.slices] += 1
                inside = shard.data.data_ptr() - local_of(tensor).data_ptr()
                assert 0 <= inside < local_of(tensor).nbytes
    assert torch.equal(found, whole)
    replicas = 1
    for n, placement in zip(mesh, placements, strict=True):
        replicas *= n if placement.is_replicate() else 1
    assert set(count.flatten().tolist()) == {replicas}


def test_a_strided_shard_is_several_boxes() -> None:
    local = torch.arange(4.0)
    with as_rank(1, 2):
        tensor = DTensor.from_local(
            local, cpu_mesh(), [StridedShard(0, split_factor=2)], run_check=False
        )
        shards = local_shards("w", tensor)
        assert splits_of("w", tensor) == [Split(0, 2, 1, factor=2)]
    assert [shard.box for shard in shards] == [Box((2,), (2,)), Box((6,), (2,))]
    assert [shard.data.tolist() for shard in shards] == [[0, 1], [2, 3]]
    assert shards[1].data.data_ptr() == local[2:].data_ptr()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_a_dtensor_without_elements_is_one_empty_box(shape: tuple[int, int]) -> None:
    with as_rank(1, 2):
        tensor = distributed(torch.zeros(shape), cpu_mesh(), [Shard(0)])
        (shard,) = local_shards("w", tensor)
    assert (shard.box, tuple(shard.data.shape)) == (Box((0, 0), shape), shape)


def test_a_replicated_dtensor_without_dimensions_is_one_box() -> None:
    with as_rank(1, 2):
        (shard,) = local_shards("w", distributed(torch.tensor(5.0), cpu_mesh(), [Replicate()]))
    assert (shard.box, shard.data.item()) == (Box((), ()), 5.0)


def test_a_rank_without_elements_holds_no_shard() -> None:
    with as_rank(3, 4):
        assert local_shards("w", distributed(torch.ones(3, 2), cpu_mesh(), [Shard(0)])) == []


def test_a_rank_outside_of_the_mesh_holds_no_shard() -> None:
    with as_rank(0, 3):
        mesh = DeviceMesh("cpu", torch.tensor([1, 2]))
        tensor = DTensor.from_local(torch.ones(2), mesh, [Shard(0)], run_check=False)
        assert local_shards("w", tensor) == []


def test_a_pending_reduction_is_refused_by_its_fqn() -> None:
    with as_rank(0, 2):
        tensor = DTensor.from_local(torch.ones(2), cpu_mesh(), [Partial()], run_check=False)
        with pytest.raises(InvalidInputError, match=r"'model.w' is a DTensor with placement .*P"):
            local_shards("model.w", tensor)


def column_pieces() -> LocalShardsWrapper:
    pieces = [torch.full((4, 2), 1.0), torch.full((4, 3), 2.0)]
    return LocalShardsWrapper(pieces, [(0, 0), (0, 2)])


@pytest.mark.parametrize("is_dtensor", [False, True])
def test_a_class_with_torchs_protocol_reports_its_own_boxes(*, is_dtensor: bool) -> None:
    with as_rank(0, 2):
        tensor: torch.Tensor = column_pieces()
        if is_dtensor:
            tensor = DTensor.from_local(
                tensor, cpu_mesh(), [Shard(1)], run_check=False, shape=(4, 8), stride=(8, 1)
            )
        assert is_sharded(tensor)
        shards = local_shards("t", tensor)
    assert [shard.box for shard in shards] == [Box((0, 0), (4, 2)), Box((0, 2), (4, 3))]
    assert [shard.data.unique().tolist() for shard in shards] == [[1.0], [2.0]]


def test_a_wrapper_that_holds_nothing_reports_no_box() -> None:
    assert local_shards("t", LocalShardsWrapper([], [])) == []


@pytest.mark.parametrize("shape", [(3,), (2, 5), (0,)])
def test_no_shard_is_an_empty_box_of_the_same_dtype(shape: tuple[int, ...]) -> None:
    (shard,) = no_shard(torch.zeros(shape, dtype=torch.float16))
    assert shard.box == Box((0,) * len(shape), (0,) * len(shape))
    assert (shard.data.dtype, shard.data.numel()) == (torch.float16, 0)


def test_a_tensor_without_dimensions_has_no_empty_box() -> None:
    assert no_shard(torch.tensor(1.0)) == []


def test_a_dtensor_is_made_like_another_one() -> None:
    whole = torch.arange(24.0).reshape(6, 4)
    with as_rank(1, 2):
        like = distributed(whole.T, cpu_mesh(), [Shard(1)])  # its strides are not row-major
        local = torch.ones(4, 3, dtype=torch.int8)
        made = distributed_like(like, local)
        assert (made.shape, made.stride(), made.dtype) == (like.shape, like.stride(), torch.int8)
        assert (made.device_mesh, made.placements) == (like.device_mesh, like.placements)
        assert made._local_tensor.data_ptr() == local.data_ptr()
        other = distributed_like(like, torch.ones(2, 3, 5), (2, 6, 5))
        assert (tuple(other.shape), other.stride()) == ((2, 6, 5), (30, 5, 1))
        assert splits_of("w", other) == [Split(1, 2, 1)]


@pytest.fixture
def rank_1_of_2() -> Iterator[None]:
    with as_rank(1, 2):
        yield


def sharded(spans: list[tuple[int, int]], *, rows: int = 6, device: str = "cpu") -> ShardedTensor:
    """Return a ShardedTensor of rows of 3 elements; rank 1 holds `spans`, rank 0 all others."""
    mine = [
        sharded_metadata.ShardMetadata([a, 0], [b - a, 3], f"rank:1/{device}") for a, b in spans
    ]
    held = {row for a, b in spans for row in range(a, b)}
    theirs = [
        sharded_metadata.ShardMetadata([row, 0], [1, 3], f"rank:0/{device}")
        for row in range(rows)
        if row not in held
    ]
    described = sharded_metadata.ShardedTensorMetadata(
        [*mine, *theirs],
        torch.Size([rows, 3]),
        sharded_metadata.TensorProperties(dtype=torch.float32),
    )
    local = [
        ShardOf(torch.arange(a * 3.0, b * 3.0, device=device).reshape(-1, 3), one)
        for (a, b), one in zip(spans, mine, strict=True)
    ]
    made: Any = ShardedTensor._init_from_local_shards_and_global_metadata(local, described)
    assert isinstance(made, ShardedTensor)
    return made


@pytest.mark.usefixtures("rank_1_of_2")
@pytest.mark.parametrize("spans", [[(0, 6)], [(4, 6), (0, 2)], [(2, 2), (2, 5)], []], ids=str)
def test_a_sharded_tensor_has_its_shards_with_elements(spans: list[tuple[int, int]]) -> None:
    tensor = sharded(spans)
    assert is_sharded(tensor)
    whole = torch.arange(18.0).reshape(6, 3)
    shards = local_shards("w", tensor)
    assert [shard.box for shard in shards] == [Box((a, 0), (b - a, 3)) for a, b in spans if b > a]
    assert all(torch.equal(shard.data, whole[shard.box.slices]) for shard in shards)


@pytest.mark.usefixtures("rank_1_of_2")
def test_a_sharded_tensor_without_elements_is_one_empty_box() -> None:
    assert [shard.box for shard in local_shards("w", sharded([(0, 0)], rows=0))] == [
        Box((0, 0), (0, 3))
    ]


@pytest.mark.usefixtures("rank_1_of_2")
def test_a_sharded_tensor_gets_other_local_tensors() -> None:
    tensor = sharded([(0, 2), (4, 6)])
    copies = [shard.tensor + 100 for shard in tensor.local_shards()]
    made = with_shards(tensor, copies)
    assert made.size() == tensor.size()
    assert [shard.box for shard in local_shards("w", made)] == [
        shard.box for shard in local_shards("w", tensor)
    ]
    assert all(
        shard.data is copy for shard, copy in zip(local_shards("w", made), copies, strict=True)
    )
    with pytest.raises(ValueError, match=r"zip\(\)"):
        with_shards(tensor, copies[:1])


@pytest.mark.usefixtures("rank_1_of_2")
def test_flat_items_lose_only_what_this_rank_holds_no_shard_of() -> None:
    held, none, plain = sharded([(0, 2)]), sharded([]), torch.ones(1)
    assert flat_shards({"a": held, "b": none, "c": plain, "d": 5}) == {
        "a": held,
        "c": plain,
        "d": 5,
    }
    items = {"c": plain, "d": 5}
    assert flat_shards(items) == items
    assert flat_shards(items) is not items


@pytest.mark.usefixtures("rank_1_of_2")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tensor_is_on_the_meta_device_where_its_local_data_is(device: str) -> None:
    is_meta = device == "meta"
    assert is_on_meta(torch.ones(2, device=device)) == is_meta
    local = torch.ones(2, device=device)
    assert is_on_meta(DTensor.from_local(local, cpu_mesh(), [Shard(0)], run_check=False)) == is_meta
    assert is_on_meta(sharded([(0, 2)], device=device)) == is_meta


def test_the_fake_group_is_gone_after_its_block() -> None:
    with as_rank(1, 3):
        assert (dist.get_rank(), dist.get_world_size()) == (1, 3)
    assert not dist.is_initialized()
