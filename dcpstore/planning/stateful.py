"""Modules, optimizers and whatever else has `state_dict()`: to plain state and back.

Invariant: all ranks call `state_dict()` of the same keys in the same order, for it may be a
collective call (FSDP's is).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeGuard

import torch
from torch.distributed.checkpoint.stateful import Stateful

from dcpstore.encoding.dtypes import torch_dtype
from dcpstore.errors import InvalidInputError
from dcpstore.records import EntryRecord

__all__ = [
    "PerRank",
    "check_keys",
    "give_state",
    "optimizer_names",
    "own_names",
    "take_state",
    "take_template",
]


def check_keys(state_dict: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the sorted keys of a state dict.

    Raises:
        InvalidInputError: it is no mapping, or a key is not text.
    """
    if not isinstance(state_dict, Mapping):
        raise InvalidInputError(
            f"the state is a {type(state_dict).__name__}; pass a dict such as {{'model': model}}."
        )
    odd = [key for key in state_dict if not isinstance(key, str)]
    if odd:
        raise InvalidInputError(f"the state's keys must be text, and {odd[0]!r} is not; rename it.")
    return tuple(sorted(state_dict))


class PerRank:
    """A value or tensor of which each rank keeps its own, such as its random state.

    It stands anywhere in a state, and is stored as one entry a rank ("rng.rank-3"). A load gives
    each rank its own again. Where the number of ranks has grown, the ranks that saved none keep
    what they have, and the report names their entries as missing; where it has shrunk, the entries
    of the ranks that are gone are named as unexpected.

    Attributes:
        value: what this rank saves, or has loaded.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"PerRank({self.value!r})"


def take_state(state_dict: Mapping[str, Any], keys: Iterable[str], *, rank: int) -> dict[str, Any]:
    """Return the plain state of `state_dict`; `keys` are those of all ranks, in one order."""
    return {
        key: _with_own(value.state_dict() if _is_stateful(value) else value, rank)
        for key, value in ((key, state_dict[key]) for key in keys if key in state_dict)
    }


def give_state(state_dict: dict[str, Any], filled: Mapping[str, Any], *, rank: int) -> None:
    """Hand the `filled` plain state back to the objects that it came from."""
    for key, value in filled.items():
        owner = state_dict[key]
        if isinstance(owner, torch.nn.Module) and _is_on_meta(owner, value):
            owner.load_state_dict(value, assign=True)  # there is nothing to copy into
        elif _is_stateful(owner):
            owner.load_state_dict(value)
        else:
            state_dict[key] = _given_back(owner, value, rank)


def _is_stateful(value: Any) -> TypeGuard[Stateful]:
    """Tell whether a value has a state of its own; of a tensor, which has none, it is not asked."""
    return not isinstance(value, torch.Tensor) and isinstance(value, Stateful)


def _is_on_meta(module: torch.nn.Module, names: Iterable[str]) -> bool:
    """Tell whether any of the tensors that a module's state names is on the meta device."""
    tensors = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    return any(tensors[name].is_meta for name in names if name in tensors)


def own_names(state_dict: Mapping[str, Any], *, rank: int) -> list[str]:
    """Return the FQNs below which a version may lack entries: those of `PerRank` values."""
    return [".".join((*path, _own_name(rank))) for path in _own_paths(state_dict, ())]


def _own_name(rank: int) -> str:
    return f"rank-{rank}"


def _own_paths(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if isinstance(value, PerRank):
        yield path
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _own_paths(inner, (*path, str(key)))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _own_paths(inner, (*path, str(i)))


def _with_own(value: Any, rank: int) -> Any:
    """Return a state with each `PerRank` as a dict of this rank's value alone."""
    if isinstance(value, PerRank):
        return {_own_name(rank): value.value}
    if not any(True for _ in _own_paths(value, ())):
        return value
    if isinstance(value, Mapping):
        return {key: _with_own(inner, rank) for key, inner in value.items()}
    return [_with_own(inner, rank) for inner in value]


def _given_back(owner: Any, filled: Any, rank: int) -> Any:
    """Return the filled state for `owner`'s place, with `PerRank` values in their objects."""
    if isinstance(owner, PerRank):
        owner.value = filled[_own_name(rank)]
        return owner
    if owner is filled or not any(True for _ in _own_paths(owner, ())):
        return filled
    if isinstance(owner, Mapping):
        return {key: _given_back(owner.get(key), inner, rank) for key, inner in filled.items()}
    return [_given_back(mine, inner, rank) for mine, inner in zip(owner, filled, strict=True)]


def take_template(
    state_dict: Mapping[str, Any],
    keys: Iterable[str],
    entries: Iterable[EntryRecord],
    *,
    rank: int,
) -> dict[str, Any]:
    """Return the plain state of `state_dict` as something to load into.

    An optimizer that has taken no step yet has no state to fill. It gets what the version holds for
    its parameters, each laid out like its parameter where it has the same shape.

    Raises:
        InvalidInputError: an optimizer's parameters are on the meta device.
    """
    template = take_state(state_dict, keys, rank=rank)
    for key, value in template.items():
        owner = state_dict[key]
        if isinstance(owner, torch.optim.Optimizer):
            _check_parameters(owner, key)
            if not value.get("state"):
                value["state"] = _optimizer_state(owner, key, entries)
    return template


def _check_parameters(optimizer: torch.optim.Optimizer, key: str) -> None:
    """Refuse an optimizer of tensors that the load of its model is about to replace."""
    if any(p.is_meta for group in optimizer.param_groups for p in group["params"]):
        raise InvalidInputError(
            f"the parameters of optimizer {key!r} are on the meta device, and would not be those "
            "that the load gives to the model; call model.to_empty(device=...) before the "
            "optimizer is made, or load the model first."
        )


def optimizer_names(state_dict: Mapping[str, Any]) -> list[str]:
    """Return the FQNs below which optimizers keep their state: a version may lack some of it.

    A parameter that was frozen at the save has none there, and one that was added neither.
    """
    return [
        f"{key}.state"
        for key, value in state_dict.items()
        if isinstance(value, torch.optim.Optimizer)
    ]


def _optimizer_state(
    optimizer: torch.optim.Optimizer, key: str, entries: Iterable[EntryRecord]
) -> dict[int, dict[str, Any]]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for entry in entries:
        if len(entry.path) != 4 or entry.path[:2] != (key, "state"):
            continue
        index = int(entry.path[2])
        if index >= len(parameters):  # the planner reports it as unexpected
            continue
        state.setdefault(index, {})[str(entry.path[3])] = _like(parameters[index], entry)
    return state


def _like(parameter: torch.Tensor, entry: EntryRecord) -> Any:
    """Return an empty place for an entry of a parameter's optimizer state."""
    if entry.tensor is None or entry.kind != "tensor":
        return None
    dtype = torch_dtype(entry.tensor.dtype)
    if entry.tensor.shape == tuple(parameter.shape):
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return torch.zeros(entry.tensor.shape, dtype=dtype)
