"""Modules, optimizers and whatever else has `state_dict()`: to plain state and back.

Invariant: all ranks call `state_dict()` of the same keys in the same order, for it may be a
collective call (FSDP's is).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch.distributed.checkpoint.stateful import Stateful

from dcpstore.errors import InvalidInputError
from dcpstore.planning.load_options import LoadOptions
from dcpstore.planning.optimizers import optimizer_names, prepare_optimizer
from dcpstore.planning.per_rank import give_own, own_names, with_own
from dcpstore.records import EntryRecord

__all__ = ["Template", "check_fillable", "check_keys", "give_state", "take_state", "take_template"]


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


def check_fillable(state_dict: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the sorted keys of a state dict to load into.

    Raises:
        InvalidInputError: as `check_keys`, or what it holds cannot be replaced.
    """
    keys = check_keys(state_dict)
    if not isinstance(state_dict, MutableMapping):
        raise InvalidInputError(
            f"the state is a {type(state_dict).__name__}, in which no value can be replaced; pass "
            "a dict."
        )
    return keys


@dataclass(frozen=True, slots=True)
class Template:
    """The plain state of a state dict, as something to load into.

    Attributes:
        owned: what each owner gave, with its `PerRank` objects.
        state: the same as planners take it.
        optional: FQNs below which the version may lack entries.
        differences: what the version holds otherwise than its owner can take it.
    """

    owned: dict[str, Any]
    state: dict[str, Any]
    optional: tuple[str, ...]
    differences: tuple[str, ...]


def take_state(state_dict: Mapping[str, Any], keys: Iterable[str], *, rank: int) -> dict[str, Any]:
    """Return the plain state of `state_dict`; `keys` are those of all ranks, in one order."""
    return {key: with_own(value, rank) for key, value in _owned(state_dict, keys).items()}


def take_template(
    state_dict: Mapping[str, Any],
    keys: Iterable[str],
    entries: Sequence[EntryRecord],
    options: LoadOptions,
    *,
    rank: int,
    dry_run: bool,
) -> Template:
    """Return the plain state of `state_dict`, in which each tensor and value has its place.

    An optimizer has no state to fill of a parameter with which it has taken no step yet. It gets
    what the version holds of it.

    Raises:
        InvalidInputError: an optimizer's parameters are on the meta device.
    """
    owned = _owned(state_dict, keys)
    state = {key: with_own(value, rank) for key, value in owned.items()}
    differences: list[str] = []
    for key, value in state.items():
        owner = state_dict[key]
        if isinstance(owner, torch.optim.Optimizer):
            differences += prepare_optimizer(owner, key, value, entries, options, dry_run=dry_run)
    optional = (*own_names(owned, rank=rank), *optimizer_names(state_dict))
    return Template(owned, state, optional, tuple(differences))


def give_state(state_dict: MutableMapping[str, Any], filled: Template, *, rank: int) -> None:
    """Hand the `filled` plain state back to the objects that it came from."""
    for key, value in filled.state.items():
        owner = state_dict[key]
        given = give_own(filled.owned[key], value, rank)
        if not _is_stateful(owner):
            state_dict[key] = given
        elif isinstance(owner, torch.nn.Module) and _is_on_meta(owner, given):
            _tie(owner, given)
            owner.load_state_dict(given, assign=True)  # there is nothing to copy into
        else:
            owner.load_state_dict(given)


def _owned(state_dict: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {
        key: value.state_dict() if _is_stateful(value) else value
        for key, value in ((key, state_dict[key]) for key in keys if key in state_dict)
    }


def _is_stateful(value: Any) -> TypeGuard[Stateful]:
    """Tell whether a value has a state of its own; of a tensor, which has none, it is not asked."""
    return not isinstance(value, torch.Tensor) and isinstance(value, Stateful)


def _is_on_meta(module: torch.nn.Module, names: Iterable[str]) -> bool:
    """Tell whether any of the tensors that a module's state names is on the meta device."""
    tensors = _tensors(module)
    return any(tensors[name].is_meta for name in names if name in tensors)


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _tie(module: torch.nn.Module, filled: MutableMapping[str, Any]) -> None:
    """Make the filled state of a module one tensor wherever the module has one by several names."""
    own = {name: tensor for name, tensor in _tensors(module).items() if name in filled}
    chosen: dict[int, torch.Tensor] = {}
    for name, tensor in own.items():
        if id(tensor) not in chosen or chosen[id(tensor)].is_meta:  # the version lacks that name
            chosen[id(tensor)] = filled[name]
    for tensor in own.values():
        value = chosen[id(tensor)]
        if isinstance(tensor, torch.nn.Parameter) and not isinstance(value, torch.nn.Parameter):
            chosen[id(tensor)] = torch.nn.Parameter(value, requires_grad=tensor.requires_grad)
    filled.update((name, chosen[id(tensor)]) for name, tensor in own.items())
