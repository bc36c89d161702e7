"""Tensors of a state that share memory: a load fills them only if their stored contents are equal.

Two stored tensors that are read into the same memory would overwrite each other. Invariant: this is
found before a tensor is filled, and the error names both FQNs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch

from dcpstore.catalog.catalog import Catalog
from dcpstore.encoding.dtypes import torch_dtype
from dcpstore.errors import MismatchError
from dcpstore.geometry.boxes import Box
from dcpstore.planning.load_planner import DefaultLoadPlanner
from dcpstore.reading.box_reads import BoxRequest, read_boxes
from dcpstore.records import EntryRecord
from dcpstore.state.targets import memory_of
from dcpstore.storage.interface import Storage
from dcpstore.storage.packs import PackReader

__all__ = ["check_memory"]

_MOST_WORK = 1_000_000  # candidates that numpy tries before it gives up on two interleaved layouts


def check_memory(
    planner: DefaultLoadPlanner,
    entries: Mapping[str, EntryRecord],
    catalog: Catalog,
    storage: Storage,
    *,
    version: int,
) -> None:
    """Check that two stored tensors are read into the same memory only if they are equal.

    Raises:
        MismatchError: they differ; it names each pair of FQNs, and no tensor was changed.
        CorruptionError: stored bytes that had to be compared are damaged.
    """
    targets = [*planner.targets()]
    views = [view for _, _, view in targets]
    differences = []
    for i, j in (*_sharing_pairs(views), *_same_on_meta(views)):
        (fqn, offsets, view), (twin, twin_offsets, twin_view) = targets[i], targets[j]
        if fqn == twin:
            continue  # boxes of one tensor: the planner has checked that (`target_fault`)
        if offsets == twin_offsets and memory_of(view) == memory_of(twin_view):
            pair = [entries[planner.stored_fqn(name)] for name in (fqn, twin)]
            box = Box(offsets, tuple(view.shape))
            if _are_equal(pair, box, catalog, storage, version=version):
                continue
        differences.append(
            f"{fqn!r} and {twin!r} share memory in the state, and differ in the version; give each "
            "its own tensor, or exclude one with exclude="
        )
    if differences:
        raise MismatchError.listing(differences)


def _same_on_meta(views: Sequence[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """Yield the indices of each pair that is one tensor on the meta device.

    The load allocates memory for that tensor once, so they will share it.
    """
    first: dict[int, int] = {}
    for i, view in enumerate(views):
        if view.is_meta and first.setdefault(id(view), i) != i:
            yield first[id(view)], i


def _are_equal(
    pair: Sequence[EntryRecord], box: Box, catalog: Catalog, storage: Storage, *, version: int
) -> bool:
    """Tell whether two stored tensors are equal in a box: by their digests, or by their bytes."""
    one, other = (entry.tensor for entry in pair)
    if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if one.digest == other.digest:
        return True
    # Equal tensors that are cut into chunks differently have different digests: compare the bytes.
    read = [torch.empty(box.sizes, dtype=torch_dtype(one.dtype)) for _ in pair]
    requests = [BoxRequest(entry, box, target) for entry, target in zip(pair, read, strict=True)]
    with closing(PackReader(storage)) as packs:
        read_boxes(requests, catalog, packs, version=version)
    first, second = (tensor.reshape(-1).view(torch.uint8) for tensor in read)
    return torch.equal(first, second)


def _sharing_pairs(targets: Sequence[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """Yield the indices of each pair of tensors that share an element in memory.

    Tensors without memory or elements have none. A tensor that shares with several is yielded with
    each of its neighbours in memory, so that each sharing tensor is named.
    """
    held = [i for i, tensor in enumerate(targets) if tensor.numel() and not tensor.is_meta]
    starts = np.array([targets[i].data_ptr() for i in held], np.uint64)
    lengths = np.array([_extent(targets[i]) for i in held], np.uint64)
    order = np.argsort(starts, kind="stable")
    ends = np.maximum.accumulate((starts + lengths)[order]) if held else lengths
    meets = np.flatnonzero(ends[:-1] > starts[order][1:])
    if not len(meets):
        return  # nearly always: no two address ranges overlap
    # Sweep by address: `live` are the tensors whose ranges reach past the current start.
    live: list[int] = []
    for i in (held[at] for at in order.tolist()):
        one = targets[i]
        live = [j for j in live if targets[j].data_ptr() + _extent(targets[j]) > one.data_ptr()]
        for j in live:
            if targets[j].device == one.device and _shares(targets[j], one):
                yield j, i
        live.append(i)


def _extent(tensor: torch.Tensor) -> int:
    """Return the bytes from a tensor's first element to the end of its last."""
    if tensor.is_contiguous():
        return tensor.nbytes
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize


def _shares(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors whose address ranges overlap share an element."""
    if one.is_contiguous() and other.is_contiguous():
        return True  # a contiguous range has no gaps
    most: Any = _MOST_WORK  # numpy takes any number, but its type stub has only 0 and 1
    try:
        return np.shares_memory(np.asarray(_Layout(one)), np.asarray(_Layout(other)), max_work=most)
    except np.exceptions.TooHardError:
        return True  # the safe answer: the load is refused


class _Layout:
    """The addresses of a tensor's elements, for numpy, which does not read what is there."""

    def __init__(self, tensor: torch.Tensor) -> None:
        width = tensor.itemsize
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "typestr": f"|V{width}",
            "shape": tuple(tensor.shape),
            "strides": tuple(step * width for step in tensor.stride()),
        }
