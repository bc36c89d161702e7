"""The save planner: what each rank holds becomes write items, and the coordinator assigns them.

It is a subclass of torch's default planner, so that the hooks that torch documents
(`lookup_object`, `transform_object`, plans changed by a subclass) work in the same way. A planner
whose tensors are not in memory is asked for one box at a time, and for each box more than once.
Each result is freed before the next, so the state may be larger than the memory of the process.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch.distributed.checkpoint import default_planner as torch_planner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from dcpstore.formats.composition import Composition
from dcpstore.geometry.boxes import Box
from dcpstore.planning.global_plan import plan_globally
from dcpstore.planning.plan_table import GlobalTable, PlanTable
from dcpstore.planning.torch_metadata import describe_plans
from dcpstore.records import ObjectPath
from dcpstore.state.composed import flatten_parts, take_apart
from dcpstore.state.shards import flat_shards, is_sharded, local_shards, no_shard
from dcpstore.state.tree import FlatPaths, flattened, recorded_paths
from dcpstore.state.walk import nesting_checked

__all__ = ["KNOWN_ITEMS", "BoxResolver", "DefaultSavePlanner", "planner_of", "recorded_by"]

KNOWN_ITEMS = 1 << 14  # items of earlier plans that a process caches, of about 1 kB each


@runtime_checkable
class BoxResolver(Protocol):
    """A save planner that resolves boxes; several threads call it at the same time."""

    def resolve_box(self, write_item: WriteItem, box: Box) -> torch.Tensor:
        """Return a CPU tensor with the elements of `box`, which is inside the item's own box."""


