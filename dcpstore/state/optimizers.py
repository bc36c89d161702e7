"""Optimizers to load into: targets for state that they do not have yet.

An optimizer that has not taken a step has no state whose names could be loaded; one that has taken
steps lacks the state of parameters that were frozen. Invariant: there is a target for each entry
that the version holds for an optimizer's parameters and that the options ask for, at any depth.
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
from dcpstore.state.composed import composed_target
from dcpstore.state.load_options import LoadOptions
from dcpstore.state.overlay import ABSENT, GapError, Leaf, Node, lay_over, new_target, tree_of
from dcpstore.state.targets import without_memory
from dcpstore.state.tree import path_below
from dcpstore.state.walk import fqn_of

__all__ = ["is_by_number", "lists_parameters", "optional_names", "prepare_optimizer"]

_SHOWN = 3  # names in one message
_PARAMETERS = re.compile(r"(^|\.)param_groups\.\d+\.params$")
# State of torch's own optimizers that has the shape of its parameter or of the gradient.
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
    """Tell whether an owner is an optimizer with its state by the numbers of its parameters.

    Containers of optimizers, which return their state by name, are treated like any other owner.
    """
    return (
        isinstance(owner, torch.optim.Optimizer)
        and isinstance(own, Mapping)
        and own.keys() >= {"state", "param_groups"}
    )


def lists_parameters(fqn: str, value: object) -> bool:
    """Tell whether a value is the list of a group's parameters in `get_optimizer_state_dict`.

    In a pipeline, the optimizers of all stages have their groups under the same FQNs, each with the
    parameters of its own stage: torch stores the list of only one stage.
    """
    is_list = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return is_list and _PARAMETERS.search(fqn) is not None


def optional_names(optimizer: torch.optim.Optimizer, prefix: ObjectPath) -> list[str]:
    """Return the FQNs at or below which a version may lack what an optimizer has.

    A parameter that was frozen or missing at the save has no state in the version; and options that
    a scheduler or the caller added to a group may be new.
    """
    key = fqn_of(prefix)
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
    """Add targets to the plain `state` of an optimizer for all that the version holds of it.

    A target of its parameter's shape is distributed like the parameter; in a dry run targets have
    no memory.

    Args:
        optimizer: the owner.
        prefix: its path in the state that is loaded.
        state: what `optimizer.state_dict()` returned; changed here.
        entries: of the version.
        options: which entries are asked for, and under which names.
        dry_run: allocate nothing.

    Returns:
        Why the version's state of this optimizer cannot be loaded, one text a reason; then `state`
        is unchanged.

    Raises:
        InvalidInputError: the parameters are on the meta device.
    """
    key = fqn_of(prefix)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(p.is_meta for p in parameters):  # the load replaces the model's meta parameters
        raise InvalidInputError(
            f"the parameters of optimizer {key!r} are on the meta device, where the load replaces "
            "those of the model but not of the optimizer; call model.to_empty(device=...) before "
            "you make the optimizer, or load the model first."
        )
    held = _entries_of(prefix, "state", entries, options, count=len(parameters))
    own = state["state"]  # by number; some optimizers have items by name too
    if (by_name := _by_name(prefix, own, held, entries, options)) is not None:
        return [by_name]
    count = len(state["param_groups"])
    of_groups = _entries_of(prefix, "param_groups", entries, options, count=count)
    of_parameters = [
        one for one in held if one.position is not None and one.position < len(parameters)
    ]
    # Where the optimizer has something, the planner compares it with the version.
    new = [one for one in of_parameters if not _is_there(own, one)]
    differences = [
        *_other_groups(optimizer, key, entries, options),
        *_beyond(key, state, held, of_groups, parameters=len(parameters)),
        *_misshapen(optimizer, key, parameters, new),
        *_partial(key, new),
    ]
    if differences:
        return differences
    try:
        laid = {
            i: lay_over(
                own.get(i, ABSENT), _tree(some), partial(_like, parameters[i], dry_run=dry_run)
            )
            for i, some in _by_index(of_parameters).items()
            if not _has_all(own.get(i), some)  # which saves the work of an overlay
        }
        # The list of parameters is the optimizer's own: its length has been compared above.
        options_of = _by_index(one for one in of_groups if one.path[0] != "params")
        groups = [
            lay_over(group, _tree(options_of.get(i, [])), partial(new_target, dry_run=dry_run))
            for i, group in enumerate(state["param_groups"])
        ]
    except GapError as error:
        return [f"the state of optimizer {key!r} {error}; include all of it, or exclude it"]
    state["state"] = {**own, **{i: node for i, node in laid.items() if node is not ABSENT}}
    state["param_groups"] = groups
    return []


class _OptimizerEntry(NamedTuple):
    """An entry of an optimizer: the number of its parameter or group, and the path below that."""

    number: str
    path: ObjectPath
    entry: Entry
    is_asked: bool

    @property
    def position(self) -> int | None:
        """The number as an integer; None where the state is by name."""
        return int(self.number) if self.number.isdecimal() else None


def _by_index(held: Iterable[_OptimizerEntry]) -> dict[int, list[_OptimizerEntry]]:
    found: dict[int, list[_OptimizerEntry]] = {}
    for one in held:
        if one.position is not None:
            found.setdefault(one.position, []).append(one)
    return found


def _tree(held: Iterable[_OptimizerEntry]) -> Node:
    return tree_of((one.path, Leaf(one.entry, one.is_asked)) for one in held)


def _has_all(own: object, held: Sequence[_OptimizerEntry]) -> bool:
    """Tell whether a parameter's state has a target for each entry: so it is for nearly all."""
    return isinstance(own, dict) and all(
        len(one.path) == 1
        and not isinstance(one.entry, ComposedEntry)
        and (found := own.get(one.path[0], own)) is not own
        and isinstance(found, torch.Tensor) == (one.entry.kind == "tensor")
        and not isinstance(found, dict | list)
        for one in held
    )


