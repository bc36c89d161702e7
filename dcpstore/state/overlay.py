"""The overlay of a version on an owner's state: what the owner has, and a target for the rest.

An owner that has just been made, such as an optimizer before its first step, does not name all
items that its state will have. Invariant: the owner's own tensors keep their memory, and what the
version does not hold stays as it is.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dcpstore.encoding.dtypes import torch_dtype
from dcpstore.formats.composition import ComposedEntry, Entry
from dcpstore.records import ObjectPath
from dcpstore.state.composed import composed_target
from dcpstore.state.tree import nested_state
from dcpstore.state.walk import fqn_of, is_data

__all__ = ["ABSENT", "GapError", "Leaf", "Node", "lay_over", "new_target", "tree_of"]

ABSENT = object()  # marks what an owner does not have, since None is a value like any other


@dataclass(frozen=True, slots=True)
class Leaf:
    """An entry of the version, and whether the load asks for it."""

    entry: Entry
    is_asked: bool = True


Node = Any  # a `Leaf`, or a container of leaves as it was saved
MakeTarget = Callable[[Entry], torch.Tensor]


class GapError(Exception):
    """A list of which the version holds, or the load asks for, only some items."""


def tree_of(items: Iterable[tuple[ObjectPath, Leaf]]) -> Node:
    """Return the containers that were saved below an owner, from entries and their paths there.

    Raises:
        CorruptionError: the paths contradict each other.
    """
    pairs = [(fqn_of(path), path, leaf) for path, leaf in items]
    return nested_state(
        {fqn: leaf for fqn, _, leaf in pairs}, {fqn: path for fqn, path, _ in pairs}
    )


def lay_over(own: Any, stored: Node, make: MakeTarget, *, replaces: bool = False) -> Any:
    """Return `own` with a target for each entry of `stored` that is asked for.

    Containers that change are copied; all else is `own` itself.

    Args:
        own: what the owner has now, or `ABSENT`.
        stored: what the version holds for it.
        make: makes a tensor into which an entry can be loaded.
        replaces: whether a tensor of another shape or dtype is replaced by a new target.

    Raises:
        GapError: a list would get only some of its items.
    """
    if isinstance(stored, Leaf):
        return _leaf(own, stored, make, replaces=replaces)
    if isinstance(stored, list | tuple):
        return _sequence(own, stored, make, replaces=replaces)
    if stored is None:  # `nested_state` fills the gaps of a list with None
        raise GapError("has a list of which the version holds only some items")
    if is_data(own):
        return _with_fields(own, stored, make, replaces=replaces)
    mine = own if isinstance(own, Mapping) else {}
    texts = {str(key): key for key in mine}  # older versions store every key as text
    laid = {}
    for name, inner in stored.items():
        key = name if name in mine else texts.get(str(name), name)
        value = lay_over(mine.get(key, ABSENT), inner, make, replaces=replaces)
        if value is not ABSENT:
            laid[key] = value
    if not laid and own is ABSENT:
        return ABSENT
    is_ordered = isinstance(own, OrderedDict) or isinstance(stored, OrderedDict)
    is_same = all(key in mine and mine[key] is value for key, value in laid.items())
    if is_same and isinstance(own, Mapping) and isinstance(own, OrderedDict) == is_ordered:
        return own
    merged = {**mine, **laid}  # the owner's own order first
    return OrderedDict(merged) if is_ordered else merged


def _sequence(
    own: Any, stored: Sequence[Node], make: MakeTarget, *, replaces: bool
) -> list[Any] | tuple[Any, ...]:
    """Return a list or tuple as long as the stored one, or as the part that is asked for."""
    mine = own if isinstance(own, list | tuple) else ()
    laid = [
        lay_over(mine[i] if i < len(mine) else ABSENT, inner, make, replaces=replaces)
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


def _with_fields(own: Any, stored: Mapping[Any, Node], make: MakeTarget, *, replaces: bool) -> Any:
    """Return a dataclass with a target in each field that the version holds."""
    new = own
    for name, inner in stored.items():
        before = getattr(own, name, ABSENT)
        value = lay_over(before, inner, make, replaces=replaces)
        if value is not before and value is not ABSENT:
            new = copy.copy(own) if new is own else new
            object.__setattr__(new, name, value)  # works for frozen dataclasses too
    return new


def _leaf(own: Any, stored: Leaf, make: MakeTarget, *, replaces: bool) -> Any:
    entry = stored.entry
    if not stored.is_asked:
        return own
    if entry.kind == "tensor" and entry.tensor is not None:
        if not isinstance(own, torch.Tensor):
            return make(entry)
        differs = own.shape != entry.tensor.shape or own.dtype != torch_dtype(entry.tensor.dtype)
        return make(entry) if replaces and differs else own
    if isinstance(entry, ComposedEntry):
        return own if isinstance(own, torch.Tensor) else make(entry)
    # A value is set by the load itself; None takes the place of what cannot be a value.
    return None if own is ABSENT or isinstance(own, torch.Tensor | Mapping | list) else own


def new_target(entry: Entry, *, dry_run: bool) -> torch.Tensor:
    """Return a new tensor for an entry, on the CPU; in a dry run one without memory."""
    device = torch.device("meta" if dry_run else "cpu")
    if isinstance(entry, ComposedEntry):
        return composed_target(entry, device=device)
    assert entry.tensor is not None
    return torch.zeros(entry.tensor.shape, dtype=torch_dtype(entry.tensor.dtype), device=device)
