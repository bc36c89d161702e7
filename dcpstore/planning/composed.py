"""States with tensors that are made of tensors: each as a dict of its mark and its parts.

Invariant: what is planned, staged and checked then holds no such tensor, so that every planner can
carry it.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dcpstore.compositions import MARK, ComposedEntry, Composition
from dcpstore.encoding.composed import describe, parts_of, put_together
from dcpstore.encoding.dtypes import torch_dtype
from dcpstore.encoding.kinds import KINDS, kind_of
from dcpstore.errors import CorruptionError, InvalidInputError
from dcpstore.planning.split_parts import split_part, split_shape
from dcpstore.records import ObjectPath

__all__ = ["apart", "check_none_composed", "composed_place", "spliced", "take_apart"]

_SCALARS = frozenset([int, float, str, bool, type(None)])


def take_apart(
    state: Any,
    path: ObjectPath = (),
    *,
    take: Callable[[ObjectPath, torch.Tensor], dict[str, Any] | None] | None = None,
) -> Any:
    """Return a nested state in which each composed tensor is a dict of its mark and its parts.

    Containers that hold none are returned as they are, all others as new ones.

    Args:
        state: a nested state; a mapping that was taken apart before stays as it is.
        path: where it lies in a larger one.
        take: returns that dict of a tensor; None is `apart`.

    Raises:
        InvalidInputError: a user's own key is that of the mark; a composed tensor is split over the
            ranks as its parts cannot be.
    """
    take_one = take or apart

    def taken(value: Any, path: ObjectPath) -> Any:
        if isinstance(value, torch.Tensor):
            found = None if _is_plain(value) else take_one(path, value)
            return value if found is None else found
        if isinstance(value, Mapping):
            _check_marks(value, path)
            pairs: Iterable[tuple[Any, Any]] = value.items()
        elif isinstance(value, list | tuple) and not isinstance(value, torch.Size):
            pairs = enumerate(value)
        else:
            return value
        changed = {}
        for key, inner in pairs:
            if not _is_plain(inner):
                new = taken(inner, (*path, key))
                if new is not inner:
                    changed[key] = new
        if not changed:
            return value
        if isinstance(value, list | tuple):
            items = [changed.get(i, inner) for i, inner in enumerate(value)]
            return items if isinstance(value, list) else tuple(items)
        found = {key: changed.get(key, inner) for key, inner in value.items()}
        return OrderedDict(found) if isinstance(value, OrderedDict) else found

    return taken(state, path)


def _is_plain(value: object) -> bool:
    """Tell of most values, and quickly, that nothing in them is composed."""
    kind = type(value)
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        return value.layout is torch.strided  # type: ignore[attr-defined]  # it is a tensor
    return kind in _SCALARS


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
    """Return the mark and the parts of a composed tensor; None where it is none that we know.

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


def _check_marks(state: Mapping[Any, Any], path: ObjectPath) -> None:
    if MARK in state and not isinstance(state[MARK], Composition):
        raise InvalidInputError(
            f"{'.'.join(map(str, (*path, MARK)))!r}: the key {MARK!r} stands for what a tensor is "
            "made of; rename yours."
        )


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
