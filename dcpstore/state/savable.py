"""What of a plain state can be saved: tensors that have bytes, nested with an end.

Asked before a planner sees the state, and before a copy of it is made, so that one error names what
cannot be stored, whatever torch would raise of it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from dcpstore.encoding.dtypes import check_plain
from dcpstore.encoding.objects import objects_in
from dcpstore.encoding.scalars import is_plain_json
from dcpstore.errors import InvalidInputError
from dcpstore.state.shards import is_sharded, with_shards

__all__ = [
    "check_copies",
    "check_state",
    "nesting_checked",
    "resolved",
    "storage_nbytes",
    "with_closed_shards",
    "with_open_shards",
]

Path = tuple[object, ...]


def check_state(state: Mapping[str, Any]) -> None:
    """Check that every tensor of a nested state has plain bytes here.

    Raises:
        InvalidInputError: one has none, by its FQN.
    """

    def check(path: Path, tensor: torch.Tensor) -> None:
        try:
            check_plain(tensor)
        except InvalidInputError as error:
            raise InvalidInputError(f"{'.'.join(map(str, path))!r}: {error}") from error

    _visit(state, (), check)


def check_copies(value: object, path: Path = ()) -> None:
    """Check that each value of a nested state can be copied.

    Raises:
        InvalidInputError: one cannot, by its FQN.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            check_copies(inner, (*path, key))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            check_copies(inner, (*path, i))
    elif not isinstance(value, torch.Tensor):
        try:
            copy.deepcopy(value)
        except Exception as error:
            raise InvalidInputError(
                f"{'.'.join(map(str, path))!r}: a {type(value).__name__} cannot be copied "
                f"({error}), and training goes on with it; leave it out, or save before going on."
            ) from error


def storage_nbytes(state: Mapping[str, Any]) -> int:
    """Return the bytes of the storages that tensors of a state lie in, each storage once."""
    storages: dict[int, int] = {}

    def note(path: Path, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()

    _visit(state, (), note)
    return sum(storages.values())


def resolved(value: Any, path: Path = ()) -> Any:
    """Return a state whose tensors' bytes are what they mean: conjugated and negated ones copied.

    All else comes back as it is, but for mappings that are no dict, which not everything can copy.

    Raises:
        InvalidInputError: such a tensor lies where it cannot be replaced.
    """
    if isinstance(value, torch.Tensor):
        if (is_sharded(value) and not isinstance(value, DTensor)) or not (
            value.is_conj() or value.is_neg()
        ):
            return value
        return value.resolve_conj().resolve_neg()
    if isinstance(value, Mapping):
        items = {key: resolved(inner, (*path, key)) for key, inner in value.items()}
        return _with_items(value, items) if isinstance(value, dict) else items
    if type(value) in (list, tuple):
        parts = [resolved(inner, (*path, i)) for i, inner in enumerate(value)]
        is_same = all(part is inner for part, inner in zip(parts, value, strict=True))
        return value if is_same else type(value)(parts)
    if not is_plain_json(value):
        _check_resolved(value, path)
    return value


def with_open_shards(value: Any) -> Any:
    """Return a state with each ShardedTensor as the list of its local tensors.

    So it can be copied as plain tensors are; `with_closed_shards` takes the copy.
    """
    if isinstance(value, ShardedTensor):
        return [resolved(shard.tensor) for shard in value.local_shards()]
    if isinstance(value, dict):
        items = {key: with_open_shards(inner) for key, inner in value.items()}
        return _with_items(value, items)
    if type(value) in (list, tuple):
        parts = [with_open_shards(inner) for inner in value]
        is_same = all(part is inner for part, inner in zip(parts, value, strict=True))
        return value if is_same else type(value)(parts)
    return value


def with_closed_shards(state: Any, copied: Any) -> Any:
    """Return the copy of a state, with ShardedTensors where the state has them."""
    if isinstance(state, ShardedTensor):
        return with_shards(state, copied)
    if isinstance(state, dict):
        items = {key: with_closed_shards(inner, copied[key]) for key, inner in state.items()}
        return _with_items(copied, items)
    if type(state) in (list, tuple):
        return type(state)(map(with_closed_shards, state, copied))
    return copied


def _with_items(value: dict[Any, Any], items: dict[Any, Any]) -> dict[Any, Any]:
    """Return a dict with other items; of its own class, which may hold more than items."""
    if all(items[key] is value[key] for key in items):
        return value
    copied = copy.copy(value)
    copied.update(items)
    return copied


def _check_resolved(value: object, path: Path) -> None:
    """Check that no tensor inside another object has bits that a copy of its storage lacks."""
    for held in objects_in(value):
        if not isinstance(held, torch.Tensor) or isinstance(held, ShardedTensor):
            continue
        if held.is_conj() or held.is_neg():
            fqn = ".".join(map(str, path))
            raise InvalidInputError(
                f"{fqn!r}: a lazily conjugated or negated tensor lies inside a "
                f"{type(value).__qualname__}; save tensor.resolve_conj().resolve_neg() instead."
            )


@contextmanager
def nesting_checked() -> Iterator[None]:
    """Raise InvalidInputError where the block comes to no end in a nested state."""
    try:
        yield
    except RecursionError as error:
        raise InvalidInputError(
            "the state is nested too deep, or contains itself; flatten it, or break the loop."
        ) from error


def _visit(value: Any, path: Path, visit: Callable[[Path, torch.Tensor], None]) -> None:
    """Call `visit` with each plain tensor that this process holds, as DCP flattens a state."""
    if isinstance(value, torch.Tensor):
        for local in _local_tensors(value):
            visit(path, local)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _visit(inner, (*path, key), visit)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            _visit(inner, (*path, i), visit)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for one in dataclasses.fields(value):
            _visit(getattr(value, one.name, None), (*path, one.name), visit)


def _local_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    if not is_sharded(tensor):
        return [tensor]
    if isinstance(tensor, DTensor):
        if hasattr(tensor._local_tensor, "__create_chunk_list__"):
            return []
        with torch.no_grad():
            return [tensor.to_local()]
    if isinstance(tensor, ShardedTensor):
        return [shard.tensor for shard in tensor.local_shards()]
    return []  # a subclass that gives its parts when it is asked for them, by torch's protocol
