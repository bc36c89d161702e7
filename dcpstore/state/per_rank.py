"""What each rank keeps for itself: `PerRank`, as entries of its own and back.

Invariant: the containers of a state's owner are filled, and never replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dcpstore.state.walk import PLAIN, is_container, map_leaves, walk

__all__ = ["PerRank", "give_own", "own_name", "own_names", "with_own"]


class PerRank:
    """A value or tensor of which each rank keeps its own, such as its random state.

    It stands anywhere in a state, in what a `state_dict()` returns too, and is stored as one entry
    a rank ("rng.rank-3"). A load gives each rank its own again. Where the number of ranks has
    grown, the ranks that saved none keep what they have, and the report names their entries as
    missing; where it has shrunk, the entries of the ranks that are gone are named as unexpected.

    Attributes:
        value: what this rank saves, or has loaded.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"PerRank({self.value!r})"


def own_names(state: Mapping[str, Any], *, rank: int) -> list[str]:
    """Return the FQNs below which a version may lack entries: those of `PerRank` values."""
    name = own_name(rank)
    return [
        ".".join((*map(str, path), name))
        for path, value in walk(state, skips=PLAIN)
        if isinstance(value, PerRank)
    ]


def with_own(state: Any, rank: int) -> Any:
    """Return a state with each `PerRank` as a dict of this rank's value alone.

    A tuple that holds one is a list, in which a load can replace it.
    """

    def plain(path: tuple[Any, ...], value: Any) -> Any:
        return {own_name(rank): value.value} if isinstance(value, PerRank) else value

    return map_leaves(state, plain, skips=PLAIN, tuples=list)


def give_own(
    owner: Any, filled: Any, rank: int, *, is_owner: Callable[[Any], bool] = lambda _: False
) -> Any:
    """Return what is to stand in `owner`'s place, once the plain state is filled.

    It is `owner` itself, with what was filled in it, wherever that holds a `PerRank`, or an object
    with a state of its own by `is_owner`, which stays.
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


def own_name(rank: int) -> str:
    """Return the key under which one rank's value of a `PerRank` is kept."""
    return f"rank-{rank}"


def _holds(owner: Any, is_owner: Callable[[Any], bool]) -> bool:
    """Tell whether a `PerRank`, or an object with a state of its own, stands in a container."""
    leaves = walk(owner, enters=lambda value: is_container(value) and not is_owner(value))
    return any(isinstance(value, PerRank) or is_owner(value) for _, value in leaves)
