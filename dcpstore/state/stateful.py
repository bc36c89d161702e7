"""Converts owners (modules, optimizers, others with `state_dict()`) to plain state and back.

Owners may be anywhere in the mappings and lists of a state. Invariants: all ranks call
`state_dict()` in the same order, because it may be a collective call (as in FSDP). An owner gets
all that the version holds below its path, or an error names what would be lost.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeGuard

import torch
from torch.distributed.checkpoint.stateful import Stateful

from dcpstore.errors import InvalidInputError
from dcpstore.formats.composition import Entry, fold_entries
from dcpstore.records import EntryRecord, ObjectPath
from dcpstore.state.composed import take_apart
from dcpstore.state.load_options import LoadOptions
from dcpstore.state.optimizers import is_by_number, optional_names, prepare_optimizer
from dcpstore.state.overlay import GapError, Leaf, lay_over, new_target, tree_of
from dcpstore.state.per_rank import PerRank, give_own, own_names, with_objects, with_own
from dcpstore.state.tree import flattened, path_below
from dcpstore.state.walk import PLAIN, fqn_of, is_container, map_leaves, walk

__all__ = [
    "Owner",
    "Template",
    "check_fillable",
    "check_keys",
    "common_growth",
    "take_state",
    "take_template",
]

_EXTRA = "_extra_state"  # the last part of torch's name for what get_extra_state() returns
# Exact types, because that test is quick.
_STATELESS = PLAIN | {dict, OrderedDict, list, tuple}


def check_keys(state_dict: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the sorted keys of a state dict.

    Raises:
        InvalidInputError: it is not a mapping, or a key is not text.
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
        InvalidInputError: as `check_keys`, or it is immutable.
    """
    keys = check_keys(state_dict)
    if not isinstance(state_dict, MutableMapping):
        raise InvalidInputError(
            f"the state is a {type(state_dict).__name__}, which is immutable; pass a dict."
        )
    return keys


@dataclass(eq=False, slots=True)
class Owner:
    """A module, an optimizer or another `Stateful`, with what its `state_dict()` returned.

    Attributes:
        path: of the owner in the state.
        owner: the object itself.
        own: what its `state_dict()` returned, with its `PerRank` objects.
        variables: a module's own tensors by the names of its state, if some are on the meta device,
            else empty; a tied tensor is one object under several names.
        below: the entries of the version that the load wants for this owner: by FQN in the state,
            the path below the owner and the entry.
        grown: the FQNs of `below` that the owner's own state lacks, such as state that it would
            only create later.
    """

    path: ObjectPath
    owner: Any
    own: Any
    variables: Mapping[str, torch.Tensor] = field(default_factory=dict)
    below: Mapping[str, tuple[ObjectPath, Entry]] = field(default_factory=dict)
    grown: frozenset[str] = frozenset()

    @property
    def is_module(self) -> bool:
        """Whether it is a module: its state names all that it can hold, except extra state."""
        return isinstance(self.owner, torch.nn.Module)


@dataclass(frozen=True, slots=True)
class Template:
    """The plain state of a state dict, as something to load into.

    Attributes:
        owners: in the order of their paths.
        state: the state as planners take it, with each owner replaced by what it returned.
        optional: FQNs at or below which the version may lack entries.
        differences: messages about what the version holds and its owner cannot take.
    """

    owners: Sequence[Owner]
    state: dict[str, Any]
    optional: tuple[str, ...]
    differences: list[str]

    def plain(self, owner: Owner) -> Any:
        """Return the plain state of an owner."""
        return _at(self.state, owner.path)

    def growth(self) -> dict[str, frozenset[str]]:
        """Return `Owner.grown` of each owner of this rank that is not a module, by its FQN."""
        return {fqn_of(owner.path): owner.grown for owner in self.owners if not owner.is_module}

    def take_growth(self, growth: Mapping[str, Collection[str]], *, dry_run: bool) -> None:
        """Add targets for the FQNs in `growth`, by the owner's FQN: owners do not name them yet."""
        for owner in self.owners:
            if owner.below:
                chosen = growth.get(fqn_of(owner.path), ())
                tree = tree_of(
                    (path, Leaf(entry, fqn in chosen or fqn not in owner.grown))
                    for fqn, (path, entry) in owner.below.items()
                )
                self.add_targets(owner.path, tree, replaces=False, dry_run=dry_run)

    def add_targets(self, path: ObjectPath, tree: Any, *, replaces: bool, dry_run: bool) -> None:
        """Add targets to the plain state at `path` for what the version holds: see `lay_over`."""
        make = partial(new_target, dry_run=dry_run)
        container = _at(self.state, path[:-1])
        key = _key(container, path[-1])
        own = container[key]
        try:
            laid = lay_over(own, tree, make, replaces=replaces)
        except GapError as error:
            self.differences.append(f"{fqn_of(path)!r} {error}; include all of it, or exclude it")
            return
        if laid is not own and hasattr(own, "_metadata"):  # the versions of a module's layers
            laid._metadata = own._metadata
        container[key] = laid

    def give_back(self, state_dict: MutableMapping[str, Any], *, rank: int) -> None:
        """Give the filled plain state back to the objects of `state_dict` that it came from."""
        tied: dict[int, torch.Tensor] = {}
        for one in self.owners:
            given = with_objects(one.own, self.plain(one), rank)
            if one.variables:
                _tie(one.variables, given, tied)
                one.owner.load_state_dict(given, assign=True)  # meta tensors cannot be copied into
            else:
                one.owner.load_state_dict(given)
        for key, value in self.state.items():
            # Items that were filled in place are set too, as torch's load does.
            if not _is_stateful(state_dict[key]):
                state_dict[key] = give_own(state_dict[key], value, rank, is_owner=_is_stateful)


