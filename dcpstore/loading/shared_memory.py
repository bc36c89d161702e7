"""Two stored tensors that a load would read into one memory: refused, unless they are equal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing

import torch

from dcpstore.catalog.catalog import Catalog
from dcpstore.encoding.dtypes import torch_dtype
from dcpstore.errors import MismatchError
from dcpstore.geometry.boxes import Box
from dcpstore.planning.load_planner import DefaultLoadPlanner
from dcpstore.reading.box_reads import BoxRequest, read_boxes
from dcpstore.records import EntryRecord
from dcpstore.state.targets import is_same_memory, sharing_targets
from dcpstore.storage.interface import Storage
from dcpstore.storage.packs import PackReader

__all__ = ["check_memory"]


def check_memory(
    planner: DefaultLoadPlanner,
    entries: Mapping[str, EntryRecord],
    catalog: Catalog,
    storage: Storage,
    *,
    version: int,
) -> None:
    """Check that no two stored tensors are to be read into one memory, but for equal ones.

    Raises:
        MismatchError: some are, by their FQNs; nothing was touched.
        CorruptionError: stored bytes are damaged that had to be compared.
    """
    found = [*planner.targets()]
    views = [view for _, _, view in found]
    differences = []
    for one, other in (*sharing_targets(views), *_sharing_a_room(views)):
        (fqn, offsets, view), (twin, twin_offsets, twin_view) = found[one], found[other]
        if fqn == twin:
            continue  # boxes of one tensor, which `target_fault` judges
        if offsets == twin_offsets and (view is twin_view or is_same_memory(view, twin_view)):
            names = (planner.stored_fqn(name) for name in (fqn, twin))
            pair = [entries[name] for name in names]
            box = Box(offsets, tuple(view.shape))
            if _are_equal(pair, box, catalog, storage, version=version):
                continue
        differences.append(
            f"{fqn!r} and {twin!r} lie in the same memory of the state, and differ in the version; "
            "give each a tensor of its own, or leave one out by exclude="
        )
    if differences:
        raise MismatchError.listing(differences)


def _sharing_a_room(views: Sequence[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """Yield the places of each two that are one tensor on the meta device, and get one memory."""
    first: dict[int, int] = {}
    for i, view in enumerate(views):
        if view.is_meta and first.setdefault(id(view), i) != i:
            yield first[id(view)], i


def _are_equal(
    pair: Sequence[EntryRecord], box: Box, catalog: Catalog, storage: Storage, *, version: int
) -> bool:
    """Tell whether two stored tensors are equal in a box: by their digests, or by their bits."""
    one, other = (entry.tensor for entry in pair)
    if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if one.digest == other.digest:
        return True
    # equal tensors that are cut differently have different digests
    read = [torch.empty(box.sizes, dtype=torch_dtype(one.dtype)) for _ in pair]
    requests = [BoxRequest(entry, box, target) for entry, target in zip(pair, read, strict=True)]
    with closing(PackReader(storage)) as packs:
        read_boxes(requests, catalog, packs, version=version)
    first, second = (tensor.reshape(-1).view(torch.uint8) for tensor in read)
    return torch.equal(first, second)
