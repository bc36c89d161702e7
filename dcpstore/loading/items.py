"""The read items of one rank's plan, carried out: boxes into its tensors, values into its state."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TypeGuard

import torch
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from dcpstore.catalog import Catalog
from dcpstore.collector import collector_free
from dcpstore.encoding.values import PlannerBytes, check_safe
from dcpstore.errors import InvalidInputError, UnsafeDataError
from dcpstore.geometry.boxes import Box
from dcpstore.planning.load_planner import DefaultLoadPlanner
from dcpstore.progress import ProgressBar
from dcpstore.reading.boxes import BoxRequest, find_chunks, read_boxes
from dcpstore.reading.values import read_values
from dcpstore.records import EntryRecord
from dcpstore.storage.packs import PackReader

__all__ = ["ItemReads", "check_values"]


def check_values(plan: LoadPlan, entries: Mapping[str, EntryRecord], *, version: int) -> None:
    """Check that no value that a plan asks for is a pickle.

    Raises:
        UnsafeDataError: one is, naming it.
    """
    for item in plan.items:
        entry = entries.get(item.storage_index.fqn)
        if entry is not None and entry.value is not None:
            try:
                check_safe(entry.value)
            except UnsafeDataError as error:
                raise UnsafeDataError(f"v{version}: {entry.fqn!r}: {error}") from error


class ItemReads:
    """The read items of one rank, split into boxes of tensors and values."""

    def __init__(
        self,
        plan: LoadPlan,
        planner: LoadPlanner,
        entries: Mapping[str, EntryRecord],
    ) -> None:
        self._planner = planner
        self._tensors: list[tuple[ReadItem, torch.Tensor]] = []
        self._requests: list[BoxRequest] = []
        self._values: list[tuple[ReadItem, EntryRecord]] = []
        for item in plan.items:
            entry = entries.get(item.storage_index.fqn)
            if entry is None:
                raise InvalidInputError(
                    f"the planner asks for {item.storage_index.fqn!r}, which the version lacks; "
                    "its plan must name FQNs of the version."
                )
            if item.type == LoadItemType.BYTE_IO:
                self._values.append((item, entry))
                continue
            target = planner.resolve_tensor(item).detach()
            if target.size() != item.lengths:
                raise InvalidInputError(
                    f"the planner gives a tensor of {tuple(target.size())} for a box of "
                    f"{tuple(item.lengths)} of {item.storage_index.fqn!r}; make them agree."
                )
            start = item.storage_index.offset or (0,) * len(item.lengths)
            offsets = tuple(a + b for a, b in zip(start, item.storage_offsets, strict=True))
            self._tensors.append((item, target))
            self._requests.append(BoxRequest(entry, Box(offsets, tuple(item.lengths)), target))

    def measure(self, catalog: Catalog, *, version: int) -> tuple[int, int]:
        """Return the chunks and encoded bytes that `run` would read."""
        boxes = ((request.entry, request.box) for request in self._requests)
        chunks = find_chunks(boxes, catalog, version=version)
        return len(chunks), sum(chunk.length for chunk in chunks)

    def run(
        self,
        catalog: Catalog,
        packs: PackReader,
        bar: ProgressBar,
        *,
        version: int,
        verify: bool,
        allow_pickle: bool,
    ) -> tuple[int, int]:
        """Read everything; return the chunks and encoded bytes that it took.

        Values are read first, so that one which cannot be leaves the tensors as they are.
        """
        for item, target in self._tensors:
            if target.is_meta:
                raise InvalidInputError(
                    f"the planner gives a tensor on the meta device for {item.dest_index.fqn!r}, "
                    "which has no memory to fill; have it make room in finish_plan."
                )
        values = read_values(
            [entry for _, entry in self._values],
            catalog,
            packs,
            version=version,
            allow_pickle=allow_pickle,
        )
        nbytes = sum(request.target.nbytes for request in self._requests)
        bar.begin("read", nbytes)
        with collector_free(nbytes):
            counts = read_boxes(
                self._requests, catalog, packs, version=version, verify=verify, advance=bar.advance
            )
        for item, target in self._tensors:
            self._planner.commit_tensor(item, target)
        for (item, _), value in zip(self._values, values, strict=True):
            if _takes_values(self._planner) and not isinstance(value, PlannerBytes):
                self._planner.load_value(item, value)
            else:
                self._planner.load_bytes(item, _as_file(value))
        return counts.chunks, counts.nbytes


def _takes_values(planner: LoadPlanner) -> TypeGuard[DefaultLoadPlanner]:
    """Tell whether a planner takes values themselves: a subclass may want torch's bytes of them."""
    return (
        isinstance(planner, DefaultLoadPlanner)
        and type(planner).load_bytes is DefaultLoadPlanner.load_bytes
    )


def _as_file(value: object) -> io.BytesIO:
    if isinstance(value, PlannerBytes):
        return io.BytesIO(value)
    data = io.BytesIO()
    torch.save(value, data)
    data.seek(0)
    return data