def common_growth(ranks: Sequence[Mapping[str, frozenset[str]]]) -> dict[str, frozenset[str]]:
    """Return, by the owner's FQN, the FQNs that its state lacks on every rank that holds it.

    One owner may have a part on each of several ranks, as in a pipeline: what one part names must
    not be added to the other parts.
    """
    common: dict[str, frozenset[str]] = {}
    for one in ranks:
        for fqn, grown in one.items():
            common[fqn] = common[fqn] & grown if fqn in common else grown
    return common


def take_state(state_dict: Mapping[str, Any], keys: Iterable[str], *, rank: int) -> dict[str, Any]:
    """Return the plain state of `state_dict`, with composed tensors taken apart.

    `keys` are the keys of all ranks, in the same order on each; a rank may lack some.
    """
    taken: dict[str, Any] = take_apart(_taken(state_dict, keys, [], rank=rank))
    return taken


def take_template(
    state_dict: Mapping[str, Any],
    keys: Iterable[str],
    entries: Sequence[EntryRecord],
    options: LoadOptions,
    *,
    rank: int,
    dry_run: bool,
) -> Template:
    """Return the plain state of `state_dict` with a target for each tensor and value to load.

    An optimizer has no state for a parameter before its first step: targets are added for all state
    that the version holds. The same is done for a module's extra state: its stored form may differ.
    For other owners, `Template.take_growth` adds the targets that their state lacks.

    Raises:
        InvalidInputError: an optimizer's parameters are on the meta device.
    """
    owners: list[Owner] = []
    state = _taken(state_dict, keys, owners, rank=rank)
    stored = fold_entries(entries)
    optional = own_names(state_dict, rank=rank)
    template = Template(owners, state, (), [])
    first: dict[int, torch.Tensor] = {}
    for one in owners:
        prefix = fqn_of(one.path)
        optional += [f"{prefix}.{name}" for name in own_names(one.own, rank=rank)]
        mine = template.plain(one)
        if is_by_number(one.owner, one.own):
            optional += optional_names(one.owner, one.path)
            template.differences.extend(
                prepare_optimizer(one.owner, one.path, mine, stored, options, dry_run=dry_run)
            )
        elif one.is_module:
            # A module names its tensors, but cannot know the form of its stored extra state.
            _join_tied(one, mine, first)
            below = _below(one.path, stored, options)
            extra = [
                (path, Leaf(entry))
                for path, entry in below.values()
                if str(path[0]).rpartition(".")[2] == _EXTRA and str(path[0]) in mine
            ]
            if extra:
                template.add_targets(one.path, tree_of(extra), replaces=True, dry_run=dry_run)
        else:
            named = {f"{prefix}.{fqn}" for fqn in flattened(mine).items}
            one.below = _below(one.path, stored, options)
            one.grown = frozenset(one.below.keys() - named)
    return Template(owners, state, tuple(optional), template.differences)