def _by_name(
    prefix: ObjectPath,
    own: Mapping[Any, Any],
    held: Sequence[_OptimizerEntry],
    entries: Sequence[Entry],
    options: LoadOptions,
) -> str | None:
    """Return the difference if the version holds the state by parameter name, else None."""
    names = {str(number) for number in own}
    by_name = [one for one in held if one.position is None and one.number not in names]
    asked = [*dict.fromkeys(one.number for one in by_name if one.is_asked)]
    key, depth, how = fqn_of(prefix), len(prefix), ""
    if not asked and not held:  # a flattened state has "state.<parameter>.<item>" as one key
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
    return (
        f"optimizer {key!r} has its state by name ({_few(asked)}) in the version, as "
        f"get_optimizer_state_dict returns it{how}, and by number in the state; load into "
        "get_optimizer_state_dict(model, optimizer"
        f"{', options=...' if how else ''}), and pass that to "
        "set_optimizer_state_dict (dcpstore.state_dict)"
    )


def _few(things: Sequence[object]) -> str:
    """Return the first few of many things for a message."""
    return ", ".join(map(repr, things[:_SHOWN])) + (", ..." if len(things) > _SHOWN else "")


def _beyond(
    key: str,
    state: Mapping[str, Any],
    held: Sequence[_OptimizerEntry],
    groups: Sequence[_OptimizerEntry],
    *,
    parameters: int,
) -> Iterator[str]:
    """Yield what the version holds for parameters and groups that the optimizer does not have."""
    asked = _by_index(one for one in held if one.is_asked)
    lost = sorted(n for n in asked if n >= parameters and n not in state["state"])
    if lost:
        yield (
            f"optimizer {key!r} has {parameters} parameters, and the version holds state of "
            f"parameter {_few(lost)}, which would be lost; make it with all parameters, or exclude "
            f"'{key}.state.{lost[0]}.*'"
        )
    count = len(state["param_groups"])
    stored = 1 + max(_by_index(one for one in groups if one.is_asked), default=-1)
    if stored > count:
        yield (
            f"optimizer {key!r} has {count} parameter groups, and the version {stored}; add the "
            "others with add_param_group"
        )


