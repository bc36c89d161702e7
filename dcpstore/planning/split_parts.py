"""Where the parts of a composed tensor lie when ranks hold it together.

A DTensor over a torchao tensor says how the whole is split; each part follows it, in numbers of its
own. Invariant: a part is only split where its elements belong to the elements of the shard, and to
no others; everything else is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from dcpstore.errors import InvalidInputError
from dcpstore.geometry.boxes import Box
from dcpstore.geometry.shards import local_boxes
from dcpstore.planning.shards import splits_of

__all__ = ["split_part", "split_shape"]


def split_part(fqn: str, whole: DTensor, part: torch.Tensor, cut: str) -> torch.Tensor:
    """Return a part of the local tensor of `whole` as a tensor that the ranks hold together.

    It shares the memory of `part`. `cut` is how the part follows the tensor, as `Kind.cuts` has it.

    Raises:
        InvalidInputError: the shard ends inside a block of elements that have one scale, or is not
            one box.
    """
    if cut == "whole" or part.numel() == 1:
        return part
    splits = splits_of(fqn, whole)
    boxes = local_boxes(whole.shape, splits)
    if len(boxes) != 1 or not part.numel():
        raise InvalidInputError(
            f"{fqn!r} is a {type(whole._local_tensor).__name__} over ranks of which this one holds "
            f"{len(boxes)} pieces; only one piece a rank can be stored. Shard it on one mesh "
            "dimension, over ranks that each hold some of it."
        )
    ((box, _),) = boxes
    shape, held = _placed(fqn, whole, box, part, cut)
    if list(held.sizes) != list(part.shape):
        raise _misfit(fqn, whole, part)
    if cut in ("", "flat") and part.dim() in (1, whole.dim()):
        natural = local_boxes(shape, splits)
        if [mine for mine, _ in natural] == [held]:
            return _over(whole, part, shape)
    wrapped = LocalShardsWrapper([part], [held.offsets])
    return _over(whole, wrapped, shape)


def split_shape(fqn: str, like: DTensor, part: tuple[int, ...], cut: str) -> tuple[int, ...]:
    """Return the shape of the part of a shard, where the part of the whole has the shape `part`.

    The whole is split as `like` is.

    Raises:
        InvalidInputError: the shard does not hold whole blocks.
    """
    if cut == "whole" or math.prod(part) == 1:
        return part
    whole, local = tuple(like.shape), tuple(like._local_tensor.shape)
    total, held = (math.prod(whole),), (math.prod(local),)
    if cut != "flat":
        order = [*range(len(whole))]
        if cut == "turned":
            order[-2:] = order[-1], order[-2]
        total, held = tuple(whole[d] for d in order), tuple(local[d] for d in order)
    if len(part) != len(total) or any(
        not n or count % n or size % (count // n)
        for count, size, n in zip(total, held, part, strict=False)
    ):
        raise InvalidInputError(
            f"{fqn!r} of shape {whole} has a part of shape {part}, which does not follow a shard "
            f"of shape {local}; shard it so that each rank holds whole blocks."
        )
    return tuple(size // (count // n) for count, size, n in zip(total, held, part, strict=True))


def _over(whole: DTensor, local: torch.Tensor, shape: tuple[int, ...]) -> DTensor:
    stride = tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
    return DTensor.from_local(
        local,
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=stride,
    )


def _placed(
    fqn: str, whole: DTensor, box: Box, part: torch.Tensor, cut: str
) -> tuple[tuple[int, ...], Box]:
    """Return the global shape of a part, and the box of it that belongs to the box of the whole."""
    total = tuple(whole.shape)
    if cut == "flat":
        if box.sizes[1:] != total[1:]:
            raise _misfit(fqn, whole, part)
        row = math.prod(total[1:])
        inside = Box((box.offsets[0] * row,), (box.volume,))
        return _scaled(fqn, whole, part, (math.prod(total),), inside)
    if part.dim() != len(total):
        raise _misfit(fqn, whole, part)
    order = [*range(len(total))]
    if cut == "turned":
        order[-2:] = order[-1], order[-2]
    inside = Box(tuple(box.offsets[d] for d in order), tuple(box.sizes[d] for d in order))
    return _scaled(fqn, whole, part, tuple(total[d] for d in order), inside)


def _scaled(
    fqn: str,
    whole: DTensor,
    part: torch.Tensor,
    total: Sequence[int],
    inside: Box,
) -> tuple[tuple[int, ...], Box]:
    """Return the same for a part that has one element for some elements of the whole."""
    shape, starts = [], []
    for count, start, size, held in zip(
        total, inside.offsets, inside.sizes, part.shape, strict=True
    ):
        block = size // held if held else 0
        if not block or size % held or start % block or count % block:
            raise _misfit(fqn, whole, part)
        shape.append(count // block)
        starts.append(start // block)
    return tuple(shape), Box(tuple(starts), tuple(part.shape))


def _misfit(fqn: str, whole: DTensor, part: torch.Tensor) -> InvalidInputError:
    return InvalidInputError(
        f"{fqn!r} is a {type(whole._local_tensor).__name__} of shape {tuple(whole.shape)}, split "
        f"over ranks ({', '.join(map(str, whole.placements))}) so that a part of shape "
        f"{tuple(part.shape)} does not follow the split exactly; shard it so that each rank holds "
        "whole blocks and as many rows."
    )
