"""Modules, optimizers and whatever else has `state_dict()`: to plain state and back.

Invariant: all ranks call `state_dict()` of the same keys in the same order, for it may be a
collective call (FSDP's is).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful

from dcpstore.encoding.dtypes import torch_dtype
from dcpstore.errors import InvalidInputError
from dcpstore.records import EntryRecord

__all__ = ["check_keys", "give_state", "take_state", "take_template"]


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


def take_state(state_dict: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Return the plain state of `state_dict`; `keys` are those of all ranks, in one order."""
    return {
        key: value.state_dict() if isinstance(value, Stateful) else value
        for key, value in ((key, state_dict[key]) for key in keys if key in state_dict)
    }


def give_state(state_dict: dict[str, Any], filled: Mapping[str, Any]) -> None:
    """Hand the `filled` plain state back to the objects that it came from."""
    for key, value in filled.items():
        owner = state_dict[key]
        if isinstance(owner, Stateful):
            owner.load_state_dict(value)
        else:
            state_dict[key] = value


def take_template(
    state_dict: Mapping[str, Any], keys: Iterable[str], entries: Iterable[EntryRecord]
) -> dict[str, Any]:
    """Return the plain state of `state_dict` as something to load into.

    An optimizer that has taken no step yet has no state to fill. It gets what the version holds for
    its parameters, each laid out like its parameter where it has the same shape.
    """
    template = take_state(state_dict, keys)
    for key, value in template.items():
        owner = state_dict[key]
        if isinstance(owner, torch.optim.Optimizer) and not value.get("state"):
            value["state"] = _optimizer_state(owner, key, entries)
    return template


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
