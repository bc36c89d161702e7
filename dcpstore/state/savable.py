"""Whether a plain state can be saved and copied, and the forms in which it is copied.

Both are checked before a planner sees the state and before a copy of it is made, so that the error
names what cannot be stored.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dcpstore.compat.torch_private import ShardedTensor
from dcpstore.encoding.dtypes import check_plain
from dcpstore.encoding.objects import objects_in
from dcpstore.encoding.scalars import is_plain_json
from dcpstore.errors import InvalidInputError
from dcpstore.state.shards import is_sharded, with_shards
from dcpstore.state.walk import PLAIN, SCALARS, fqn_of, is_container, is_data, map_leaves, walk

__all__ = [
    "check_copies",
    "check_state",
    "resolved",
    "storage_nbytes",
    "with_closed_shards",
    "with_open_shards",
]

Path = tuple[object, ...]


def check_state(state: Mapping[str, Any]) -> None:
    """Check that every tensor of a nested state has plain bytes here.

    Raises:
        InvalidInputError: one has none; the error names its FQN.
    """
    for path, tensor in _local_tensors(state):
        try:
            check_plain(tensor)
        except InvalidInputError as error:
            raise InvalidInputError(f"{fqn_of(path)!r}: {error}") from error


def check_copies(state: Mapping[str, Any]) -> None:
    """Check that each value of a nested state can be copied.

    Raises:
        InvalidInputError: one cannot; the error names its FQN.
    """
    for path, value in walk(state, skips=PLAIN):
        if isinstance(value, torch.Tensor):
            continue
        try:
            copy.deepcopy(value)
        except Exception as error:  # a class's own copy hooks may raise anything
            raise InvalidInputError(
                f"{fqn_of(path)!r}: a {type(value).__name__} cannot be copied ({error}), and "
                "training may change it during the save; leave it out, or use dcpstore.save."
            ) from error


def storage_nbytes(state: Mapping[str, Any]) -> int:
    """Return the bytes of the storages behind the tensors of a state, each storage once."""
    storages: dict[int, int] = {}
    for _, tensor in _local_tensors(state):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()  # views of one storage count once
    return sum(storages.values())


def resolved(state: Any, path: Path = ()) -> Any:
    """Return a state in which conjugated and negated tensors are copied to hold their own bytes.

    All else stays as it is, except that a mapping of another class becomes a dict: not every such
    class can be copied.

    Raises:
        InvalidInputError: such a tensor is inside an object in which it cannot be replaced.
    """
    return map_leaves(state, _resolved, enters=_is_copied, skips=SCALARS, path=path)


def _resolved(path: Path, value: Any) -> Any:
    if isinstance(value, Mapping):
        return resolved(dict(value), path)
    if not isinstance(value, torch.Tensor):
        if not is_plain_json(value):
            _check_resolved(value, path)
        return value
    if is_sharded(value) and not isinstance(value, DTensor):
        return value
    if value.is_conj() or value.is_neg():
        return value.resolve_conj().resolve_neg()
    return value


def _is_copied(value: object) -> bool:
    """Tell whether a value is a container that can be copied."""
    return isinstance(value, dict) or (is_container(value) and not isinstance(value, Mapping))


def with_open_shards(state: Any) -> Any:
    """Return a state with each ShardedTensor as the list of its local tensors.

    In this form it can be copied like plain tensors; `with_closed_shards` reverses it in the copy.
    """

    def opened(path: Path, value: Any) -> Any:
        if isinstance(value, ShardedTensor):
            return [resolved(shard.tensor) for shard in value.local_shards()]
        return value

    return map_leaves(state, opened, enters=_is_rebuilt, skips=PLAIN)


def with_closed_shards(state: Any, copied: Any) -> Any:
    """Return `copied`, the copy of a state, with ShardedTensors where the state has them."""
    if isinstance(state, ShardedTensor):
        return with_shards(state, copied)
    if isinstance(state, dict):
        items = {key: with_closed_shards(inner, copied[key]) for key, inner in state.items()}
        if all(items[key] is copied[key] for key in items):
            return copied
        return OrderedDict(items) if isinstance(state, OrderedDict) else items
    if type(state) in (list, tuple):
        return type(state)(map(with_closed_shards, state, copied))
    return copied


def _is_rebuilt(value: object) -> bool:
    """Tell whether `with_closed_shards` can rebuild a container."""
    return isinstance(value, dict) or type(value) in (list, tuple)


def _check_resolved(value: object, path: Path) -> None:
    """Check that no tensor inside another object is lazily conjugated or negated.

    A copy of its storage would not hold its values.
    """
    for held in objects_in(value):
        if not isinstance(held, torch.Tensor) or isinstance(held, ShardedTensor):
            continue
        if held.is_conj() or held.is_neg():
            raise InvalidInputError(
                f"{fqn_of(path)!r}: a lazily conjugated or negated tensor is inside a "
                f"{type(value).__qualname__}; save tensor.resolve_conj().resolve_neg() instead."
            )


def _local_tensors(state: Any) -> Iterator[tuple[Path, torch.Tensor]]:
    """Yield the plain tensors that this process holds, with the path of the tensor in the state."""
    for path, value in walk(state, enters=_is_visited, skips=SCALARS):
        if not isinstance(value, torch.Tensor):
            continue
        if not is_sharded(value):
            yield path, value
        elif isinstance(value, ShardedTensor):
            for shard in value.local_shards():
                yield path, shard.tensor
        elif isinstance(value, DTensor) and not hasattr(
            value._local_tensor, "__create_chunk_list__"
        ):
            with torch.no_grad():
                local = value.to_local()
            yield path, local
        # Other classes hand out their parts only by torch's checkpoint protocol, at planning.


def _is_visited(value: object) -> bool:
    return is_container(value) or is_data(value)
