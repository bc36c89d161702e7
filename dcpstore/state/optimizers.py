"""Optimizers to load into: places for state that they do not have yet.

One that has taken no step has nothing that names what to load; of one that has, a parameter may
have been frozen. Invariant: there is a place for each entry that the version holds for an
optimizer's parameters and the options ask for, at any depth.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import torch

from dcpstore.encoding.dtypes import torch_dtype
from dcpstore.encoding.values import decode_value
from dcpstore.errors import InvalidInputError
from dcpstore.formats.composition import ComposedEntry, Entry
from dcpstore.records import ObjectPath
from dcpstore.state.composed import composed_place
from dcpstore.state.load_options import LoadOptions
from dcpstore.state.overlay import ABSENT, GapError, Leaf, Node, lay_over, new_place, tree_of
from dcpstore.state.targets import without_memory
from dcpstore.state.tree import path_below

__all__ = ["is_by_number", "lists_parameters", "optional_names", "prepare_optimizer"]

_SHOWN = 3  # names in one message
_PARAMETERS = re.compile(r"(^|\.)param_groups\.\d+\.params$")
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


def is_by_number(owner: object, own: object) -> TypeGuard[torch.optim.Optimizer]:
    """Tell whether an owner is an optimizer whose state is by the numbers of its parameters.

    Containers of optimizers, which give their state by name, are owners like any other.
    """
    return (
        isinstance(owner, torch.optim.Optimizer)
        and isinstance(own, Mapping)
        and own.keys() >= {"state", "param_groups"}
    )


def lists_parameters(fqn: str, value: object) -> bool:
    """Tell whether a value is what `get_optimizer_state_dict` calls the parameters of a group.

    The optimizers of a pipeline's stages have a group each by one FQN, of which the stage's own
    parameters are a part: torch keeps the list of one of them.
    """
    is_place = _PARAMETERS.search(fqn) is not None
    return is_place and isinstance(value, list) and all(isinstance(name, str) for name in value)


def optional_names(optimizer: torch.optim.Optimizer, prefix: ObjectPath) -> list[str]:
    """Return the FQNs at or below which a version may lack what an optimizer has.

    A parameter that was frozen at the save has no state there, one that was added neither; and what
    a scheduler or the caller adds to a group is theirs.
    """
    key = ".".join(map(str, prefix))
    known = optimizer.defaults.keys() | {"params"}
    added = (
        f"{key}.param_groups.{i}.{name}"
        for i, group in enumerate(optimizer.param_groups)
        for name in group
        if name not in known
    )
    return [f"{key}.state", *added]


def prepare_optimizer(
    optimizer: torch.optim.Optimizer,
    prefix: ObjectPath,
    state: dict[str, Any],
    entries: Sequence[Entry],
    options: LoadOptions,
    *,
    dry_run: bool,
) -> list[str]:
    """Give the plain `state` of an optimizer places for all that the version holds of it.

    Each is laid out like its parameter where it has the same shape; in a dry run none has memory.
    Returns how the version's state of this optimizer differs from what can be loaded.

    Args:
        optimizer: the owner.
        prefix: its path in the state that is loaded.
        state: what `optimizer.state_dict()` gave; changed here.
        entries: of the version.
        options: which entries are asked for, and under which names.
        dry_run: allocate nothing.

    Raises:
        InvalidInputError: the parameters are on the meta device.
    """
    key = ".".join(map(str, prefix))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(p.is_meta for p in parameters):  # the load of the model is about to replace them
        raise InvalidInputError(
            f"the parameters of optimizer {key!r} are on the meta device, and would not be those "
            "that the load gives to the model; call model.to_empty(device=...) before the "
            "optimizer is made, or load the model first."
        )
    held = [*_held(prefix, "state", entries, options, count=len(parameters))]
    own = state["state"]  # by number, in some optimizers by name too
    if (named := _by_name(prefix, own, held, entries, options)) is not None:
        return [named]
    count = len(state["param_groups"])
    groups = [*_held(prefix, "param_groups", entries, options, count=count)]
    differences = [*_other_groups(optimizer, key, entries, options)]
    differences += _beyond(key, state, held, groups, parameters=len(parameters))
    parts = [one for one in held if one.number.isdecimal() and int(one.number) < len(parameters)]
    new = [one for one in parts if not _is_there(own, one)]  # the planner sees the others
    differences += _misshapen(optimizer, key, parameters, new)
    differences += _partial(key, new)
    if differences:
        return differences
    of_number: dict[int, list[_OptimizerEntry]] = {}
    for one in parts:
        of_number.setdefault(int(one.number), []).append(one)
    try:
        laid = {
            i: lay_over(
                own.get(i, ABSENT), _tree(several), partial(_like, parameters[i], dry_run=dry_run)
            )
            for i, several in of_number.items()
            if not _has_all(own.get(i), several)
        }
        of_group: dict[int, list[_OptimizerEntry]] = {}
        for one in groups:
            if one.number.isdecimal() and one.path[0] != "params":
                of_group.setdefault(int(one.number), []).append(one)
        new_groups = [
            lay_over(group, _tree(of_group.get(i, [])), partial(new_place, dry_run=dry_run))
            for i, group in enumerate(state["param_groups"])
        ]
    except GapError as error:
        return [f"the state of optimizer {key!r} {error}; include all of it, or exclude it"]
    state["state"] = {**own, **{i: node for i, node in laid.items() if node is not ABSENT}}
    state["param_groups"] = new_groups
    return []


def _has_all(own: object, held: Sequence[_OptimizerEntry]) -> bool:
    """Tell whether a parameter's state has a place for each of these, as that of most has."""
    return isinstance(own, dict) and all(
        len(one.path) == 1
        and not isinstance(one.entry, ComposedEntry)
        and (found := own.get(one.path[0], own)) is not own
        and isinstance(found, torch.Tensor) == (one.entry.kind == "tensor")
        and not isinstance(found, dict | list)
        for one in held
    )


