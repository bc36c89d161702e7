"""Modules, optimizers and everything else with `state_dict()`: to plain state and back.

They stand anywhere in a state's mappings and lists. Invariants: all ranks call `state_dict()` in
the same order, because it may be a collective call (as in FSDP); and an owner is given all that the
version holds below it, or an error names what would be lost.
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
from dcpstore.state.overlay import ABSENT, GapError, Leaf, fqn_of, lay_over, new_place, tree_of
from dcpstore.state.per_rank import PerRank, give_own, own_name, own_names, with_own
from dcpstore.state.tree import flattened, path_below
from dcpstore.state.walk import PLAIN, is_container, map_leaves, walk

__all__ = [
    "Owner",
    "Template",
    "check_fillable",
    "check_keys",
    "common_growth",
    "give_state",
    "take_state",
    "take_template",
]

_EXTRA = "_extra_state"  # the last part of torch's name for what get_extra_state() gives
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
        InvalidInputError: as `check_keys`, or what it holds cannot be replaced.
    """
    keys = check_keys(state_dict)
    if not isinstance(state_dict, MutableMapping):
        raise InvalidInputError(
            f"the state is a {type(state_dict).__name__}, in which no value can be replaced; pass "
            "a dict."
        )
    return keys


@dataclass(eq=False, slots=True)
class Owner:
    """A module, an optimizer or another `Stateful`, with what it gave.

    Attributes:
        path: of the owner in the state.
        owner: the object itself.
        own: what its `state_dict()` gave, with its `PerRank` objects.
        variables: a module's own tensors by the names of its state, where some are on the meta
            device; the same object by two names where they are tied.
        below: what the version holds below it and the load asks for: the path below the owner and
            the entry, by FQN in the state.
        grown: the FQNs of them that the owner does not name.
    """

    path: ObjectPath
    owner: Any
    own: Any
    variables: Mapping[str, torch.Tensor] = field(default_factory=dict)
    below: Mapping[str, tuple[ObjectPath, Entry]] = field(default_factory=dict)
    grown: frozenset[str] = frozenset()

    @property
    def is_module(self) -> bool:
        """Whether it is a module, which names all that it can hold but for its extra state."""
        return isinstance(self.owner, torch.nn.Module)


@dataclass(frozen=True, slots=True)
class Template:
    """The plain state of a state dict, as something to load into.

    Attributes:
        owners: those that stand in the state, in the order of their paths.
        state: the state as planners take it; each owner's place holds what it gave.
        optional: FQNs at or below which the version may lack entries.
        differences: what the version holds otherwise than its owner can take it.
    """

    owners: Sequence[Owner]
    state: dict[str, Any]
    optional: tuple[str, ...]
    differences: list[str]

    def plain(self, owner: Owner) -> Any:
        """Return the plain state that stands in an owner's place."""
        return _at(self.state, owner.path)

    def growth(self) -> dict[str, frozenset[str]]:
        """Return the FQNs that each owner of this rank does not name, by the owner's FQN."""
        return {fqn_of(owner.path): owner.grown for owner in self.owners if not owner.is_module}

    def take_growth(self, growth: Mapping[str, Collection[str]], *, dry_run: bool) -> None:
        """Make places for what owners do not name yet: for these FQNs, by the owner's FQN."""
        for owner in self.owners:
            if owner.below:
                chosen = growth.get(fqn_of(owner.path), ())
                tree = tree_of(
                    (path, Leaf(entry, fqn in chosen or fqn not in owner.grown))
                    for fqn, (path, entry) in owner.below.items()
                )
                self._lay(owner.path, tree, replaces=False, dry_run=dry_run)

    def _lay(self, path: ObjectPath, tree: Any, *, replaces: bool, dry_run: bool) -> None:
        """Lay what the version holds over the plain state at `path`."""
        place = partial(new_place, dry_run=dry_run)
        container = _at(self.state, path[:-1])
        key = _key(container, path[-1])
        own = container[key]
        try:
            laid = lay_over(own, tree, place, replaces=replaces)
        except GapError as error:
            self.differences.append(f"{fqn_of(path)!r} {error}; include all of it, or exclude it")
            return
        if laid is not own and hasattr(own, "_metadata"):  # the versions of a module's layers
            laid._metadata = own._metadata
        container[key] = laid


