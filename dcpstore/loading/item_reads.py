"""The read items of one rank's plan: boxes are read into its tensors, values into its state."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from typing import TypeGuard

import torch
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from dcpstore.catalog.catalog import Catalog
from dcpstore.core.gc_pause import gc_allowed
from dcpstore.core.progress import ProgressBar
from dcpstore.encoding.values import PlannerBytes, check_safe, decode_value, depends_on_template
from dcpstore.errors import InvalidInputError, MismatchError
from dcpstore.geometry.boxes import Box
from dcpstore.planning.load_planner import DefaultLoadPlanner, ValueFile
from dcpstore.reading.box_reads import BoxRequest, chunk_ranges, fill_boxes, find_chunks
from dcpstore.reading.selection import blob_requests, decode_values, errors_named
from dcpstore.records import ChunkRange, EntryRecord, StoredChunk
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
    """Check that each value that a plan asks for fits the state.

    Values whose bytes are in packs are checked only for pickles; their classes are known after the
    read.

    Raises:
        UnsafeDataError: one is a pickle, and `allow_pickle` is False.
        MismatchError: some do not fit the class of the value in the state.
        CorruptionError: one is damaged.
    """
    differences: list[str] = []
    for item in plan.items:
        entry = entries.get(item.storage_index.fqn)
        if entry is None or entry.value is None:
            continue
        try:
            with errors_named(entry.fqn, version=version):
                if not allow_pickle:
                    check_safe(entry.value)
                if entry.kind == "value" and depends_on_template(entry.value):
                    decode_value(entry.value, allow_pickle=False, template=_template(planner, item))
        except MismatchError as error:
            differences += error.differences
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
                    "its plan must contain only FQNs of the version."
                )
            if item.type == LoadItemType.BYTE_IO:
                self._values.append((item, entry))
                continue
            # A leaf that requires a gradient cannot be written in place.
            target = planner.resolve_tensor(item).detach()
            if target.size() != item.lengths:
                raise InvalidInputError(
                    f"the planner returns a tensor of shape {tuple(target.size())} for a box of "
                    f"sizes {tuple(item.lengths)} of {item.storage_index.fqn!r}; the two must be "
                    "equal."
                )
            # Torch counts offsets from the stored box, the catalog from the tensor.
            start = item.storage_index.offset or (0,) * len(item.lengths)
            offsets = tuple(a + b for a, b in zip(start, item.storage_offsets, strict=True))
            self._tensors.append((item, target))
            self._requests.append(BoxRequest(entry, Box(offsets, tuple(item.lengths)), target))
        self._blobs = blob_requests([entry for _, entry in self._values])

    def measure(self, catalog: Catalog, *, version: int) -> tuple[int, int]:
        """Return the numbers of chunks and of encoded bytes that `run` would read."""
        boxes = ((request.entry, request.box) for request in self._requests)
        chunks = find_chunks(boxes, catalog, version=version)
        return len(chunks), sum(chunk.length for chunk in chunks)

    def check_room(self) -> None:
        """Check that each target has memory to fill.

        Raises:
            InvalidInputError: one is on the meta device.
        """
        for item, target in self._tensors:
            if target.is_meta:
                raise InvalidInputError(
                    f"the planner returns a tensor on the meta device for {item.dest_index.fqn!r}, "
                    "which has no memory to fill; let it allocate memory in finish_plan."
                )

    def ranges(self, *, version: int) -> list[ChunkRange]:
        """Return the ranges of all chunks that `run` reads, those of blobs too.

        Raises:
            CorruptionError: the parts in the catalog do not cover a box.
        """
        requests = [*self._blobs.values(), *self._requests]
        return chunk_ranges(((one.entry, one.box) for one in requests), version=version)

    def run(
        self,
        stored: Sequence[StoredChunk],
        packs: PackReader,
        bar: ProgressBar,
        *,
        version: int,
        verify: bool,
        allow_pickle: bool,
    ) -> tuple[int, int]:
        """Read everything; return the numbers of chunks and of encoded bytes of tensors.

        `stored` are the chunks of `ranges`. Values are read first, so that an error in a value
        leaves the tensors unchanged.
        """
        self.check_room()
        blobs = [*self._blobs.values()]
        if blobs:
            fill_boxes(blobs, _chunks_of(blobs, stored), packs, version=version)
        values = decode_values(
            [entry for _, entry in self._values],
            self._blobs,
            version=version,
            allow_pickle=allow_pickle,
            templates=[_template(self._planner, item) for item, _ in self._values],
        )
        nbytes = sum(request.target.nbytes for request in self._requests)
        bar.begin("read", nbytes)
        with gc_allowed(nbytes):
            counts = fill_boxes(
                self._requests,
                _chunks_of(self._requests, stored) if blobs else stored,
                packs,
                version=version,
                verify=verify,
                advance=bar.advance,
            )
        for item, target in self._tensors:
            self._planner.commit_tensor(item, target)
        for (item, _), value in zip(self._values, values, strict=True):
            # Our own `load_bytes` would read back what `ValueFile` writes: both are left out.
            if _takes_values(self._planner) and not isinstance(value, PlannerBytes):
                self._planner.load_value(item, value)
            else:
                self._planner.load_bytes(item, _as_file(item, value))
        return counts.chunks, counts.nbytes


def _chunks_of(requests: Sequence[BoxRequest], stored: Sequence[StoredChunk]) -> list[StoredChunk]:
    """Return the chunks of the tensors that are requested."""
    tensors = {one.entry.tensor.id for one in requests if one.entry.tensor is not None}
    return [chunk for chunk in stored if chunk.tensor_id in tensors]


def _template(planner: LoadPlanner, item: ReadItem) -> object:
    """Return the item of the state that a value replaces; None if the planner does not say."""
    held = getattr(planner, "state_dict", None)
    return held.get(item.dest_index.fqn) if isinstance(held, Mapping) else None


def _takes_values(planner: LoadPlanner) -> TypeGuard[DefaultLoadPlanner]:
    """Tell whether a planner takes values as they are; a subclass may want torch's bytes."""
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
            f"cannot serialize a {type(value).__qualname__} ({error}); load with "
            "dcpstore.DefaultLoadPlanner."
        ) from error
