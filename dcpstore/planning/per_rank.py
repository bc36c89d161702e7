"""What each rank keeps for itself: `PerRank`, as entries of its own and back.

Invariant: the containers of whoever owns a state are filled, and never replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["PerRank", "give_own", "own_names", "with_own"]


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
    return [".".join((*path, _own_name(rank))) for path in _own_paths(state, ())]


def with_own(value: Any, rank: int) -> Any:
    """Return a state with each `PerRank` as a dict of this rank's value alone."""
    if isinstance(value, PerRank):
        return {_own_name(rank): value.value}
    if not _holds_own(value):
        return value
    if isinstance(value, Mapping):
        return {key: with_own(inner, rank) for key, inner in value.items()}
    return [with_own(inner, rank) for inner in value]


def give_own(owner: Any, filled: Any, rank: int) -> Any:
    """Return what is to stand in `owner`'s place, once the state that `with_own` made is filled.

    It is `owner` itself, with what was filled in it, wherever that holds a `PerRank`.
    """
    if isinstance(owner, PerRank):
        owner.value = filled[_own_name(rank)]
        return owner
    if owner is filled or not _holds_own(owner):
        return filled
    for place, mine in [*(owner.items() if isinstance(owner, Mapping) else enumerate(owner))]:
        given = give_own(mine, filled[place], rank)
        if given is not mine:
            owner[place] = given
    return owner


def _own_name(rank: int) -> str:
    return f"rank-{rank}"


def _holds_own(value: Any) -> bool:
    return any(True for _ in _own_paths(value, ()))


def _own_paths(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if isinstance(value, PerRank):
        yield path
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _own_paths(inner, (*path, str(key)))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _own_paths(inner, (*path, str(i)))
