"""States with tensors that are made of tensors: each becomes a dict of its mark and its parts.

Invariants: what is planned, staged and checked then holds no such tensor, so every planner can
carry it. A part is only split across ranks if its elements belong to the elements of the shard and
to no others; everything else is refused. (A DTensor over a torchao tensor says how the whole is
split, and each part follows it.) At a load, a tensor whose parts keep their sizes is filled in
place; one that must become another tensor is replaced only when all of its parts have arrived.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from dcpstore.compat.torch_private import LocalShardsWrapper
from dcpstore.encoding.composed_tensors import (
    KINDS,
    context_difference,
    describe,
    kind_of,
    parts_of,
    put_together,
)
from dcpstore.encoding.dtypes import torch_dtype
from dcpstore.errors import CorruptionError, InvalidInputError, MismatchError
from dcpstore.formats.composition import MARK, ComposedEntry, Composition, outer_fqns
from dcpstore.geometry.boxes import Box
from dcpstore.geometry.placements import local_boxes
from dcpstore.records import ObjectPath
from dcpstore.state.shards import splits_of
from dcpstore.state.walk import PLAIN, SCALARS, is_container, map_leaves

__all__ = [
    "Assemblies",
    "apart",
    "check_none_composed",
    "composed_place",
    "spliced",
    "split_part",
    "split_shape",
    "take_apart",
]


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


def take_apart(
    state: Any,
    *,
    take: Callable[[ObjectPath, torch.Tensor], dict[str, Any] | None] | None = None,
) -> Any:
    """Return a nested state in which each composed tensor is a dict of its mark and its parts.

    Containers that hold none are returned as they are, all others as new ones.

    Args:
        state: a nested state; a mapping that was taken apart before stays as it is.
        take: returns that dict of a tensor; None is `apart`.

    Raises:
        InvalidInputError: a user's own key is that of the mark; a composed tensor is split over the
            ranks as its parts cannot be.
    """
    take_one = take or apart

    def taken(path: ObjectPath, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            if isinstance(value, Mapping):
                raise InvalidInputError(
                    f"{'.'.join(map(str, (*path, MARK)))!r}: the key {MARK!r} stands for what a "
                    "tensor is made of; rename yours."
                )
            return value
        if type(value) in PLAIN and value.layout is torch.strided:  # which is quick to tell
            return value
        found = take_one(path, value)
        return value if found is None else found

    return map_leaves(state, taken, enters=_is_open, skips=SCALARS)


def _is_open(value: object) -> bool:
    """Tell whether a value is a container, and not one with a user's own key of the mark."""
    if isinstance(value, Mapping) and MARK in value:
        return isinstance(value[MARK], Composition)
    return is_container(value)


