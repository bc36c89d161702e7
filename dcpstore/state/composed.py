"""States with composed tensors, which are made of tensors: each becomes a dict of mark and parts.

Invariants: planners, staging and checks then see no composed tensor, so every planner can handle
the state. A part is split across ranks only if its elements belong to the elements of one rank's
shard and to no others; all else is refused. (A DTensor over a torchao tensor says how the whole is
split, and each part follows that.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dcpstore.compat.torch_private import LocalShardsWrapper
from dcpstore.encoding.composed_tensors import KINDS, describe, kind_of, parts_of, put_together
from dcpstore.encoding.dtypes import torch_dtype
from dcpstore.errors import CorruptionError, InvalidInputError
from dcpstore.formats.composition import MARK, ComposedEntry, Composition
from dcpstore.geometry.boxes import Box
from dcpstore.geometry.placements import local_boxes
from dcpstore.records import ObjectPath
from dcpstore.state.shards import distributed_like, local_of, splits_of
from dcpstore.state.walk import PLAIN, SCALARS, fqn_of, is_container, map_leaves

__all__ = [
    "check_none_composed",
    "composed_target",
    "flatten_parts",
    "split_part",
    "split_shape",
    "take_apart",
    "tensor_parts",
]


def split_part(fqn: str, whole: DTensor, part: torch.Tensor, cut: str) -> torch.Tensor:
    """Return a part of the local tensor of `whole` as a tensor that the ranks hold together.

    It shares the memory of `part`. `cut` is how the part follows the tensor, as in `Kind.cuts`.

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
            f"{fqn!r} is a {type(whole._local_tensor).__name__} split over ranks, and this rank "
            f"holds {len(boxes)} pieces of it; only one piece a rank can be stored. Shard it on "
            "one mesh dimension, over ranks that each hold some of it."
        )
    ((box, _),) = boxes
    shape, held = _box_of_part(fqn, whole, box, part, cut)
    # Where torch would split a tensor of the part's shape in the same way, the part is an ordinary
    # DTensor. Elsewhere (turned dimensions, uneven blocks) only the wrapper can state the box.
    if (
        cut != "turned"
        and all(split.dim < len(shape) for split in splits)
        and [mine for mine, _ in local_boxes(shape, splits)] == [held]
    ):
        return distributed_like(whole, part, shape)
    return distributed_like(whole, LocalShardsWrapper([part], [held.offsets]), shape)