class _OptimizerEntry(NamedTuple):
    """An entry of an optimizer: the number of its parameter or group, and the path below that."""

    number: str
    path: ObjectPath
    entry: Entry
    is_asked: bool


def _tree(held: Iterable[_OptimizerEntry]) -> Node:
    return tree_of((one.path, Leaf(one.entry, one.is_asked)) for one in held)


def _by_name(
    prefix: ObjectPath,
    own: Mapping[Any, Any],
    held: Sequence[_OptimizerEntry],
    entries: Sequence[Entry],
    options: LoadOptions,
) -> str | None:
    """Return what is wrong where the version holds the state by the names of the parameters."""
    names = {str(number) for number in own}
    named = [one for one in held if not one.number.isdecimal() and one.number not in names]
    asked = [*dict.fromkeys(one.number for one in named if one.is_asked)]
    key, depth, how = ".".join(map(str, prefix)), len(prefix), ""
    if not asked and not held:
        asked = [
            str(entry.path[depth])
            for entry in entries
            if len(entry.path) == depth + 1
            and entry.path[:depth] == prefix
            and str(entry.path[depth]).startswith(("state.", "param_groups."))
            and options.asks_for(entry.fqn)
        ]
        how = " with StateDictOptions(flatten_optimizer_state_dict=True)"
    if not asked:
        return None
    shown = ", ".join(map(repr, asked[:_SHOWN])) + (", ..." if len(asked) > _SHOWN else "")
    return (
        f"optimizer {key!r} has its state by name ({shown}) in the version, as "
        f"get_optimizer_state_dict gives it{how}, and by number in the state; load into "
        "get_optimizer_state_dict(model, optimizer"
        f"{', options=...' if how else ''}), and hand that to "
        "set_optimizer_state_dict (dcpstore.state_dict)"
    )


def _beyond(
    key: str,
    state: Mapping[str, Any],
    held: Sequence[_OptimizerEntry],
    groups: Sequence[_OptimizerEntry],
    *,
    parameters: int,
) -> Iterator[str]:
    """Yield what the version holds of parameters and groups that the optimizer does not have."""
    numbers = {int(one.number) for one in held if one.is_asked and one.number.isdecimal()}
    lost = sorted(n for n in numbers if n >= parameters and n not in state["state"])
    if lost:
        shown = ", ".join(map(str, lost[:_SHOWN])) + (", ..." if lost[_SHOWN:] else "")
        yield (
            f"optimizer {key!r} has {parameters} parameters, and the version holds state of "
            f"parameter {shown}, which would be lost; make it of all parameters, or exclude "
            f"'{key}.state.{lost[0]}.*'"
        )
    count = len(state["param_groups"])
    more = {int(one.number) for one in groups if one.is_asked and one.number.isdecimal()}
    if more and max(more) >= count:
        yield (
            f"optimizer {key!r} has {count} parameter groups, and the version {max(more) + 1}; "
            "add the others by add_param_group"
        )


