"""Checks after a load whether each owner holds what was loaded into it.

An owner is a module, an optimizer or another `Stateful` object. Its `load_state_dict` may cast,
rename or drop what it gets. Invariant: each loaded FQN has the stored bits, dtype, shape and Python
type in its owner, or an error names it. A tensor that the owner keeps in the memory that the load
filled is not compared: it is the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dcpstore.compat.torch_private import LocalShardsWrapper, ShardedTensor
from dcpstore.encoding.composed_tensors import kind_of, parts_of
from dcpstore.records import ObjectPath
from dcpstore.state.optimizers import is_by_number
from dcpstore.state.per_rank import with_own
from dcpstore.state.stateful import Owner, Template
from dcpstore.state.targets import memory_of
from dcpstore.state.walk import fqn_of, walk

__all__ = ["OwnerCheck"]

_EXACT = frozenset([int, str, bool, type(None)])  # equal exactly if they are the same value


@dataclass(frozen=True, slots=True)
class _Expected:
    """What an owner should hold after its `load_state_dict`.

    Attributes:
        owner: the owner.
        leaves: the tensors and values that it gets, by their path below it.
        ties: sets of a module's names that are one tensor; empty unless some tensors were on the
            meta device.
    """

    owner: Owner
    leaves: Mapping[ObjectPath, Any]
    ties: Sequence[frozenset[str]]


class OwnerCheck:
    """The owners of a template and what each should hold.

    Make it before the owners get their state, because they may change what they get.
    """

    def __init__(self, template: Template) -> None:
        self._expected = [
            _Expected(one, dict(walk(template.plain(one), enters=_is_compared_inside)), _ties(one))
            for one in template.owners
        ]

    def restore_optimizers(self) -> None:
        """Restore the stored tensors and values that torch's optimizers have converted.

        `Optimizer.load_state_dict` casts all state except `step` to the dtype of its parameter, and
        treats a string as an iterable: it becomes a generator object.
        """
        for one in self._expected:
            optimizer = one.owner.owner
            if not is_by_number(optimizer, one.owner.own) or _has_hooks(optimizer):
                continue
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for path, leaf in one.leaves.items():
                if len(path) < 3 or path[0] != "state" or not isinstance(path[1], int):
                    continue
                if path[1] < len(parameters):
                    _restore(optimizer.state.get(parameters[path[1]]), path[2:], leaf)

    def differences(self, *, rank: int) -> dict[str, str]:
        """Return by FQN how owners differ from what was stored; calls their `state_dict()`."""
        differences: dict[str, str] = {}
        for one in self._expected:
            prefix, owner = one.owner.path, one.owner.owner
            kind = type(owner).__name__
            if _has_hooks(owner):  # its hooks change on purpose what is loaded
                continue
            found = dict(walk(with_own(owner.state_dict(), rank), enters=_is_compared_inside))
            for path, leaf in one.leaves.items():
                fqn = fqn_of((*prefix, *path))
                if path not in found:
                    differences[fqn] = f"{fqn!r} is not in what {kind}.state_dict() returns now"
                elif (reason := _difference(leaf, found[path])) is not None:
                    differences[fqn] = f"{fqn!r} {reason} ({kind})"
            for names in one.ties:
                if len({id(tensor) for name, tensor in _named_tensors(owner) if name in names}) > 1:
                    fqn, tied = fqn_of((*prefix, min(names))), ", ".join(sorted(names))
                    differences[fqn] = f"{fqn!r} is no longer tied: {tied} were one tensor ({kind})"
        return differences

    def left_on_meta(self) -> Iterator[str]:
        """Yield the FQNs of modules' tensors that the load did not fill and that have no memory.

        They are buffers that are not persistent, and tensors that the options exclude.
        """
        for one in (expected.owner for expected in self._expected):
            if one.variables:
                named = chain(one.owner.named_parameters(), one.owner.named_buffers())
                yield from (fqn_of((*one.path, name)) for name, tensor in named if tensor.is_meta)


def _is_compared_inside(value: object) -> bool:
    """Tell whether the items of a value are compared one by one, so that errors name the item."""
    if isinstance(value, list):
        return any(isinstance(item, torch.Tensor | Mapping) for item in value)
    return isinstance(value, Mapping)


def _has_hooks(owner: Any) -> bool:
    return isinstance(owner, torch.optim.Optimizer) and bool(
        owner._optimizer_load_state_dict_pre_hooks or owner._optimizer_load_state_dict_post_hooks
    )


def _restore(state: Any, path: ObjectPath, leaf: Any) -> None:
    """Put a stored leaf back if the optimizer holds a converted one."""
    for part in path[:-1]:
        if not _has(state, part):
            return
        state = state[part]
    if not _has(state, path[-1]):
        return
    found = state[path[-1]]
    if isinstance(leaf, torch.Tensor) and isinstance(found, torch.Tensor):
        if leaf.dtype != found.dtype:
            state[path[-1]] = leaf.to(found.device)
    elif not isinstance(leaf, torch.Tensor | int | float) and _difference(leaf, found) is not None:
        state[path[-1]] = leaf


def _has(container: Any, part: Any) -> bool:
    if isinstance(container, list):
        return isinstance(part, int) and part < len(container)
    return isinstance(container, dict) and part in container


def _named_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a module's parameters and buffers; a tied one comes once for each of its names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _ties(owner: Owner) -> list[frozenset[str]]:
    """Return, for each tied tensor of a module, the set of its names."""
    if not owner.variables:
        return []
    names: dict[int, set[str]] = {}
    for name, tensor in _named_tensors(owner.owner):
        names.setdefault(id(tensor), set()).add(name)
    return [frozenset(several) for several in names.values() if len(several) > 1]


def _difference(stored: Any, found: Any) -> str | None:
    """Describe how `found` differs from `stored`; None if they are the same."""
    if found is stored or _is_number_as_tensor(stored, found):
        return None
    if isinstance(stored, torch.Tensor):
        return _tensor_difference(stored, found)
    if type(stored) is not type(found):
        kinds = type(stored).__name__, type(found).__name__
        return f"was stored as a {kinds[0]}, and is a {kinds[1]} now"
    if not _is_equal(stored, found):
        return f"was stored as {_shown(stored)}, and is {_shown(found)} now"
    return None


def _is_number_as_tensor(stored: Any, found: Any) -> bool:
    """Tell whether an owner turned a number into a tensor, as torch's optimizers do with `step`."""
    if type(stored) not in (int, float) or not isinstance(found, torch.Tensor):
        return False
    return found.numel() == 1 and bool(found.item() == stored)


