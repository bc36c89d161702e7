"""What one rank holds of a tensor: boxes of the global tensor, with local views of their data.

The only module that knows how torch's classes place a tensor on ranks, `_StridedShard`
among them; the rooms above see only boxes and plain tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor, Replicate, Shard

from dcpstore.compat.torch_private import (
    ShardedTensor,
    ShardedTensorBase,
    ShardOf,
    StridedShard,
    flatten_sharded_tensors,
    splits_uneven_strides,
)
from dcpstore.errors import InvalidInputError
from dcpstore.geometry.boxes import Box
from dcpstore.geometry.placements import Split, local_boxes

__all__ = [
    "LocalShard",
    "distributed_like",
    "flat_shards",
    "is_on_meta",
    "is_sharded",
    "local_of",
    "local_shards",
    "no_shard",
    "splits_of",
    "with_shards",
]


@dataclass(frozen=True, slots=True)
class LocalShard:
    """A box of a global tensor, and a view of its data with the sizes of the box."""

    box: Box
    data: torch.Tensor


_PLAIN = (torch.Tensor, torch.nn.Parameter)  # exact types that are never sharded: a quick test


def is_sharded(tensor: torch.Tensor) -> bool:
    """Tell whether several ranks hold `tensor` together."""
    return type(tensor) not in _PLAIN and (
        isinstance(tensor, DTensor | ShardedTensor) or hasattr(tensor, "__create_chunk_list__")
    )


def flat_shards(items: Mapping[str, Any]) -> dict[str, Any]:
    """Return flat items with nested ShardedTensors flattened into one, as torch does it.

    A ShardedTensor of which this rank holds no shard is left out.
    """
    sharded = {fqn: item for fqn, item in items.items() if isinstance(item, ShardedTensor)}
    if not sharded:
        return dict(items)
    flat = flatten_sharded_tensors(sharded)
    return {
        fqn: flat.get(fqn, item) for fqn, item in items.items() if fqn in flat or fqn not in sharded
    }


def local_shards(fqn: str, tensor: torch.Tensor) -> list[LocalShard]:
    """Return the shards of `tensor` that this rank holds; none if it holds none of its elements.

    A tensor without elements is one shard of volume 0, so that the plan still contains it.

    Raises:
        InvalidInputError: a DTensor with a pending reduction (`Partial`) or an unknown placement.
    """
    if not is_sharded(tensor):
        return [LocalShard(Box.whole(tensor.shape), tensor)]
    if isinstance(tensor, DTensor):
        return _of_dtensor(fqn, tensor)
    if isinstance(tensor, ShardedTensor):
        return _of_sharded_tensor(tensor)
    return _of_checkpointable(fqn, tensor)


def is_on_meta(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor has no memory here; of a ShardedTensor, its local shards decide."""
    if isinstance(tensor, ShardedTensor):
        return any(shard.tensor.is_meta for shard in tensor.local_shards())
    return tensor.is_meta


def with_shards(like: ShardedTensor, tensors: Sequence[torch.Tensor]) -> ShardedTensor:
    """Return a ShardedTensor for a planner: `like`, with `tensors` as its local shards."""
    shards = [
        ShardOf(tensor, shard.metadata)
        for tensor, shard in zip(tensors, like.local_shards(), strict=True)
    ]
    # Made by the base class: the public constructor checks on which device the shards are, and
    # these are copies on another one.
    made: Any = ShardedTensorBase._init_from_local_shards_and_global_metadata(
        shards, like.metadata(), like.sharding_spec()
    )
    made._prepare_init(process_group=like._process_group)
    assert isinstance(made, ShardedTensor)
    return made