def _partial(key: str, new: Sequence[_OptimizerEntry]) -> Iterator[str]:
    """Yield whether a parameter would get a part only of the state that it does not have."""
    asked = {one.number for one in new if one.is_asked}
    lacking = [one for one in new if not one.is_asked and one.number in asked]
    if lacking:
        yield (
            f"optimizer {key!r} has no state of a parameter, and would get a part of it, without "
            f"{lacking[0].entry.fqn!r}; include all of it, or exclude '{key}.state.*'"
        )


def _is_there(own: Mapping[Any, Any], one: _OptimizerEntry) -> bool:
    """Tell whether an optimizer has something to fill where an entry of the version belongs."""
    state = own.get(int(one.number), {})
    return not isinstance(state, Mapping) or str(one.path[0]) in map(str, state)


def _held(
    prefix: ObjectPath,
    section: str,
    entries: Sequence[Entry],
    options: LoadOptions,
    *,
    count: int,
) -> Iterator[_OptimizerEntry]:
    """Yield what the version holds of a section of an optimizer: its state, or its groups.

    `count` is how many the optimizer has of what the section numbers.
    """
    depth = len(prefix)
    if options.rename is None:
        for entry in entries:
            path = entry.path
            if len(path) > depth + 2 and path[:depth] == prefix and path[depth] == section:
                is_asked = options.asks_for(entry.fqn)
                below = path_below(path, depth + 2)
                yield _OptimizerEntry(str(path[depth + 1]), below, entry, is_asked)
        return
    # `rename` leads from the state's FQNs to the version's only: try all that there may be
    candidates = [
        (path[at + 1], path_below(path, at + 2))
        for path in (entry.path for entry in entries)
        for at in range(len(path) - 2)
        if path[at] == section
    ]
    numbers = dict.fromkeys([*map(str, range(count)), *(str(number) for number, _ in candidates)])
    rests = dict.fromkeys(rest for _, rest in candidates)
    by_fqn = {entry.fqn: entry for entry in entries}
    for number in numbers:
        for rest in rests:
            fqn = ".".join(map(str, (*prefix, section, number, *rest)))
            found = _renamed(fqn, by_fqn, options)
            if found is not None:
                yield _OptimizerEntry(number, rest, found, options.asks_for(fqn))


def _renamed(fqn: str, by_fqn: Mapping[str, Entry], options: LoadOptions) -> Entry | None:
    """Return the entry for an FQN that the state may have."""
    try:
        return by_fqn.get(options.stored_name(fqn))
    except LookupError:  # a function that looks in a table, in which this FQN need not be
        return None


def _other_groups(
    optimizer: torch.optim.Optimizer,
    key: str,
    entries: Sequence[Entry],
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
    parts: Sequence[_OptimizerEntry],
) -> Iterator[str]:
    """Yield which moments have another shape than their parameter: only `step` would fail.

    Optimizers that are not torch's may keep anything under these names, and hooks may change what
    is loaded, or give it to other parameters: those are not checked.
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
        if not one.is_asked or stored is None:
            continue
        shape = tuple(parameters[index].shape)
        if len(one.path) == 1 and one.path[0] in _SHAPED and stored.shape != shape:
            yield (
                f"'{key}.state.{index}.{one.path[0]}' has shape {stored.shape} in the version, and "
                f"its parameter {shape} in the state"
            )


def _like(parameter: torch.Tensor, entry: Entry, own: Any, *, dry_run: bool) -> torch.Tensor:
    """Return an empty place for an entry of a parameter's optimizer state."""
    if isinstance(entry, ComposedEntry):
        device = torch.device("meta") if dry_run else parameter.device
        return composed_place(entry, device=device, like=parameter)
    assert entry.tensor is not None
    if entry.tensor.shape != tuple(parameter.shape):
        return new_place(entry, own, dry_run=dry_run)
    dtype = torch_dtype(entry.tensor.dtype)
    if dry_run:
        return without_memory(parameter, dtype)
    return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
