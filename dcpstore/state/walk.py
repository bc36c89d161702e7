"""The walk through a nested state: what a container is, the leaves with their paths, and a copy.

A container is a mapping, a list or a tuple of any class, except torch.Size. Dataclasses are entered
only if `enters` says so; `map_leaves` cannot rebuild them. Invariant: a state that contains itself
is an error in every walk.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from dcpstore.errors import InvalidInputError

__all__ = [
    "DEEPEST",
    "PLAIN",
    "SCALARS",
    "fqn_of",
    "is_container",
    "is_data",
    "items_in",
    "map_leaves",
    "nesting_checked",
    "walk",
]

# Values are of any type: hence `Any` in this module.

DEEPEST = 900  # levels of containers; Python's limit is 1,000 calls
SCALARS: frozenset[type] = frozenset([int, float, str, bytes, bool, complex, type(None)])
PLAIN = SCALARS | {torch.Tensor, torch.nn.Parameter}
_TOO_DEEP = "the state is nested too deep, or contains itself; flatten it, or remove the cycle."
_NOTHING: frozenset[type] = frozenset()


def fqn_of(path: Iterable[object]) -> str:
    """Return the FQN of a path."""
    return ".".join(map(str, path))


def is_container(value: object) -> bool:
    """Tell whether a value is a container."""
    return isinstance(value, Mapping | list | tuple) and not isinstance(
        value, torch.Tensor | torch.Size
    )


def is_data(value: object) -> bool:
    """Tell whether a value is an object of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def items_in(container: Any) -> Iterable[tuple[Any, Any]]:
    """Return the items of a container or dataclass, by key, index or field name."""
    if isinstance(container, Mapping):
        return container.items()
    if isinstance(container, list | tuple):
        return enumerate(container)
    names = (one.name for one in dataclasses.fields(container))
    return [(name, getattr(container, name)) for name in names if hasattr(container, name)]


def walk(
    state: Any,
    *,
    enters: Callable[[Any], bool] = is_container,
    skips: frozenset[type] = _NOTHING,
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the path and value of each leaf of a state, in the order of the state.

    Paths consist of the containers' own keys. An empty container has no leaf; a state that is a
    leaf itself has the path ().

    Args:
        state: a container, or a leaf.
        enters: whether the contents of a value are walked instead of the value itself.
        skips: exact types of leaves that are left out; a quick test.

    Raises:
        InvalidInputError: it is nested too deep, or contains itself.
    """
    # A stack instead of recursive generators: those pass each leaf through every level above it.
    above: list[tuple[tuple[Any, ...], Iterator[tuple[Any, Any]]]] = []
    path: tuple[Any, ...] = ()
    if not enters(state):
        if type(state) not in skips:
            yield path, state
        return
    items = iter(items_in(state))
    while True:
        for key, item in items:
            kind = type(item)
            if kind in skips:
                continue
            if kind in PLAIN or not enters(item):
                yield (*path, key), item
                continue
            if len(above) >= DEEPEST:
                raise InvalidInputError(_TOO_DEEP)
            above.append((path, items))
            path, items = (*path, key), iter(items_in(item))
            break
        else:
            if not above:
                return
            path, items = above.pop()


def map_leaves(
    state: Any,
    change: Callable[[tuple[Any, ...], Any], Any],
    *,
    enters: Callable[[Any], bool] = is_container,
    skips: frozenset[type] = _NOTHING,
    tuples: type[list[Any]] | type[tuple[Any, ...]] = tuple,
    path: tuple[Any, ...] = (),
) -> Any:
    """Return a state in which each leaf is replaced by what `change` returns for it.

    A container in which nothing changes stays the same object. Any other becomes a new dict or
    OrderedDict, list or tuple with the same keys.

    Args:
        state: a container, or a leaf.
        change: takes the path and value of a leaf; returns the new value, or the leaf itself.
        enters: whether a value counts as a container.
        skips: exact types of leaves that stay as they are; a quick test.
        tuples: the type that replaces a tuple in which something changes.
        path: of this state, where it is part of a larger one.

    Raises:
        InvalidInputError: it is nested too deep, or contains itself.
    """

    def mapped(value: Any, path: tuple[Any, ...]) -> Any:
        if not enters(value):
            return change(path, value)
        changed = {}
        for key, item in items_in(value):
            kind = type(item)
            if kind in skips:
                continue
            below = (*path, key)
            new = change(below, item) if kind in PLAIN else mapped(item, below)
            if new is not item:
                changed[key] = new
        return _with_items(value, changed, tuples) if changed else value

    with nesting_checked():
        return mapped(state, path)


def _with_items(container: Any, changed: Mapping[Any, Any], tuples: Callable[[Any], Any]) -> Any:
    if isinstance(container, Mapping):
        items = {key: changed.get(key, item) for key, item in container.items()}
        return OrderedDict(items) if isinstance(container, OrderedDict) else items
    items_of_list = [changed.get(i, item) for i, item in enumerate(container)]
    return items_of_list if isinstance(container, list) else tuples(items_of_list)


@contextmanager
def nesting_checked() -> Iterator[None]:
    """Turn a RecursionError of the block into InvalidInputError: the state is nested too deep."""
    try:
        yield
    except RecursionError as error:
        raise InvalidInputError(_TOO_DEEP) from error
