"""The read items of one rank's plan, carried out: boxes into its tensors, values into its state."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import TypeGuard

import torch
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from dcpstore.catalog.catalog import Catalog
from dcpstore.core.gc_pause import gc_allowed
from dcpstore.core.progress import ProgressBar
from dcpstore.encoding.values import PlannerBytes, check_safe, decode_value, depends_on_template
from dcpstore.errors import CorruptionError, InvalidInputError, MismatchError, UnsafeDataError
from dcpstore.geometry.boxes import Box
from dcpstore.planning.load_planner import DefaultLoadPlanner, ValueFile
from dcpstore.reading.box_reads import BoxRequest, find_chunks, read_boxes
from dcpstore.reading.selection import read_values
from dcpstore.records import EntryRecord
from dcpstore.storage.packs import PackReader

__all__ = ["ItemReads", "check_values"]


def check_values(
    plan: LoadPlan,
    planner: LoadPlanner,
    entries: Mapping[str, EntryRecord],
    *,
    version: int,
    allow_pickle: bool,
) -> None:
    """Check that each value that a plan asks for can be given to the state.

    Values whose bytes lie in packs are checked for pickles only; their classes show when they are
    read.

    Raises:
        UnsafeDataError: one is a pickle, and `allow_pickle` is false.
        MismatchError: some are not of the class that the state holds in their place.
        CorruptionError: one is damaged.
    """
    differences: list[str] = []
    for item in plan.items:
        entry = entries.get(item.storage_index.fqn)
        if entry is None or entry.value is None:
            continue
        try:
            if not allow_pickle:
                check_safe(entry.value)
            if entry.kind == "value" and depends_on_template(entry.value):
                decode_value(entry.value, allow_pickle=False, template=_template(planner, item))
        except MismatchError as error:
            differences += (f"{entry.fqn!r} {difference}" for difference in error.differences)
        except (UnsafeDataError, CorruptionError) as error:
            raise type(error)(f"v{version}: {entry.fqn!r}: {error}") from error
    if differences:
        raise MismatchError.listing(differences)


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
            templates=[_template(self._planner, item) for item, _ in self._values],
        )
        nbytes = sum(request.target.nbytes for request in self._requests)
        bar.begin("read", nbytes)
        with gc_allowed(nbytes):
            counts = read_boxes(
                self._requests, catalog, packs, version=version, verify=verify, advance=bar.advance
            )
        for item, target in self._tensors:
            self._planner.commit_tensor(item, target)
        for (item, _), value in zip(self._values, values, strict=True):
            if _takes_values(self._planner) and not isinstance(value, PlannerBytes):
                self._planner.load_value(item, value)
            else:
                self._planner.load_bytes(item, _as_file(item, value))
        return counts.chunks, counts.nbytes


def _template(planner: LoadPlanner, item: ReadItem) -> object:
    """Return what the state has where an item's value belongs; None where it does not say."""
    held = getattr(planner, "state_dict", None)
    return held.get(item.dest_index.fqn) if isinstance(held, Mapping) else None


def _takes_values(planner: LoadPlanner) -> TypeGuard[DefaultLoadPlanner]:
    """Tell whether a planner takes values themselves: a subclass may want torch's bytes of them."""
    return (
        isinstance(planner, DefaultLoadPlanner)
        and type(planner).load_bytes is DefaultLoadPlanner.load_bytes
    )


def _as_file(item: ReadItem, value: object) -> io.BytesIO:
    if isinstance(value, PlannerBytes):
        return io.BytesIO(value)
    try:
        return ValueFile(value)
    except (TypeError, pickle.PicklingError) as error:
        raise InvalidInputError(
            f"{item.dest_index.fqn!r}: the planner reads values from torch's bytes, and torch "
            f"cannot make bytes of a {type(value).__qualname__} ({error}); load with "
            "dcpstore.DefaultLoadPlanner."
        ) from error
