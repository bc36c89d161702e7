"""Optimizers to load into: places for state that they do not have yet.

One that has taken no step has nothing that names what to load; of one that has, a parameter may
have been frozen. Invariant: there is a place for each entry that the version holds for an
optimizer's parameters and the options ask for, at any depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dcpstore.encoding.dtypes import torch_dtype
from dcpstore.encoding.values import decode_value
from dcpstore.errors import InvalidInputError
from dcpstore.planning.load_options import LoadOptions
from dcpstore.planning.room import without_memory
from dcpstore.records import EntryRecord, ObjectPath

__all__ = ["optimizer_names", "prepare_optimizer"]

_SHOWN = 3  # names in one message
# What torch's own optimizers make of a parameter's shape, or of that of its gradient.
_SHAPED = frozenset(
    [
        "acc_delta",
        "ax",
        "exp_avg",
        "exp_avg_sq",
        "exp_inf",
        "grad_avg",
        "max_exp_avg_sq",
        "momentum_buffer",
        "prev",
        "square_avg",
        "step_size",
        "sum",
        "variance",
    ]
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


def prepare_optimizer(
    optimizer: torch.optim.Optimizer,
    key: str,
    state: dict[str, Any],
    entries: Sequence[EntryRecord],
    options: LoadOptions,
    *,
    dry_run: bool,
) -> list[str]:
    """Give the plain `state` of an optimizer places for all that the version holds of it.

    Each is laid out like its parameter where it has the same shape; in a dry run none has memory.
    Returns how the version's state of this optimizer differs from what can be loaded.

    Raises:
        InvalidInputError: the parameters are on the meta device.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(p.is_meta for p in parameters):  # the load of the model is about to replace them
        raise InvalidInputError(
            f"the parameters of optimizer {key!r} are on the meta device, and would not be those "
            "that the load gives to the model; call model.to_empty(device=...) before the "
            "optimizer is made, or load the model first."
        )
    held = [*_held(key, len(parameters), entries, options)]
    own = state.get("state", {})  # by number, in some optimizers by name too
    names = {str(number) for number in own}
    named = [one for one in held if not one.number.isdecimal() and one.number not in names]
    if asked := [*dict.fromkeys(one.number for one in named if one.is_asked)]:
        shown = ", ".join(map(repr, asked[:_SHOWN])) + (", ..." if len(asked) > _SHOWN else "")
        return [
            f"optimizer {key!r} has its state by name ({shown}) in the version, as "
            "get_optimizer_state_dict gives it, and by number in the state; load into "
            "get_optimizer_state_dict(model, optimizer), and hand that to "
            "set_optimizer_state_dict (dcpstore.state_dict)"
        ]
    differences = [*_other_groups(optimizer, key, entries, options)]
    places: dict[int, Any] = {}
    parts = [one for one in held if one.number.isdecimal() and not _is_there(own, one)]
    differences += _misshapen(optimizer, key, parameters, parts)
    for one in parts:
        if one.is_asked and (index := int(one.number)) < len(parameters):
            place = _like(parameters[index], one.entry, dry_run=dry_run)
            _put(places.setdefault(index, {}), one.path, place)
    lacking = [one for one in parts if not one.is_asked and int(one.number) in places]
    if lacking:
        differences.append(
            f"optimizer {key!r} has no state of a parameter, and would get a part of it, without "
            f"{lacking[0].entry.fqn!r}; include all of it, or exclude '{key}.state.*'"
        )
        return differences
    try:
        new = {index: {**own.get(index, {}), **_listed(node)} for index, node in places.items()}
    except _GapError as error:
        differences.append(f"the state of optimizer {key!r} {error}")
    else:
        state["state"] = {**own, **new}
    return differences


class _Held(NamedTuple):
    """An entry of an optimizer's state: its parameter, and the path below that."""

    number: str
    path: ObjectPath
    entry: EntryRecord
    is_asked: bool


def _is_there(own: Mapping[Any, Any], one: _Held) -> bool:
    """Tell whether an optimizer has something to fill where an entry of the version belongs."""
    state = own.get(int(one.number), {})
    return not isinstance(state, Mapping) or str(one.path[0]) in map(str, state)