def common_growth(ranks: Sequence[Mapping[str, frozenset[str]]]) -> dict[str, frozenset[str]]:
    """Return what no rank's owner names, by the owner's FQN.

    Where the parts of one owner lie on several ranks, as those of a pipeline do, what one of them
    names is not new to the others.
    """
    common: dict[str, frozenset[str]] = {}
    for one in ranks:
        for fqn, grown in one.items():
            common[fqn] = common[fqn] & grown if fqn in common else grown
    return common


def take_state(state_dict: Mapping[str, Any], keys: Iterable[str], *, rank: int) -> dict[str, Any]:
    """Return the plain state of `state_dict`; `keys` are those of all ranks, in one order.

    Composed tensors are taken apart.
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
    """Return the plain state of `state_dict`, in which each tensor and value has its place.

    An optimizer has no state to fill of a parameter with which it has taken no step yet: it gets
    what the version holds of it. So does a module's extra state, whatever its form. What other
    owners do not name is left to `Template.take_growth`.

    Raises:
        InvalidInputError: an optimizer's parameters are on the meta device.
    """
    owners: list[Owner] = []
    state = _taken(state_dict, keys, owners, rank=rank)
    stored = fold_entries(entries)
    optional = own_names(state_dict, rank=rank)
    template = Template(owners, state, (), [])
    rooms: dict[int, torch.Tensor] = {}
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
            _share_rooms(one, mine, rooms)
            below = _below(one.path, stored, options)
            extra = [
                (path, Leaf(entry))
                for path, entry in below.values()
                if str(path[0]).rpartition(".")[2] == _EXTRA and str(path[0]) in mine
            ]
            if extra:
                template._lay(one.path, tree_of(extra), replaces=True, dry_run=dry_run)
        else:
            named = {f"{prefix}.{fqn}" for fqn in flattened(mine).items}
            one.below = _below(one.path, stored, options)
            one.grown = frozenset(one.below.keys() - named)
    return Template(owners, state, tuple(optional), template.differences)


def give_state(state_dict: MutableMapping[str, Any], filled: Template, *, rank: int) -> None:
    """Hand the `filled` plain state back to the objects that it came from."""
    tied: dict[int, torch.Tensor] = {}
    for one in filled.owners:
        given = _handed(one.own, filled.plain(one), rank)
        if one.variables:
            _tie(one.variables, given, tied)
            one.owner.load_state_dict(given, assign=True)  # there is nothing to copy into
        else:
            one.owner.load_state_dict(given)
    for key, value in filled.state.items():
        if not _is_stateful(state_dict[key]):  # even what was filled in place, as torch's load does
            state_dict[key] = give_own(state_dict[key], value, rank, is_owner=_is_stateful)


def _taken(
    state_dict: Mapping[str, Any], keys: Iterable[str], owners: list[Owner], *, rank: int
) -> dict[str, Any]:
    """Return a state with what each owner in it gives, and each `PerRank` as a dict of its value.

    Containers in which nothing changes are the caller's own. A tuple in which something does is a
    list, in which a load can replace items.
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
            plain[path] = {own_name(rank): value.value}
        else:
            own = value.state_dict()
            owners.append(Owner(_parts(state, path), value, own, _variables(value)))
            plain[path] = with_own(own, rank)
    if not plain:
        return state
    made: dict[str, Any] = map_leaves(
        state,
        plain.get,
        enters=_is_open,
        skips=PLAIN,
        tuples=list,
    )
    return made