def _tensor_difference(stored: torch.Tensor, found: Any) -> str | None:
    if not isinstance(found, torch.Tensor):
        return f"was stored as a tensor, and is a {type(found).__name__} now"
    # The usual case: the owner holds the same memory that the load filled.
    if _is_plain(stored) and _is_plain(found) and memory_of(stored) == memory_of(found):
        return None
    kinds = [f"{tensor.dtype} of shape {tuple(tensor.size())}" for tensor in (stored, found)]
    if kinds[0] != kinds[1]:
        return f"was stored as {kinds[0]}, and is {kinds[1]} now"
    # Tensors of different classes may have different numbers of local tensors.
    pairs = [*zip(_local(stored), _local(found), strict=False)]
    if any(b.is_meta and not a.is_meta for a, b in pairs):
        return "is still on the meta device"
    if any(_bits_differ(a, b) for a, b in pairs):
        return "was stored with other values than it has now"
    return None


def _is_plain(tensor: torch.Tensor) -> bool:
    is_dense = type(tensor) is torch.Tensor and tensor.layout is torch.strided
    return is_dense and not tensor.is_meta


def _local(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the plain tensors that this rank holds of a tensor."""
    if isinstance(tensor, DTensor):
        return _local(tensor._local_tensor)
    kind = kind_of(tensor)
    if kind is not None:
        parts, _ = parts_of(kind, tensor)
        return [*parts.values()]
    if isinstance(tensor, LocalShardsWrapper):
        return tensor.local_shards()
    if isinstance(tensor, ShardedTensor):
        return [shard.tensor for shard in tensor.local_shards()]
    return [tensor]


@torch.no_grad()
def _bits_differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two dense tensors differ; False for tensors that are not dense."""
    is_dense = one.layout is torch.strided and other.layout is torch.strided
    if (
        not is_dense
        or one.is_meta
        or one.shape != other.shape
        or memory_of(one) == memory_of(other)
    ):
        return False
    a, b = (_bits(tensor) for tensor in (one, other))
    return not torch.equal(a, b.to(a.device))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.contiguous().reshape(-1).view(torch.uint8)


def _is_equal(one: Any, other: Any) -> bool:
    """Tell whether two values of one type are the same; NaN counts as equal to NaN."""
    if dataclasses.is_dataclass(one):
        one, other = _fields(one), _fields(other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(
            _difference(inner, other[key]) is None for key, inner in one.items()
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(
            (type(a) is type(b) and type(a) in _EXACT and a == b) or _difference(a, b) is None
            for a, b in zip(one, other, strict=True)
        )
    kind: Any = type(one)
    if kind.__eq__ is object.__eq__:
        return True  # its class compares by identity only, so contents cannot be compared
    if type(one) in (float, complex):
        return repr(one) == repr(other)
    try:
        equal = one == other
        return bool(equal.all() if hasattr(equal, "all") else equal)
    except Exception:  # if the comparison fails, we know of no difference
        return True


def _fields(one: Any) -> dict[str, Any]:
    return {field.name: getattr(one, field.name, None) for field in dataclasses.fields(one)}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