class DefaultSavePlanner(torch_planner.DefaultSavePlanner):
    """Plans a save of DTensor, ShardedTensor, plain tensors and values, nested or flat.

    It differs from torch's planner: replicas are assigned by the bytes that each rank really
    writes, strided shards become one item for each box, and if the boxes of a plan do not tile a
    tensor, the error names the FQN and the ranks. The arguments are torch's.

    Attributes:
        recorded_paths: the paths of all ranks, once the global plan is made, with the kinds of
            their parts, which torch's own form cannot express.
        is_whole: whether a global plan contains the plans of all ranks; if each rank saves for
            itself, the boxes need not fill their tensors.
    """

    # Read-only, because all planners share this default.
    recorded_paths: Mapping[str, ObjectPath] = MappingProxyType({})
    is_whole = True

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Set the state to save.

        Raises:
            InvalidInputError: two items have the same FQN, the state is nested too deep, or it
                contains itself.
        """
        with nesting_checked():
            state_dict = take_apart(state_dict)
        self.mappings = FlatPaths()
        if self.flatten_state_dict:
            flat = flattened(state_dict)
            state_dict, self.mappings = flat.items, flat.paths
        else:
            state_dict = flatten_parts(state_dict)
        if self.flatten_sharded_tensors:
            state_dict = flat_shards(state_dict)
        self.state_dict = state_dict
        self.is_coordinator = is_coordinator
        self._views: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def create_local_plan(self) -> SavePlan:
        """Return one item for each box that this rank holds, and one for each value.

        A tensor of which it holds nothing gives an empty box: so a tensor that no rank holds is
        found.
        """
        # A subclass may change its items in place: it gets new ones.
        make = _known_item if type(self) is DefaultSavePlanner else _new_item
        items: list[WriteItem] = []
        for fqn, value in self.state_dict.items():
            if not isinstance(value, torch.Tensor):
                items.append(make(WriteItemType.BYTE_IO, fqn))
            elif is_sharded(value):
                for shard in local_shards(fqn, value) or no_shard(value):
                    box, described = shard.box, _Described.of(value.size(), shard.data)
                    self._views[fqn, box.offsets] = shard.data
                    items.append(make(WriteItemType.SHARD, fqn, box.offsets, box.sizes, described))
            else:
                described = _Described.of(value.size(), value)
                start = (0,) * len(described.size)
                items.append(make(WriteItemType.TENSOR, fqn, start, described.size, described))
        self.plan = SavePlan(items, planner_data=self.mappings if self.flatten_state_dict else None)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Return the plan of each rank, with replicas assigned, and torch's description of all.

        Raises:
            InvalidInputError: ranks disagree about an FQN, or its boxes do not tile its shape.
        """
        table = plan_globally(
            GlobalTable.of([PlanTable.of(plan) for plan in all_plans]),
            to_lowest_rank=self.dedup_save_to_lowest_rank,
            is_whole=self.is_whole,
        )
        plans = [
            dataclasses.replace(plan, items=[plan.items[i] for i in table.kept(rank)])
            for rank, plan in enumerate(all_plans)
        ]
        described = Metadata(describe_plans(plans))
        if self.flatten_state_dict:
            self.recorded_paths = recorded_paths(plan.planner_data for plan in plans)
            # Torch's description has plain tuples; the marks of the paths are in `recorded_paths`.
            plain = {fqn: tuple(path) for fqn, path in self.recorded_paths.items()}
            described = dataclasses.replace(described, planner_data=plain)
        self.global_plan, self.metadata = plans, described
        return plans, described

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Set the plan that this rank carries out."""
        self.plan = new_plan
        return new_plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return the value, or the local view of the box, that `index` names."""
        # Only boxes of sharded tensors have views; all else is looked up in the state.
        view = self._views.get((index.fqn, tuple(index.offset or ())))
        return self.state_dict[index.fqn] if view is None else view

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """Return torch's bytes of a value, and a tensor as it is.

        The mark of a composed tensor becomes a text, for storages that do not know such tensors.
        """
        if isinstance(object, Composition):
            object = object.to_text()
        return super().transform_object(write_item, object)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Return an item's data: a local view without gradient, or torch's bytes of a value."""
        found = self.transform_object(write_item, self.lookup_object(write_item.index))
        # numpy, which reads the bytes, refuses tensors that require a gradient.
        has_gradient = isinstance(found, torch.Tensor) and found.requires_grad
        data: torch.Tensor | io.BytesIO = found.detach() if has_gradient else found
        return data


class _Described(NamedTuple):
    """What the item of a tensor, or of a box of it, says besides the box."""

    size: torch.Size  # of the whole tensor
    dtype: torch.dtype
    layout: torch.layout
    requires_grad: bool
    is_pinned: bool

    @classmethod
    def of(cls, size: torch.Size, data: torch.Tensor) -> _Described:
        return cls(size, data.dtype, data.layout, data.requires_grad, data.is_pinned())


def _new_item(
    kind: WriteItemType,
    fqn: str,
    offsets: tuple[int, ...] = (),
    sizes: tuple[int, ...] = (),
    described: _Described | None = None,
) -> WriteItem:
    """Return the item of a box of a tensor, or if that is not `described`, of a value."""
    if described is None:
        return WriteItem(index=MetadataIndex(fqn), type=kind)
    size, dtype, layout, requires_grad, is_pinned = described
    start = torch.Size(offsets)
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(start, torch.Size(sizes)),
        properties=TensorProperties(
            dtype, layout, requires_grad, torch.contiguous_format, is_pinned
        ),
        size=size,
    )
    return WriteItem(index=MetadataIndex(fqn, start), type=kind, tensor_data=data)


# Nearly every save has the items of the last one.
_known_item = lru_cache(KNOWN_ITEMS)(_new_item)


def recorded_by(planner: SavePlanner) -> Mapping[str, ObjectPath]:
    """Return the paths of all ranks that a planner has recorded; a foreign planner has none."""
    return planner.recorded_paths if isinstance(planner, DefaultSavePlanner) else {}


def planner_of(planner: SavePlanner | None, *, is_whole: bool) -> SavePlanner:
    """Return the caller's planner, or ours; `is_whole` as in `DefaultSavePlanner.is_whole`."""
    planner = planner or DefaultSavePlanner()
    if isinstance(planner, DefaultSavePlanner):
        planner.is_whole = is_whole
    return planner
