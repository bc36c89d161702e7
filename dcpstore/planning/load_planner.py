"""Our load planner: what each rank wants of a version becomes read items.

A subclass of torch's default planner, so that the hooks that torch documents (`lookup_tensor`,
`transform_tensor`, `load_bytes`) work alike. Invariant: either the whole state fits, or one error
names everything that does not.
"""

from __future__ import annotations

import difflib
import io
import pickle
from collections.abc import Iterator, MutableMapping, MutableSequence
from typing import Any

import torch
from torch.distributed.checkpoint import default_planner as torch_planner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from dcpstore.errors import InvalidInputError, MismatchError, UnsafeDataError
from dcpstore.geometry.boxes import Box
from dcpstore.planning.shards import local_shards

__all__ = ["DefaultLoadPlanner"]

_NO_OFFSET = torch.Size((0,))


class DefaultLoadPlanner(torch_planner.DefaultLoadPlanner):
    """Plans a load into DTensor, ShardedTensor, plain tensors and values, nested or flat.

    Where it differs from torch's: everything that does not fit is named at once, a dtype that
    differs is an error, strided shards are several boxes, and no pickle is run. The arguments are
    torch's; `allow_partial_load` lets FQNs be missing.
    """

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the state to fill, and torch's description of what is stored.

        Raises:
            InvalidInputError: two items flatten to the same FQN.
        """
        try:
            super().set_up_planner(state_dict, metadata, is_coordinator)
        except ValueError as error:
            raise InvalidInputError(
                f"{error}: two items of the state have the same FQN; rename one of the keys."
            ) from error
        self._views: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self.missing: list[str] = []

    def create_local_plan(self) -> LoadPlan:
        """Return the read items of this rank.

        Raises:
            MismatchError: every FQN that is missing, or differs in kind, shape or dtype.
        """
        assert self.metadata is not None
        stored = self.metadata.state_dict_metadata
        differences: list[str] = []
        items: list[ReadItem] = []
        for fqn, wanted in self.state_dict.items():
            kept = stored.get(fqn)
            if kept is None:
                self.missing.append(fqn)
                continue
            difference = _difference(fqn, wanted, kept)
            if difference is not None:
                differences.append(difference)
            elif isinstance(kept, TensorStorageMetadata):
                items += self._tensor_items(fqn, wanted, kept)
            else:
                items.append(_value_item(fqn))
        if self.missing and not self.allow_partial_load:
            differences = [*(_absent(fqn, stored) for fqn in self.missing), *differences]
        if differences:
            raise MismatchError.listing(differences)
        return LoadPlan(items)

    def _tensor_items(
        self, fqn: str, wanted: torch.Tensor, kept: TensorStorageMetadata
    ) -> Iterator[ReadItem]:
        stored = [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in kept.chunks]
        for shard in local_shards(fqn, wanted):
            self._views[fqn, shard.box.offsets] = shard.data
            for i, box in enumerate(stored):
                shared = box.intersect(shard.box)
                if shared is not None:
                    yield ReadItem(
                        type=LoadItemType.TENSOR,
                        dest_index=MetadataIndex(fqn, shard.box.offsets),
                        dest_offsets=torch.Size(shared.relative_to(shard.box).offsets),
                        storage_index=MetadataIndex(fqn, box.offsets, i),
                        storage_offsets=torch.Size(shared.relative_to(box).offsets),
                        lengths=torch.Size(shared.sizes),
                    )

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """Return the local view of the box that `index` names."""
        return self._views[index.fqn, tuple(index.offset or ())]

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Set a value from torch's bytes of it.

        Raises:
            UnsafeDataError: reading the bytes would run code.
        """
        try:
            loaded = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise UnsafeDataError(
                f"value {read_item.dest_index.fqn!r} is a pickle that could run code; save it as "
                "plain values, or load it with torch's own planner if you trust it."
            ) from error
        self.load_value(read_item, loaded)

    def load_value(self, read_item: ReadItem, value: object) -> None:
        """Set a value in the caller's state, under the caller's own keys."""
        fqn = read_item.dest_index.fqn
        if not self.flatten_state_dict:
            self.state_dict[fqn] = value
            return
        *parents, last = self.mappings[fqn]
        container: Any = self.original_state_dict
        for part in parents:
            container = container[_own_key(container, part)]
        container[_own_key(container, last)] = value


def _own_key(container: Any, part: str | int) -> Any:
    """Return the key that flattening wrote as `part`: torch turns every mapping key into text."""
    if isinstance(container, MutableSequence) or part in container:
        return part
    assert isinstance(container, MutableMapping)
    return next(key for key in container if str(key) == part)


def _value_item(fqn: str) -> ReadItem:
    return ReadItem(
        type=LoadItemType.BYTE_IO,
        dest_index=MetadataIndex(fqn),
        dest_offsets=_NO_OFFSET,
        storage_index=MetadataIndex(fqn),
        storage_offsets=_NO_OFFSET,
        lengths=_NO_OFFSET,
    )


def _difference(fqn: str, wanted: object, kept: object) -> str | None:
    """Return how what the state holds differs from what is stored, or None where it fits."""
    if not isinstance(kept, TensorStorageMetadata):
        if isinstance(wanted, torch.Tensor):
            return f"{fqn!r} is a value in the version, and a tensor in the state"
        return None
    dtype = kept.properties.dtype
    if not isinstance(wanted, torch.Tensor):
        return (
            f"{fqn!r} is a tensor ({dtype}, {tuple(kept.size)}) in the version, "
            f"and {type(wanted).__name__} in the state"
        )
    if wanted.size() != kept.size:
        return (
            f"{fqn!r} has shape {tuple(kept.size)} in the version, "
            f"and {tuple(wanted.size())} in the state"
        )
    if wanted.dtype != dtype:
        return f"{fqn!r} has dtype {dtype} in the version, and {wanted.dtype} in the state"
    return None


def _absent(fqn: str, stored: dict[str, Any]) -> str:
    near = difflib.get_close_matches(fqn, stored, n=2, cutoff=0.8)
    hint = f" (near: {', '.join(map(repr, near))})" if near else ""
    return f"{fqn!r} is not in the version{hint}"
