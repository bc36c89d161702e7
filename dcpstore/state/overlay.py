"""What a version holds below an owner, laid over what the owner gives now: a place for all of it.

An owner that has just been made does not name everything that its state will hold. Invariant: the
owner's own tensors keep their memory, and what the version does not hold stays as it is.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dcpstore.encoding.dtypes import torch_dtype
from dcpstore.formats.composition import ComposedEntry, Entry
from dcpstore.records import ObjectPath
from dcpstore.state.composed import composed_place
from dcpstore.state.tree import nested_state

__all__ = ["ABSENT", "GapError", "Leaf", "Node", "fqn_of", "lay_over", "new_place", "tree_of"]

ABSENT = object()  # where an owner has nothing: None is a value like any other


@dataclass(frozen=True, slots=True)
class Leaf:
    """An entry of the version, and whether the load asks for it."""

    entry: Entry
    is_asked: bool = True


Node = Any  # a `Leaf`, or a container of them as it was saved
Place = Callable[[Entry, Any], Any]


class GapError(Exception):
    """A list of which the version, or what is asked of it, holds some items only."""


def fqn_of(path: ObjectPath) -> str:
    """Return the FQN of a path."""
    return ".".join(map(str, path))


def tree_of(items: Iterable[tuple[ObjectPath, Leaf]]) -> Node:
    """Return entries by their paths below an owner, in the containers that were saved.

    Raises:
        CorruptionError: the paths contradict each other.
    """
    held = {fqn_of(path): (path, leaf) for path, leaf in items}
    return nested_state(
        {fqn: leaf for fqn, (_, leaf) in held.items()},
        {fqn: path for fqn, (path, _) in held.items()},
    )


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
    if isinstance(stored, list | tuple):
        return _sequence(own, stored, place, replaces=replaces)
    if stored is None:
        raise GapError("has a list of which the version holds some items only")
    if dataclasses.is_dataclass(own) and not isinstance(own, type):
        return _with_fields(own, stored, place, replaces=replaces)
    mine = own if isinstance(own, Mapping) else {}
    texts = {str(key): key for key in mine}  # older versions have the text of every key
    laid = {}
    for name, inner in stored.items():
        key = name if name in mine else texts.get(str(name), name)
        value = lay_over(mine.get(key, ABSENT), inner, place, replaces=replaces)
        if value is not ABSENT:
            laid[key] = value
    if not laid and own is ABSENT:
        return ABSENT
    is_ordered = isinstance(own, OrderedDict) or isinstance(stored, OrderedDict)
    is_same = all(key in mine and mine[key] is value for key, value in laid.items())
    if is_same and isinstance(own, Mapping) and isinstance(own, OrderedDict) == is_ordered:
        return own
    merged = {**mine, **laid}
    return OrderedDict(merged) if is_ordered else merged


def _sequence(
    own: Any, stored: Sequence[Node], place: Place, *, replaces: bool
) -> list[Any] | tuple[Any, ...]:
    """Return a list or tuple as long as the stored one, or as what is asked of it."""
    mine = own if isinstance(own, list | tuple) else ()
    laid = [
        lay_over(mine[i] if i < len(mine) else ABSENT, inner, place, replaces=replaces)
        for i, inner in enumerate(stored)
    ]
    while laid and laid[-1] is ABSENT:
        laid.pop()
    if any(item is ABSENT for item in laid):
        raise GapError("has a list of which some items are asked for, and others not")
    if isinstance(own, list | tuple):
        if len(own) == len(laid) and all(a is b for a, b in zip(own, laid, strict=True)):
            return own
        if isinstance(own, tuple):
            made: tuple[Any, ...] = getattr(own, "_make", tuple)(laid)
            return made
        return laid
    return tuple(laid) if isinstance(stored, tuple) else laid


def _with_fields(own: Any, stored: Mapping[Any, Node], place: Place, *, replaces: bool) -> Any:
    """Return a dataclass with a place in each field that the version holds."""
    changed = {}
    for name, inner in stored.items():
        had = getattr(own, name, ABSENT)
        value = lay_over(had, inner, place, replaces=replaces)
        if value is not had and value is not ABSENT:
            changed[name] = value
    if not changed:
        return own
    new = copy.copy(own)
    for name, value in changed.items():
        object.__setattr__(new, name, value)  # which a frozen one allows too
    return new


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