def _parts(container: Any, path: tuple[Any, ...]) -> ObjectPath:
    """Return a path as flattening writes it: places in lists, and keys of mappings as text."""
    parts: list[str | int] = []
    for key in path:
        parts.append(str(key) if isinstance(container, Mapping) else key)
        container = container[key]
    return tuple(parts)


def _is_open(value: object) -> bool:
    """Tell whether a value is a container without a state of its own."""
    return is_container(value) and not _is_stateful(value)


def _is_stateful(value: Any) -> TypeGuard[Stateful]:
    """Tell whether a value has a state of its own; a tensor has none."""
    return (
        type(value) not in _STATELESS
        and not isinstance(value, torch.Tensor | type)
        and isinstance(value, Stateful)
    )


def _at(state: Any, path: ObjectPath) -> Any:
    """Return what stands at a path."""
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
    """Return the entries below an owner that are asked for, by their FQN in the state."""
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
        if options.rename is not None:
            try:
                if options.stored_name(fqn) != entry.fqn:
                    continue
            except LookupError:  # a function that looks in a table, in which this FQN need not be
                continue
        found[fqn] = path, entry
    return found


def _variables(owner: Any) -> Mapping[str, torch.Tensor]:
    """Return a module's own tensors by the names of its state, where one is on the meta device."""
    if not isinstance(owner, torch.nn.Module):
        return {}
    if not any(t.is_meta for tensors in (owner.parameters(), owner.buffers()) for t in tensors):
        return {}
    try:
        kept = owner.state_dict(keep_vars=True)
    except TypeError:  # a module with a state_dict of its own
        kept = {**dict(owner.named_buffers()), **dict(owner.named_parameters())}
    return {name: value for name, value in kept.items() if isinstance(value, torch.Tensor)}


def _share_rooms(one: Owner, state: dict[str, Any], rooms: dict[int, torch.Tensor]) -> None:
    """Make tied tensors on the meta device one object, so that they get one room."""
    for name, variable in one.variables.items():
        if variable.is_meta and isinstance(state.get(name), torch.Tensor):
            state[name] = rooms.setdefault(id(variable), state[name])


def _tie(
    variables: Mapping[str, torch.Tensor], filled: dict[str, Any], tied: dict[int, torch.Tensor]
) -> None:
    """Make the filled state of a module one tensor wherever the module has one by several names.

    `tied` holds the tensor of each variable, over all modules. A variable that has memory stays the
    one that it is, for an optimizer may hold it.
    """
    own = {name: variable for name, variable in variables.items() if name in filled}
    for name, variable in own.items():
        value = filled[name]
        if not variable.is_meta and value.data_ptr() == variable.data_ptr():
            value = variable
        if id(variable) not in tied or tied[id(variable)].is_meta:  # the version lacks that name
            tied[id(variable)] = value
    for variable in own.values():
        value = tied[id(variable)]
        if isinstance(variable, torch.nn.Parameter) and not isinstance(value, torch.nn.Parameter):
            tied[id(variable)] = torch.nn.Parameter(value, requires_grad=variable.requires_grad)
    filled.update((name, tied[id(variable)]) for name, variable in own.items())


def _handed(own: Any, filled: Any, rank: int) -> Any:
    """Return what an owner is handed: the filled state, with its own `PerRank` objects in it."""
    if isinstance(own, PerRank):
        own.value = filled[own_name(rank)]
        return own
    if own is filled:
        return own
    if isinstance(own, Mapping) and isinstance(filled, Mapping):
        given = {key: _handed(own.get(key, ABSENT), inner, rank) for key, inner in filled.items()}
        return given if any(given[key] is not inner for key, inner in filled.items()) else filled
    if isinstance(own, list | tuple) and isinstance(filled, list):
        mine = [*own, *[ABSENT] * (len(filled) - len(own))]
        items = [_handed(a, b, rank) for a, b in zip(mine, filled, strict=False)]
        if isinstance(own, tuple):  # `with_own` made a list of it
            return getattr(own, "_make", tuple)(items)
        return items if any(a is not b for a, b in zip(items, filled, strict=True)) else filled
    return filled