def _partial(key: str, new: Sequence[_OptimizerEntry]) -> Iterator[str]:
    """Yield a difference if a parameter without state would get only a part of it."""
    asked = {one.number for one in new if one.is_asked}
    lacking = [one for one in new if not one.is_asked and one.number in asked]
    if lacking:
        yield (
            f"optimizer {key!r} has no state for a parameter, and would get only a part of it, "
            f"without {lacking[0].entry.fqn!r}; include all of it, or exclude '{key}.state.*'"
        )


def _is_there(own: Mapping[Any, Any], one: _OptimizerEntry) -> bool:
    """Tell whether an optimizer already has an item for an entry of the version."""
    state = own.get(int(one.number), {})
    return not isinstance(state, Mapping) or str(one.path[0]) in map(str, state)


def _entries_of(
    prefix: ObjectPath,
    section: str,
    entries: Sequence[Entry],
    options: LoadOptions,
    *,
    count: int,
) -> list[_OptimizerEntry]:
    """Return what the version holds of a section of an optimizer: "state" or "param_groups".

    `count` is how many parameters or groups the optimizer has.
    """
    depth = len(prefix)
    if options.rename is None:
        return [
            _OptimizerEntry(
                str(entry.path[depth + 1]),
                path_below(entry.path, depth + 2),
                entry,
                options.asks_for(entry.fqn),
            )
            for entry in entries
            if len(entry.path) > depth + 2
            and entry.path[:depth] == prefix
            and entry.path[depth] == section
        ]
    # `rename` maps FQNs of the state to those of the version, and not back: so try all FQNs that
    # the state may have, made of the numbers and inner paths that occur anywhere in the version.
    candidates = [
        (entry.path[at + 1], path_below(entry.path, at + 2))
        for entry in entries
        for at in range(len(entry.path) - 2)
        if entry.path[at] == section
    ]
    numbers = dict.fromkeys([*map(str, range(count)), *(str(number) for number, _ in candidates)])
    paths = dict.fromkeys(path for _, path in candidates)
    by_fqn = {entry.fqn: entry for entry in entries}
    held = []
    for number in numbers:
        for path in paths:
            fqn = fqn_of((*prefix, section, number, *path))
            found = options.find_stored(fqn, by_fqn)
            if found is not None:
                held.append(_OptimizerEntry(number, path, found, options.asks_for(fqn)))
    return held


def _other_groups(
    optimizer: torch.optim.Optimizer,
    key: str,
    entries: Sequence[Entry],
    options: LoadOptions,
) -> Iterator[str]:
    """Yield which groups have another number of parameters in the version.

    A list so long that it is stored as a blob is not checked.
    """
    by_fqn = {entry.fqn: entry for entry in entries}
    for i, group in enumerate(optimizer.param_groups):
        fqn = f"{key}.param_groups.{i}.params"
        entry = options.find_stored(fqn, by_fqn) if options.asks_for(fqn) else None
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
    """Yield which moments have another shape than their parameter: else only `step()` would fail.

    Optimizers that are not torch's may keep anything under these names, and hooks may change what
    is loaded or assign it to other parameters: those are not checked.
    """
    kind = type(optimizer)
    has_hooks = (
        optimizer._optimizer_load_state_dict_pre_hooks
        or optimizer._optimizer_load_state_dict_post_hooks
    )
    if has_hooks or getattr(torch.optim, kind.__name__, None) is not kind:
        return
    for one in parts:
        stored = one.entry.tensor
        if not one.is_asked or stored is None or len(one.path) > 1 or one.path[0] not in _SHAPED:
            continue
        shape = tuple(parameters[int(one.number)].shape)
        if stored.shape != shape:
            yield (
                f"'{key}.state.{one.number}.{one.path[0]}' has shape {stored.shape} in the "
                f"version, and its parameter {shape} in the state"
            )


def _like(parameter: torch.Tensor, entry: Entry, *, dry_run: bool) -> torch.Tensor:
    """Return an empty target for an entry of a parameter's optimizer state."""
    if isinstance(entry, ComposedEntry):
        device = torch.device("meta") if dry_run else parameter.device
        return composed_target(entry, device=device, like=parameter)
    assert entry.tensor is not None
    if entry.tensor.shape != tuple(parameter.shape):
        return new_target(entry, dry_run=dry_run)
    dtype = torch_dtype(entry.tensor.dtype)
    if dry_run:
        return without_memory(parameter, dtype)
    return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