def split_shape(fqn: str, like: DTensor, part: tuple[int, ...], cut: str) -> tuple[int, ...]:
    """Return the shape of the part of a shard, where the part of the whole has the shape `part`.

    The whole is split as `like` is.

    Raises:
        InvalidInputError: the shard does not hold whole blocks.
    """
    if cut == "whole" or math.prod(part) == 1:
        return part
    whole, local = tuple(like.shape), tuple(like._local_tensor.shape)
    total, held = _in_part_order(whole, cut), _in_part_order(local, cut)
    if cut == "flat":
        total, held = (math.prod(whole),), (math.prod(local),)
    if len(part) != len(total) or any(
        not n or count % n or size % (count // n)
        for count, size, n in zip(total, held, part, strict=False)
    ):
        raise InvalidInputError(
            f"{fqn!r} of shape {whole} has a part of shape {part}, which does not follow a shard "
            f"of shape {local}; shard it so that each rank holds whole blocks."
        )
    return tuple(size // (count // n) for count, size, n in zip(total, held, part, strict=True))


def _in_part_order(numbers: Sequence[int], cut: str) -> tuple[int, ...]:
    """Return one number for each dimension of the whole in the order of the part's dimensions."""
    if cut == "turned":
        return (*numbers[:-2], numbers[-1], numbers[-2])
    return tuple(numbers)


def _box_of_part(
    fqn: str, whole: DTensor, box: Box, part: torch.Tensor, cut: str
) -> tuple[tuple[int, ...], Box]:
    """Return the global shape of a part, and the box of it that belongs to the box of the whole.

    The part has one element for each block of elements of the whole; a block may be one element.
    """
    total = tuple(whole.shape)
    starts, sizes, is_fit = box.offsets, box.sizes, True
    if cut == "flat":  # whole rows are one interval of the flat part, anything else is several
        is_fit, row = sizes[1:] == total[1:], math.prod(total[1:])
        total, starts, sizes = (math.prod(total),), (starts[0] * row,), (box.volume,)
    total, starts, sizes = (_in_part_order(numbers, cut) for numbers in (total, starts, sizes))
    shape, offsets = [], []
    for count, start, size, held in zip(total, starts, sizes, part.shape, strict=False):
        block = size // held if held else 0
        is_fit = is_fit and bool(block) and not (size % held or start % block or count % block)
        if is_fit:
            shape.append(count // block)
            offsets.append(start // block)
    if not is_fit or part.dim() != len(total):
        raise InvalidInputError(
            f"{fqn!r} is a {type(whole._local_tensor).__name__} of shape {tuple(whole.shape)}, "
            f"split over ranks ({', '.join(map(str, whole.placements))}) so that a part of shape "
            f"{tuple(part.shape)} does not follow the split exactly; shard it so that each rank "
            "holds whole blocks and as many rows."
        )
    return tuple(shape), Box(tuple(offsets), tuple(part.shape))


def take_apart(
    state: Any,
    *,
    take: Callable[[ObjectPath, torch.Tensor], dict[str, Any] | None] | None = None,
) -> Any:
    """Return a nested state in which each composed tensor is a dict of its mark and its parts.

    Containers that hold none are returned as they are, all others as new ones.

    Args:
        state: a nested state; a mapping that was taken apart before stays as it is.
        take: returns that dict for a tensor, or None for a tensor that stays; by default
            `tensor_parts`.

    Raises:
        InvalidInputError: a key of the caller's own is the reserved key of the mark; a composed
            tensor is split over the ranks in a way in which its parts cannot be.
    """
    take_one = take or tensor_parts

    def taken(path: ObjectPath, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            if isinstance(value, Mapping):
                raise InvalidInputError(
                    f"{fqn_of((*path, MARK))!r}: the key {MARK!r} is reserved for tensors that are "
                    "made of tensors; rename yours."
                )
            return value
        if type(value) in PLAIN and value.layout is torch.strided:  # a quick test first
            return value
        found = take_one(path, value)
        return value if found is None else found

    return map_leaves(state, taken, enters=_is_open, skips=SCALARS)


def _is_open(value: object) -> bool:
    """Tell whether a value is a container, and not one in which a caller uses the mark's key."""
    if isinstance(value, Mapping) and MARK in value:
        return isinstance(value[MARK], Composition)
    return is_container(value)


def flatten_parts(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a flat state with the marks and parts of `take_apart` as items of it too."""
    flat: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, dict) and MARK in value:
            # A part may be a composed tensor itself.
            flat.update(flatten_parts({f"{key}.{name}": part for name, part in value.items()}))
        else:
            flat[key] = value
    return flat


def tensor_parts(path: ObjectPath, tensor: torch.Tensor) -> dict[str, Any] | None:
    """Return the mark and the parts of a composed tensor; None for all other tensors.

    Raises:
        InvalidInputError: it is split over the ranks in a way in which its parts cannot be, or what
            describes it cannot be stored.
    """
    kind = kind_of(local_of(tensor))
    if kind is None:
        return None
    fqn = fqn_of(path)
    parts, context = parts_of(kind, local_of(tensor))
    if isinstance(tensor, DTensor):
        parts = {
            name: split_part(fqn, tensor, part, kind.cuts.get(name, ""))
            for name, part in parts.items()
        }
    try:
        mark = describe(kind, tensor, parts, context)
    except InvalidInputError as error:
        raise InvalidInputError(f"{fqn!r}, a {kind.name}: {error}") from error
    return {MARK: mark, **parts}


def check_none_composed(state: Mapping[str, Any]) -> None:
    """Check that a state holds no composed tensor, for a load planner that is not ours.

    Raises:
        InvalidInputError: it holds one; the error names its FQN.
    """

    def refuse(path: ObjectPath, tensor: torch.Tensor) -> None:
        kind = kind_of(local_of(tensor))
        if kind is not None:
            raise InvalidInputError(
                f"{fqn_of(path)!r} is a {kind.name}, which only dcpstore's own load planner can "
                "put together; load it without planner=, or with a subclass of "
                "dcpstore.DefaultLoadPlanner."
            )

    take_apart(state, take=refuse)


def composed_target(
    entry: ComposedEntry, *, device: torch.device, like: torch.Tensor | None = None
) -> torch.Tensor:
    """Return a tensor into which a stored one can be loaded, with memory for its parts.

    Args:
        entry: the stored tensor.
        device: of the parts.
        like: where it is a DTensor of the same shape, the result is split over the ranks as it is.

    Raises:
        CorruptionError: the stored parts are not those of its kind.
        DcpstoreError: its class is not installed.
        InvalidInputError: its parts cannot be split in this way.
    """
    kind = KINDS.get(entry.composition.kind)
    if kind is not None and kind.grows:  # the load takes the sizes of the parts from the version
        try:
            return put_together(entry.composition, _smallest_parts(entry))
        except (LookupError, ValueError) as error:
            raise CorruptionError(
                f"the parts of {entry.fqn!r} do not make a {kind.name} ({error}); run 'dcpstore "
                "verify'."
            ) from error
    cuts = {} if kind is None else kind.cuts
    is_split = isinstance(like, DTensor) and tuple(like.shape) == entry.composition.shape
    split = like if isinstance(like, DTensor) and is_split else None
    parts = {}
    for part in entry.parts:
        assert part.tensor is not None
        name, size = entry.part_name(part), part.tensor.shape
        if split is not None:
            size = split_shape(entry.fqn, split, size, cuts.get(name, ""))
        parts[name] = torch.zeros(size, dtype=torch_dtype(part.tensor.dtype), device=device)
    if split is None:
        return put_together(entry.composition, parts)
    return distributed_like(
        split, put_together(entry.composition, parts, split._local_tensor.shape)
    )


def _smallest_parts(entry: ComposedEntry) -> dict[str, torch.Tensor]:
    """Return the smallest parts that make a tensor of the stored one's kind and shape."""
    stored = {entry.part_name(part): part.tensor for part in entry.parts}
    sizes = {name: [*tensor.shape] for name, tensor in stored.items() if tensor is not None}
    if "indices" in sizes:
        sizes["indices"][-1] = sizes["values"][0] = 0  # COO without an element
    elif "offsets" in sizes:
        ragged = json.loads(entry.composition.context)["ragged_idx"]
        sizes["values"][ragged - 1] = 0
    else:  # a compressed layout: its values follow the batch dimensions
        (columns,) = sizes.keys() & {"col_indices", "row_indices"}
        batch = len(sizes[columns]) - 1
        sizes[columns][batch] = sizes["values"][batch] = 0
    return {
        name: torch.zeros(sizes[name], dtype=torch_dtype(tensor.dtype))
        for name, tensor in stored.items()
        if tensor is not None
    }