def spliced(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a flat state with what `take_apart` made of its tensors as further items of it."""
    flat: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, dict) and MARK in value:
            flat.update(spliced({f"{key}.{name}": part for name, part in value.items()}))
        else:
            flat[key] = value
    return flat


def apart(path: ObjectPath, tensor: torch.Tensor) -> dict[str, Any] | None:
    """Return the mark and the parts of a composed tensor; None for all other tensors.

    Raises:
        InvalidInputError: it is split over the ranks as its parts cannot be, or it cannot be read.
    """
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    kind = kind_of(local)
    if kind is None:
        return None
    fqn = ".".join(map(str, path))
    parts, context = parts_of(kind, local)
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
        InvalidInputError: it holds one, by its FQN.
    """

    def refuse(path: ObjectPath, tensor: torch.Tensor) -> None:
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        kind = kind_of(local)
        if kind is not None:
            raise InvalidInputError(
                f"{'.'.join(map(str, path))!r} is a {kind.name}, which only dcpstore's own load "
                "planner puts together; load it without planner=, or with a subclass of "
                "dcpstore.DefaultLoadPlanner."
            )

    take_apart(state, take=refuse)


def composed_place(
    entry: ComposedEntry, *, device: torch.device, like: torch.Tensor | None = None
) -> torch.Tensor:
    """Return a tensor to load a stored one into, with room for its parts.

    Args:
        entry: of the version.
        device: of the parts.
        like: a DTensor of the same shape says how the ranks hold it.

    Raises:
        DcpstoreError: its class is not installed.
        InvalidInputError: its parts cannot be split so.
    """
    kind = KINDS.get(entry.composition.kind)
    if kind is not None and kind.grows:  # a load takes its sizes from what is stored
        try:
            return put_together(entry.composition, _empty(entry))
        except (LookupError, ValueError) as error:
            raise CorruptionError(
                f"{entry.fqn!r} is not what a {kind.name} is made of ({error}); run 'dcpstore "
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
    local = put_together(entry.composition, parts, split._local_tensor.shape)
    return DTensor.from_local(
        local,
        split.device_mesh,
        split.placements,
        run_check=False,
        shape=split.shape,
        stride=split.stride(),
    )


def _empty(entry: ComposedEntry) -> dict[str, torch.Tensor]:
    """Return the smallest parts that make a tensor of a stored one's kind and shape."""
    stored = {entry.part_name(part): part.tensor for part in entry.parts}
    sizes = {name: [*tensor.shape] for name, tensor in stored.items() if tensor is not None}
    if "indices" in sizes:
        sizes["indices"][-1] = sizes["values"][0] = 0
    elif "offsets" in sizes:
        ragged = json.loads(entry.composition.context)["ragged_idx"]
        sizes["values"][ragged - 1] = 0
    else:
        (columns,) = sizes.keys() & {"col_indices", "row_indices"}
        batch = len(sizes[columns]) - 1
        sizes[columns][batch] = sizes["values"][batch] = 0
    return {
        name: torch.zeros(sizes[name], dtype=torch_dtype(tensor.dtype))
        for name, tensor in stored.items()
        if tensor is not None
    }


_GROWN = ("crow_indices", "ccol_indices", "indices", "col_indices", "row_indices", "offsets")


@dataclass(slots=True)
class _Assembly:
    """A composed tensor of a state: what it was, and its mark and parts as they are filled."""

    path: ObjectPath
    tensor: torch.Tensor
    own: Composition
    node: dict[str, Any]
    first: dict[str, Any]  # the parts before anything is filled


class Assemblies:
    """The composed tensors of a state that is loaded.

    Attributes:
        state: the nested state, with each of them as a dict of its mark and its parts.
        outer: the FQN of the composed tensor, by FQN of its mark and parts.
    """

    def __init__(
        self,
        state: Mapping[str, Any],
        stored: Mapping[str, Any],
        stored_name: Callable[[str], str],
    ) -> None:
        self._stored = stored
        self._stored_name = stored_name
        self._held: dict[str, _Assembly] = {}
        self._pending: Counter[str] = Counter()
        self.state = take_apart(state, take=self._parts_of)
        self.outer: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._held)

    def named(self, fqns: Iterable[str]) -> None:
        """Take the FQNs by which the state is planned, marks and parts included."""
        if self._held:
            self.outer = {part: fqn for part, fqn in outer_fqns(fqns).items() if fqn in self._held}

    def tensor(self, fqn: str) -> torch.Tensor:
        """Return a composed tensor as the state holds it."""
        return self._held[fqn].tensor

    def path(self, fqn: str) -> ObjectPath | None:
        """Return where a composed tensor stands in the state; None for other FQNs."""
        held = self._held.get(fqn)
        return None if held is None else held.path

    def place(self, fqn: str) -> tuple[dict[str, Any], str]:
        """Return the dict that holds a mark or part, and its key there."""
        outer = self.outer[fqn]
        return self._held[outer].node, fqn[len(outer) + 1 :]

    def name_of(self, fqn: str) -> str:
        """Return the FQN in the version of an FQN in the state; parts go with their tensor."""
        outer = self.outer.get(fqn)
        return self._stored_name(fqn) if outer is None else self._part_name(outer, fqn)

    def difference(self, fqn: str, composition: Composition | None) -> str | None:
        """Return how what is stored for the composed tensor `fqn` differs from what the state has.

        Args:
            fqn: in the state.
            composition: what the version says of it; None where that is not known yet.
        """
        own = self._held[fqn].own
        name = self._stored_name(fqn)
        if f"{name}.{MARK}" not in self._stored:
            kept = self._stored.get(name)
            if kept is None:
                return f"{fqn!r}, a {own.kind} in the state, is not in the version"
            what = "a tensor" if isinstance(kept, TensorStorageMetadata) else "a value"
            return (
                f"{fqn!r} is {what} in the version, and a {own.kind} in the state; load it into a "
                "plain tensor, and convert that"
            )
        difference = None if composition is None else context_difference(composition, own)
        return None if difference is None else f"{fqn!r} {difference}"

    def is_stored(self, fqn: str) -> bool:
        """Tell whether the version holds something for the composed tensor `fqn`."""
        name = self._stored_name(fqn)
        return f"{name}.{MARK}" in self._stored or name in self._stored

    def expect(self, fqns: Iterable[str]) -> None:
        """Count what is to come, an FQN of a mark or part for each read item."""
        self._pending = Counter(self.outer[fqn] for fqn in fqns if fqn in self.outer)

    def arrived(self, fqn: str) -> tuple[str, torch.Tensor] | None:
        """Count an item as read; return the FQN and the tensor where it is the last of its parts.

        Raises:
            MismatchError: what came is another kind of tensor.
        """
        outer = self.outer.get(fqn)
        if outer is None or outer not in self._pending:
            return None
        self._pending[outer] -= 1
        if self._pending[outer]:
            return None
        del self._pending[outer]
        return outer, self._together(outer, self._held[outer])

    def _parts_of(self, path: ObjectPath, tensor: torch.Tensor) -> dict[str, Any] | None:
        node = apart(path, tensor)
        if node is None:
            return None
        fqn = ".".join(map(str, path))
        own = node[MARK]
        if KINDS[own.kind].grows:
            node = {MARK: own, **self._grown(fqn, tensor, node)}
        self._held[fqn] = _Assembly(path, tensor, own, node, dict(node))
        return node

    def _grown(self, fqn: str, tensor: torch.Tensor, node: dict[str, Any]) -> dict[str, Any]:
        """Return places as large as what is stored, for parts that have no size of their own."""
        places = {}
        for part in (*_GROWN, "values", "lengths"):
            kept = self._stored.get(self._part_name(fqn, f"{fqn}.{part}"))
            mine = node.get(part)
            if isinstance(kept, TensorStorageMetadata) and (mine is not None or part == "lengths"):
                dtype = kept.properties.dtype if mine is None else mine.dtype
                places[part] = torch.empty(kept.size, dtype=dtype, device=tensor.device)
            elif mine is not None:
                places[part] = mine
        return places

    def _part_name(self, outer: str, fqn: str) -> str:
        return self._stored_name(outer) + fqn[len(outer) :]

    def _together(self, fqn: str, held: _Assembly) -> torch.Tensor:
        stored: Composition = held.node[MARK]
        difference = context_difference(stored, held.own)
        if difference is not None:
            raise MismatchError.listing([f"{fqn!r} {difference}"])
        parts = {name: part for name, part in held.node.items() if name != MARK}
        if not KINDS[held.own.kind].grows and all(parts[n] is held.first[n] for n in parts):
            return held.tensor  # filled where they are
        # where values are converted, they are by now
        made = _whole(held.tensor, dataclasses.replace(stored, dtype=held.own.dtype), parts)
        return _in_place(held.tensor, made)


def _whole(
    tensor: torch.Tensor, stored: Composition, parts: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return put_together(stored, parts)
    local = tensor._local_tensor
    made = put_together(
        stored,
        {n: part._local_tensor if isinstance(part, DTensor) else part for n, part in parts.items()},
        local.shape,
    )
    return DTensor.from_local(
        made,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.size(),
        stride=tensor.stride(),
    )


@torch.no_grad()
def _in_place(tensor: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """Return `tensor` with what was made, or what was made where it cannot hold it."""
    if tensor.layout in (torch.strided, torch.jagged) or tensor.is_meta:
        if isinstance(tensor, torch.nn.Parameter) and not isinstance(made, torch.nn.Parameter):
            return torch.nn.Parameter(made, requires_grad=tensor.requires_grad)
        return made
    if tensor.layout is torch.sparse_coo:
        tensor.copy_(made)
    else:
        needs_grad = tensor.requires_grad
        tensor.requires_grad_(False)  # torch resizes no other
        tensor.resize_as_sparse_(made).copy_(made)
        tensor.requires_grad_(needs_grad)
    return tensor
