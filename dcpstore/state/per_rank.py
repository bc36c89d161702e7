"""Values of which each rank keeps its own: `PerRank`, as one entry a rank and back.

Invariant: the caller's own containers are filled, and never replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any

from dcpstore.state.walk import PLAIN, fqn_of, is_container, map_leaves, walk

__all__ = ["PerRank", "give_own", "own_name", "own_names", "with_objects", "with_own"]


class PerRank:
    """A value or tensor of which each rank keeps its own, such as its random state.

    It may be anywhere in a state, also in what a `state_dict()` returns, and is stored as one entry
    a rank ("rng.rank-3"). A load returns to each rank its own value. On more ranks than at the
    save, the additional ranks keep what they have, and the report lists their entries as missing;
    on fewer ranks, it lists the entries of the removed ranks as unexpected.

    Attributes:
        value: what this rank saves, or what it has loaded.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"PerRank({self.value!r})"


def own_names(state: Mapping[str, Any], *, rank: int) -> list[str]:
    """Return the FQNs of this rank's `PerRank` values, which a version may lack."""
    name = own_name(rank)
    return [
        fqn_of((*path, name))
        for path, value in walk(state, skips=PLAIN)
        if isinstance(value, PerRank)
    ]


def with_own(state: Any, rank: int) -> Any:
    """Return a state with each `PerRank` as a dict of this rank's value.

    A tuple that holds one becomes a list, so that a load can replace the value.
    """

    def plain(path: tuple[Any, ...], value: Any) -> Any:
        return {own_name(rank): value.value} if isinstance(value, PerRank) else value

    return map_leaves(state, plain, skips=PLAIN, tuples=list)


def give_own(
    owner: Any, filled: Any, rank: int, *, is_owner: Callable[[Any], bool] = lambda _: False
) -> Any:
    """Return what replaces `owner` in the caller's state, once the plain state is filled.

    A container that holds a `PerRank`, or an object for which `is_owner` is true, is `owner` itself
    with the loaded items in it; such objects stay. Everything else is `filled`.
    """
    if isinstance(owner, PerRank):
        owner.value = filled[own_name(rank)]
        return owner
    if is_owner(owner):
        return owner
    if owner is filled or not isinstance(owner, Mapping | list | tuple):
        return filled
    if not _holds(owner, is_owner):
        return filled
    if isinstance(owner, tuple):
        items = [
            give_own(a, b, rank, is_owner=is_owner) for a, b in zip(owner, filled, strict=True)
        ]
        is_same = all(a is b for a, b in zip(owner, items, strict=True))
        return owner if is_same else getattr(owner, "_make", tuple)(items)
    container: Any = owner
    for place, mine in [*(owner.items() if isinstance(owner, Mapping) else enumerate(owner))]:
        given = give_own(mine, filled[place], rank, is_owner=is_owner)
        if given is not mine:
            container[place] = given
    return owner


def with_objects(own: Any, filled: Any, rank: int) -> Any:
    """Return the `filled` plain state of an owner with the `PerRank` objects of `own` back in it.

    `own` is what the owner's `state_dict()` returned; its containers are not changed.
    """
    if isinstance(own, PerRank):
        own.value = filled[own_name(rank)]
        return own
    if own is filled:
        return own
    if isinstance(own, Mapping) and isinstance(filled, Mapping):
        given = {key: with_objects(own.get(key), inner, rank) for key, inner in filled.items()}
        return given if any(given[key] is not inner for key, inner in filled.items()) else filled
    if isinstance(own, list | tuple) and isinstance(filled, list):
        items = [with_objects(a, b, rank) for a, b in zip_longest(own[: len(filled)], filled)]
        if isinstance(own, tuple):  # which `with_own` turned into a list
            return getattr(own, "_make", tuple)(items)
        return items if any(a is not b for a, b in zip(items, filled, strict=True)) else filled
    return filled


def own_name(rank: int) -> str:
    """Return the key of one rank's value of a `PerRank`."""
    return f"rank-{rank}"


def _holds(owner: Any, is_owner: Callable[[Any], bool]) -> bool:
    """Tell whether a container holds a `PerRank`, or an object with a state of its own."""
    leaves = walk(owner, enters=lambda value: is_container(value) and not is_owner(value))
    return any(isinstance(value, PerRank) or is_owner(value) for _, value in leaves)
