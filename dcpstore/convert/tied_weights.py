"""Which tensors of a version are tied, concluded from their contents.

A repository keeps contents, not memory, so a tie is concluded from equal content, and only where
that cannot do harm. Two tensors that happen to be equal must not become one: an optimizer would
then update both at once, and a model would miss one of them. So these are never tied: optimizer
state, tensors whose elements are all the same, and tensors whose FQNs differ only in numbers, such
as a buffer that every layer has.
"""

from __future__ import annotations

import re

import torch

from dcpstore.convert.exporting import DEEPEST, ExportedTensor, ExportedVersion

__all__ = ["find_ties"]


def find_ties(version: ExportedVersion) -> dict[str, str]:
    """Return, by FQN, the FQN of the tensor that it is tied to: the first of the same content."""
    optimizers = {
        path[:i]
        for path in version.paths.values()
        for i, key in enumerate(path[:DEEPEST])
        if _is(key, "param_groups")
    }
    same: dict[int, list[ExportedTensor]] = {}
    for tensor in version.tensors:
        path = tensor.entry.path[:DEEPEST]
        if not any(path[:i] in optimizers and _is(key, "state") for i, key in enumerate(path)):
            same.setdefault(tensor.stored.id, []).append(tensor)
    ties: dict[str, str] = {}
    for tensors in same.values():
        first, rest = tensors[0], tensors[1:]
        others = [t.fqn for t in rest if _without_numbers(t.fqn) != _without_numbers(first.fqn)]
        if others and not _is_constant(version, first):
            ties |= dict.fromkeys(others, first.fqn)
    return ties


def _is(key: str | int, name: str) -> bool:
    """Tell whether a key is this one of an optimizer's state, flattened by torch or not."""
    return isinstance(key, str) and (key == name or key.startswith(f"{name}."))


def _without_numbers(fqn: str) -> str:
    return re.sub(r"\d+", "#", fqn)


def _is_constant(version: ExportedVersion, tensor: ExportedTensor) -> bool:
    """Tell whether all elements are the same, or there are none."""
    first: torch.Tensor | None = None
    for box in tensor.boxes():
        # as integers, for a NaN differs from itself
        elements = version.read(tensor, box).reshape(-1).view(torch.uint8)
        elements = elements.reshape(-1, tensor.dtype.itemsize)
        first = elements[:1].clone() if first is None else first
        if not bool((elements == first).all()):
            return False
    return True