def no_shard(tensor: torch.Tensor) -> list[LocalShard]:
    """Return one empty box of a tensor, which reports only that the tensor exists.

    A tensor without dimensions has no empty box, and is not reported.
    """
    if not tensor.dim():
        return []
    sizes = (0,) * tensor.dim()
    return [LocalShard(Box(sizes, sizes), torch.empty(sizes, dtype=tensor.dtype, device="cpu"))]


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the local tensor of a DTensor, without a copy or a gradient; others as they are."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def distributed_like(
    like: DTensor, local: torch.Tensor, shape: Sequence[int] | None = None
) -> DTensor:
    """Return a DTensor of which this rank holds `local`, on the mesh and placements of `like`.

    Args:
        like: the DTensor to follow.
        local: what this rank holds; not checked against the other ranks, as that would be a
            collective call.
        shape: the global shape, in elements, row-major; None is the shape and strides of `like`.
    """
    size = like.size() if shape is None else torch.Size(shape)
    stride = (
        like.stride()
        if shape is None
        else tuple(math.prod(size[dim + 1 :]) for dim in range(len(size)))
    )
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=size, stride=stride
    )


def _of_sharded_tensor(tensor: ShardedTensor) -> list[LocalShard]:
    shards = [
        LocalShard(Box(tuple(s.metadata.shard_offsets), tuple(s.metadata.shard_sizes)), s.tensor)
        for s in tensor.local_shards()
    ]
    # Empty shards are dropped: their offsets may be those of another shard.
    live = [shard for shard in shards if shard.box.volume]
    return live if live or tensor.size().numel() else shards[:1]


@torch.no_grad()
def _of_dtensor(fqn: str, tensor: DTensor) -> list[LocalShard]:
    if tensor.device_mesh.get_coordinate() is None:  # this rank is outside the mesh
        return []
    if hasattr(tensor._local_tensor, "__create_chunk_list__"):
        return _of_checkpointable(fqn, tensor._local_tensor)
    local = tensor.to_local()
    if not tensor.numel():
        return [LocalShard(Box.whole(tensor.shape), local.new_empty(tensor.shape))]
    return [
        LocalShard(box, local[inside.slices])
        for box, inside in local_boxes(tensor.shape, splits_of(fqn, tensor))
    ]


def splits_of(fqn: str, tensor: DTensor) -> list[Split]:
    """Return how a DTensor is split over its mesh, of which this rank is a member.

    Raises:
        InvalidInputError: a pending reduction (`Partial`), an unknown placement, or a strided
            split that this release of torch makes in another way.
    """
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    splits = []
    mesh = zip(tensor.device_mesh.shape, coordinate, tensor.placements, strict=True)
    for count, index, placement in mesh:
        if isinstance(placement, StridedShard):
            splits.append(Split(placement.dim, count, index, int(placement.split_factor)))
        elif isinstance(placement, Shard):
            splits.append(Split(placement.dim, count, index))
        elif not isinstance(placement, Replicate):
            raise InvalidInputError(
                f"{fqn!r} is a DTensor with placement {placement}, so no rank has its complete "
                "values; redistribute it to Replicate() or Shard(dim) before the save."
            )
    if not splits_uneven_strides():
        _check_even_strides(fqn, tensor.shape, splits)
    return splits


def _check_even_strides(fqn: str, shape: Sequence[int], splits: Sequence[Split]) -> None:
    """Refuse a strided split into pieces of unequal size, which older torch splits differently."""
    sizes = list(shape)
    for split in splits:
        size = sizes[split.dim]
        if split.factor > 1 and size % (split.count * split.factor):
            raise InvalidInputError(
                f"{fqn!r} is a DTensor whose dimension {split.dim} of {size} elements is split by "
                f"_StridedShard into {split.count} x {split.factor} pieces of unequal size, which "
                f"torch {torch.__version__} lays out in another way than newer ones; pad it, or "
                "install a newer torch."
            )
        piece = -(-size // split.count)
        sizes[split.dim] = max(min(piece, size - piece * split.index), 0)


@torch.no_grad()
def _of_checkpointable(fqn: str, tensor: Any) -> list[LocalShard]:
    """Return the shards that a tensor subclass reports by torch's checkpoint protocol."""
    return [
        LocalShard(
            Box(tuple(chunk.offsets), tuple(chunk.sizes)),
            tensor.__get_tensor_shard__(MetadataIndex(fqn, chunk.offsets, i)),
        )
        for i, chunk in enumerate(tensor.__create_chunk_list__())
        if math.prod(chunk.sizes)  # torch's LocalShardsWrapper reports an empty one for no shards
    ]