def _held(
    key: str, count: int, entries: Sequence[EntryRecord], options: LoadOptions
) -> Iterator[_Held]:
    """Yield what the version holds of an optimizer's state."""
    if options.rename is None:
        for entry in entries:
            if len(entry.path) > 3 and entry.path[:2] == (key, "state"):
                is_asked = options.asks_for(entry.fqn)
                yield _Held(str(entry.path[2]), entry.path[3:], entry, is_asked)
        return
    # `rename` leads from the state's FQNs to the version's only: try all that there may be
    below = [
        path[at + 1 :]
        for path in (entry.path for entry in entries)
        for at in range(len(path) - 2)
        if path[at] == "state"
    ]
    numbers = dict.fromkeys([*map(str, range(count)), *(str(path[0]) for path in below)])
    rests = dict.fromkeys(path[1:] for path in below)
    by_fqn = {entry.fqn: entry for entry in entries}
    for number in numbers:
        for rest in rests:
            fqn = ".".join((key, "state", number, *map(str, rest)))
            found = _renamed(fqn, by_fqn, options)
            if found is not None:
                yield _Held(number, rest, found, options.asks_for(fqn))


def _renamed(
    fqn: str, by_fqn: Mapping[str, EntryRecord], options: LoadOptions
) -> EntryRecord | None:
    """Return the entry for an FQN that the state may have."""
    try:
        return by_fqn.get(options.stored_name(fqn))
    except LookupError:  # a function that looks in a table, in which this FQN need not be
        return None


def _other_groups(
    optimizer: torch.optim.Optimizer,
    key: str,
    entries: Sequence[EntryRecord],
    options: LoadOptions,
) -> Iterator[str]:
    """Yield which groups hold another number of parameters; a very long list is not looked at."""
    by_fqn = {entry.fqn: entry for entry in entries}
    for i, group in enumerate(optimizer.param_groups):
        fqn = f"{key}.param_groups.{i}.params"
        entry = _renamed(fqn, by_fqn, options) if options.asks_for(fqn) else None
        if entry is not None and entry.kind == "value" and entry.value is not None:
            stored = decode_value(entry.value, allow_pickle=False)
            count = len(group["params"])
            if isinstance(stored, list) and len(stored) != count:
                yield (
                    f"group {i} of optimizer {key!r} has {len(stored)} parameters in the version, "
                    f"and {count} in the state"
                )


def _misshapen(
    optimizer: torch.optim.Optimizer,
    key: str,
    parameters: Sequence[torch.Tensor],
    parts: Sequence[_Held],
) -> Iterator[str]:
    """Yield which moments have another shape than their parameter, which only `step` would tell.

    Other people's optimizers keep under these names what they like, and hooks may change what is
    loaded, or give it to other parameters: then nobody can tell.
    """
    kind = type(optimizer)
    has_hooks = (
        optimizer._optimizer_load_state_dict_pre_hooks
        or optimizer._optimizer_load_state_dict_post_hooks
    )
    if has_hooks or getattr(torch.optim, kind.__name__, None) is not kind:
        return
    for one in parts:
        stored, index = one.entry.tensor, int(one.number)
        if not one.is_asked or stored is None or index >= len(parameters):
            continue
        shape = tuple(parameters[index].shape)
        if len(one.path) == 1 and one.path[0] in _SHAPED and stored.shape != shape:
            yield (
                f"'{key}.state.{index}.{one.path[0]}' has shape {stored.shape} in the version, and "
                f"its parameter {shape} in the state"
            )


def _like(parameter: torch.Tensor, entry: EntryRecord, *, dry_run: bool) -> Any:
    """Return an empty place for an entry of a parameter's optimizer state."""
    if entry.tensor is None or entry.kind != "tensor":
        return None
    dtype = torch_dtype(entry.tensor.dtype)
    if entry.tensor.shape != tuple(parameter.shape):
        return torch.zeros(entry.tensor.shape, dtype=dtype, device="meta" if dry_run else None)
    if dry_run:
        return without_memory(parameter, dtype)
    return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)


class _GapError(Exception):
    """A list of which some items are not to be had."""


def _put(node: dict[Any, Any], path: ObjectPath, leaf: Any) -> None:
    for part in path[:-1]:
        node = node.setdefault(part, {})
    node[path[-1]] = leaf


def _listed(node: Any) -> Any:
    """Return nested dicts with those that have numbers for keys as the lists that they stand for.

    Flattening writes a mapping's keys as text, and a list's places as numbers.
    """
    if not isinstance(node, dict):
        return node
    inner = {part: _listed(value) for part, value in node.items()}
    if not all(isinstance(part, int) for part in inner):
        return inner
    if sorted(inner) != [*range(len(inner))]:
        raise _GapError(
            f"has a list of which the version holds the items {sorted(inner)} only; load into an "
            "optimizer that has taken a step"
        )
    return [inner[i] for i in range(len(inner))]
