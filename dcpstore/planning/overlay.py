"""What a version holds below an owner, laid over what the owner gives now: a place for all of it.

An owner that has just been made does not name everything that its state will hold. Invariant: the
owner's own tensors keep their memory, and what the version does not hold stays as it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dcpstore.compositions import ComposedEntry, Entry
from dcpstore.encoding.dtypes import torch_dtype
from dcpstore.planning.composed import composed_place
from dcpstore.records import ObjectPath

__all__ = ["ABSENT", "GapError", "Leaf", "Node", "lay_over", "new_place", "tree_of"]

ABSENT = object()  # where an owner has nothing: None is a value like any other


@dataclass(frozen=True, slots=True)
class Leaf:
    """An entry of the version, and whether the load asks for it."""

    entry: Entry
    is_asked: bool = True


# What a version holds below a path. The keys of a list are its places, those of a mapping are text.
Node = Leaf | dict[str | int, "Node"]
Place = Callable[[Entry, Any], Any]


class GapError(Exception):
    """A list of which the version, or what is asked of it, holds some items only."""


def tree_of(items: Iterable[tuple[ObjectPath, Leaf]]) -> dict[str | int, Node]:
    """Return entries by their paths below an owner, nested.

    An entry that lies below another one, which no save writes, is left out.
    """
    root: dict[str | int, Node] = {}
    for path, leaf in items:
        node = root
        for part in path[:-1]:
            inner = node.setdefault(part, {})
            if isinstance(inner, Leaf):
                break
            node = inner
        else:
            node[path[-1]] = leaf
    return root


def lay_over(own: Any, stored: Node, place: Place, *, replaces: bool = False) -> Any:
    """Return `own` with a place for each entry of `stored` that is asked for.

    Containers that change are copied; the rest is `own` itself.

    Args:
        own: what the owner gives now, or `ABSENT`.
        stored: what the version holds in its place.
        place: makes a place for an entry, given what the owner has there.
        replaces: whether a tensor of another shape or dtype makes room for the stored one.

    Raises:
        GapError: a list would get some of its items only.
    """
    if isinstance(stored, Leaf):
        return _leaf(own, stored, place, replaces=replaces)
    if stored and all(isinstance(part, int) for part in stored):
        return _list(own, stored, place, replaces=replaces)
    mine = own if isinstance(own, Mapping) else {}
    keys = {str(key): key for key in mine}  # flattening writes every key as text
    laid = {
        keys.get(str(name), name): lay_over(
            mine.get(keys.get(str(name), name), ABSENT), inner, place, replaces=replaces
        )
        for name, inner in stored.items()
    }
    laid = {key: value for key, value in laid.items() if value is not ABSENT}
    if not laid and own is ABSENT:
        return ABSENT
    if isinstance(own, Mapping) and all(
        key in mine and mine[key] is value for key, value in laid.items()
    ):
        return own
    merged = {**mine, **laid}
    return OrderedDict(merged) if isinstance(own, OrderedDict) else merged


def _list(own: Any, stored: Mapping[str | int, Node], place: Place, *, replaces: bool) -> Any:
    """Return a list as long as the stored one, or as what is asked of it."""
    mine = own if isinstance(own, list | tuple) else ()
    if sorted(stored, key=int) != [*range(len(stored))]:
        raise GapError(f"has a list of which the version holds the items {sorted(stored)} only")
    laid = [
        lay_over(mine[i] if i < len(mine) else ABSENT, stored[i], place, replaces=replaces)
        for i in range(len(stored))
    ]
    while laid and laid[-1] is ABSENT:
        laid.pop()
    if any(item is ABSENT for item in laid):
        raise GapError("has a list of which some items are asked for, and others not")
    if isinstance(own, list) and len(own) == len(laid):
        return own if all(a is b for a, b in zip(own, laid, strict=True)) else laid
    return laid


def _leaf(own: Any, stored: Leaf, place: Place, *, replaces: bool) -> Any:
    entry = stored.entry
    if not stored.is_asked:
        return own
    if isinstance(entry, ComposedEntry):
        return own if isinstance(own, torch.Tensor) else place(entry, own)
    if entry.kind != "tensor":
        if own is ABSENT or isinstance(own, torch.Tensor | Mapping | list):
            return None  # the load sets the value
        return own
    assert entry.tensor is not None
    if not isinstance(own, torch.Tensor):
        return place(entry, own)
    differs = own.shape != entry.tensor.shape or own.dtype != torch_dtype(entry.tensor.dtype)
    return place(entry, own) if replaces and differs else own


def new_place(entry: Entry, own: Any, *, dry_run: bool) -> torch.Tensor:
    """Return a new tensor for an entry, on the CPU; in a dry run one without memory."""
    if isinstance(entry, ComposedEntry):
        return composed_place(entry, device=torch.device("meta" if dry_run else "cpu"))
    assert entry.tensor is not None
    device = "meta" if dry_run else "cpu"
    return torch.zeros(entry.tensor.shape, dtype=torch_dtype(entry.tensor.dtype), device=device)
