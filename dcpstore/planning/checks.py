"""What a global save plan must satisfy before a byte is written.

Invariant: the boxes of each tensor lie inside its shape and tile it, and all ranks mean the same
tensor by an FQN (design, invariant 4). A breach names the FQN and the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from dcpstore.errors import InvalidInputError
from dcpstore.geometry.boxes import Box, find_overlap

__all__ = ["check_agreement", "check_tiling", "item_box"]

_SHOWN = 8  # problems in one message; more would bury the first


def item_box(item: WriteItem) -> Box:
    """Return the box of the global tensor that a tensor item writes."""
    assert item.tensor_data is not None
    return Box(tuple(item.tensor_data.chunk.offsets), tuple(item.tensor_data.chunk.sizes))


def check_agreement(plans: Sequence[SavePlan]) -> None:
    """Check that an FQN has the same kind, dtype and shape on all ranks that hold it.

    Raises:
        InvalidInputError: naming each such FQN, what it is, and on which ranks.
    """
    first: dict[str, tuple[torch.dtype, torch.Size] | None] = {}
    odd: set[str] = set()
    for plan in plans:
        for item in plan.items:
            kind = _kind(item)
            if first.setdefault(item.index.fqn, kind) != kind:
                odd.add(item.index.fqn)
    problems = []
    for fqn in sorted(odd):
        ranks: dict[str, list[int]] = {}
        for rank, plan in enumerate(plans):
            for text in {_described(item) for item in plan.items if item.index.fqn == fqn}:
                ranks.setdefault(text, []).append(rank)
        told = ", ".join(f"{text} on {_ranks(held)}" for text, held in ranks.items())
        problems.append(f"{fqn!r} is {told}")
    _raise_if(problems, "the ranks disagree; give every rank the same model and the same state")


def check_tiling(plans: Sequence[SavePlan]) -> None:
    """Check that the boxes of each tensor lie inside it, do not overlap and fill it.

    A value must be written once.

    Raises:
        InvalidInputError: naming each breach with its FQN and ranks.
    """
    written: dict[str, list[tuple[int, WriteItem]]] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            written.setdefault(item.index.fqn, []).append((rank, item))
    problems = [
        problem
        for fqn, items in written.items()
        if (problem := _tiling_problem(fqn, items)) is not None
    ]
    _raise_if(problems, "the shards of a tensor must tile it; check the mesh and the placements")


def _tiling_problem(fqn: str, items: Sequence[tuple[int, WriteItem]]) -> str | None:
    if items[0][1].tensor_data is None:
        twice = [rank for rank, _ in items]
        return f"value {fqn!r} is planned by {_ranks(twice)}" if len(twice) > 1 else None
    shape = tuple(items[0][1].tensor_data.size)
    boxes = [item_box(item) for _, item in items]
    for (rank, _), box in zip(items, boxes, strict=True):
        if len(box.sizes) != len(shape) or any(
            o < 0 or s < 0 or o + s > n
            for o, s, n in zip(box.offsets, box.sizes, shape, strict=True)
        ):
            return f"{fqn!r} of shape {shape}: {_box(box)} of rank {rank} reaches outside"
    overlap = find_overlap(boxes)
    if overlap is not None:
        a, b = overlap
        return (
            f"{fqn!r} of shape {shape}: {_box(boxes[a])} of rank {items[a][0]} overlaps "
            f"{_box(boxes[b])} of rank {items[b][0]}"
        )
    volume = sum(box.volume for box in boxes)
    if volume != math.prod(shape):
        held = sorted({rank for rank, _ in items})
        return (
            f"{fqn!r} of shape {shape}: {_ranks(held)} hold {volume} of {math.prod(shape)} elements"
        )
    return None


def _kind(item: WriteItem) -> tuple[torch.dtype, torch.Size] | None:
    data = item.tensor_data
    return None if data is None else (data.properties.dtype, data.size)


def _described(item: WriteItem) -> str:
    data = item.tensor_data
    if data is None:
        return "a value"
    return f"{str(data.properties.dtype).removeprefix('torch.')} {tuple(data.size)}"


def _box(box: Box) -> str:
    return f"the box at {box.offsets} of sizes {box.sizes}"


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _raise_if(problems: Sequence[str], next_step: str) -> None:
    if problems:
        more = len(problems) - _SHOWN
        tail = f"; and {more} more" if more > 0 else ""
        raise InvalidInputError(f"{'; '.join(problems[:_SHOWN])}{tail}: {next_step}.")