def _taken(
    state_dict: Mapping[str, Any], keys: Iterable[str], owners: list[Owner], *, rank: int
) -> dict[str, Any]:
    """Return a state with each owner's plain state, and each `PerRank` as a dict of its value.

    The owners are appended to `owners`. A container in which nothing is replaced is not copied. A
    tuple in which something is replaced becomes a list, so that a load can replace its items.
    """
    state = {key: state_dict[key] for key in keys if key in state_dict}
    found = {
        path: value
        for path, value in walk(state, enters=_is_open, skips=PLAIN)
        if isinstance(value, PerRank) or _is_stateful(value)
    }
    plain: dict[tuple[Any, ...], Any] = {}
    for path in sorted(found, key=lambda path: [*map(str, path)]):  # the same order on all ranks
        value = found[path]
        if isinstance(value, PerRank):
            plain[path] = with_own(value, rank)
        else:
            own = value.state_dict()
            owners.append(Owner(_parts(state, path), value, own, _variables(value)))
            plain[path] = with_own(own, rank)
    if not plain:
        return state
    made: dict[str, Any] = map_leaves(
        state,
        plain.get,  # called with a path and a leaf: returns the leaf if the path is not replaced
        enters=_is_open,
        skips=PLAIN,
        tuples=list,
    )
    return made


def _parts(container: Any, path: tuple[Any, ...]) -> ObjectPath:
    """Return a path in the flattened form: list indices as int, mapping keys as text."""
    parts: list[str | int] = []
    for key in path:
        parts.append(str(key) if isinstance(container, Mapping) else key)
        container = container[key]
    return tuple(parts)


def _is_open(value: object) -> bool:
    """Tell whether a value is a container without a state of its own."""
    return is_container(value) and not _is_stateful(value)


def _is_stateful(value: Any) -> TypeGuard[Stateful]:
    """Tell whether a value has a `state_dict()` of its own; tensors and classes do not count."""
    return (
        type(value) not in _STATELESS
        and not isinstance(value, torch.Tensor | type)
        and isinstance(value, Stateful)
    )


def _at(state: Any, path: ObjectPath) -> Any:
    """Return the item at a path."""
    for part in path:
        state = state[_key(state, part)]
    return state


def _key(container: Any, part: str | int) -> Any:
    """Return a container's own key for a part of a path, in which a mapping's keys are text."""
    if isinstance(container, Mapping) and part not in container:
        return next(key for key in container if str(key) == part)
    return part


def _below(
    prefix: ObjectPath, entries: Iterable[Entry], options: LoadOptions
) -> dict[str, tuple[ObjectPath, Entry]]:
    """Return the entries below an owner that the load wants, by their FQN in the state."""
    depth, key = len(prefix), fqn_of(prefix)
    found = {}
    for entry in entries:
        if options.rename is None and entry.path[:depth] != prefix:
            continue
        path = path_below(entry.path, depth)
        if not path:
            continue
        fqn = fqn_of((key, *path))
        if not options.asks_for(fqn):
            continue
        if options.rename is None or options.find_stored(fqn, {entry.fqn: True}):
            found[fqn] = path, entry
    return found


def _variables(owner: Any) -> Mapping[str, torch.Tensor]:
    """Return a module's own tensors by the names of its state, if one is on the meta device."""
    if not isinstance(owner, torch.nn.Module):
        return {}
    if not any(t.is_meta for tensors in (owner.parameters(), owner.buffers()) for t in tensors):
        return {}
    try:
        kept = owner.state_dict(keep_vars=True)
    except TypeError:  # a module that overrides state_dict() without keep_vars
        kept = {**dict(owner.named_buffers()), **dict(owner.named_parameters())}
    return {name: value for name, value in kept.items() if isinstance(value, torch.Tensor)}


def _join_tied(one: Owner, state: dict[str, Any], first: dict[int, torch.Tensor]) -> None:
    """Make tied tensors on the meta device one object, so that they get the same memory.

    `first` holds the first tensor of each variable, over all modules.
    """
    for name, variable in one.variables.items():
        if variable.is_meta and isinstance(state.get(name), torch.Tensor):
            state[name] = first.setdefault(id(variable), state[name])


def _tie(
    variables: Mapping[str, torch.Tensor], filled: dict[str, Any], tied: dict[int, torch.Tensor]
) -> None:
    """Tie the filled state of a module as its variables are: one tensor by several names.

    `tied` holds the tensor of each variable, over all modules. A variable that has memory stays the
    same object, because an optimizer may hold it.
    """
    own = {name: variable for name, variable in variables.items() if name in filled}
    for name, variable in own.items():
        value = filled[name]
        if not variable.is_meta and value.data_ptr() == variable.data_ptr():
            value = variable
        # It is still on meta if the version lacks an entry with that name.
        if id(variable) not in tied or tied[id(variable)].is_meta:
            tied[id(variable)] = value
    for variable in own.values():
        value = tied[id(variable)]
        if isinstance(variable, torch.nn.Parameter) and not isinstance(value, torch.nn.Parameter):
            tied[id(variable)] = torch.nn.Parameter(value, requires_grad=variable.requires_grad)
    filled.update((name, tied[id(variable)]) for name, variable in own.items())
