"""Entries read without a template: whole tensors, slices of them, values and blobs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from types import EllipsisType
from typing import Any

import torch

from dcpstore.catalog.catalog import Catalog
from dcpstore.encoding.composed_tensors import put_together
from dcpstore.encoding.dtypes import torch_dtype
from dcpstore.encoding.values import decode_value
from dcpstore.errors import DcpstoreError, InvalidInputError, MismatchError
from dcpstore.formats.composition import ComposedEntry, fold_entries
from dcpstore.geometry.boxes import Box
from dcpstore.reading.box_reads import BoxRequest, read_boxes
from dcpstore.records import EntryRecord
from dcpstore.storage.packs import PackReader

__all__ = [
    "Index",
    "blob_requests",
    "decode_values",
    "errors_named",
    "read_entries",
    "read_values",
]


def read_values(
    entries: Sequence[EntryRecord],
    catalog: Catalog,
    packs: PackReader,
    *,
    version: int,
    allow_pickle: bool,
) -> list[object]:
    """Return the values of entries that are values or blobs, in their order.

    Raises:
        UnsafeDataError: one is a pickle, and `allow_pickle` is False.
        CorruptionError: the text or the bytes of one are damaged.
    """
    # All blobs are read in one call, so that they take one query.
    blobs = blob_requests(entries)
    if blobs:
        read_boxes([*blobs.values()], catalog, packs, version=version)
    return decode_values(entries, blobs, version=version, allow_pickle=allow_pickle)


def blob_requests(entries: Sequence[EntryRecord]) -> dict[str, BoxRequest]:
    """Return by FQN what reads the bytes of each entry that is a blob."""
    return {
        entry.fqn: BoxRequest(
            entry,
            Box.whole(entry.tensor.shape),
            torch.empty(entry.tensor.shape, dtype=torch.uint8, device="cpu"),
        )
        for entry in entries
        if entry.tensor is not None
    }


def decode_values(
    entries: Sequence[EntryRecord],
    blobs: Mapping[str, BoxRequest],
    *,
    version: int,
    allow_pickle: bool,
    templates: Sequence[object] = (),
) -> list[object]:
    """Return the values of entries that are values or blobs, in their order.

    Args:
        entries: of one version.
        blobs: the `blob_requests` of these, whose targets have been filled.
        version: the number of the version.
        allow_pickle: whether they may be pickles.
        templates: values whose classes the results get, one for each entry.

    Raises:
        MismatchError: a stored value does not fit the class of its template.
        UnsafeDataError, CorruptionError: as `read_values`.
    """
    values = []
    for entry, template in zip_longest(entries, templates):
        assert entry.value is not None
        blob = blobs.get(entry.fqn)
        data = None if blob is None else blob.target.numpy().tobytes()
        with errors_named(entry.fqn, version=version):
            values.append(
                decode_value(entry.value, data, allow_pickle=allow_pickle, template=template)
            )
    return values


@contextmanager
def errors_named(fqn: str, *, version: int) -> Iterator[None]:
    """Add the FQN, and the version if it is to blame, to errors of dcpstore in the block."""
    try:
        yield
    except MismatchError as error:
        raise MismatchError.listing(f"{fqn!r} {line}" for line in error.differences) from error
    except DcpstoreError as error:
        raise type(error)(f"v{version}: {fqn!r}: {error}") from error


Index = int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]


def read_entries(
    entries: Sequence[EntryRecord],
    indices: Mapping[str, Index],
    catalog: Catalog,
    packs: PackReader,
    *,
    version: int,
    verify: bool,
    allow_pickle: bool,
) -> dict[str, Any]:
    """Return the tensor of each entry, on the CPU, or its value; `indices` select from tensors.

    Only chunks that an index selects from are read. If `entries` has the mark and all parts of a
    composed tensor, they are returned as that tensor.

    Raises:
        InvalidInputError: an index does not fit the shape of its tensor.
        CorruptionError: stored bytes are damaged.
        UnsafeDataError: a value is a pickle, and `allow_pickle` is False.
        DcpstoreError: the class of a composed tensor is not installed.
    """
    found: dict[str, Any] = {}
    requests = []
    rest: dict[str, tuple[int | slice, ...]] = {}
    for entry in entries:
        if entry.kind != "tensor":
            if entry.fqn in indices:
                raise InvalidInputError(f"{entry.fqn!r} is a {entry.kind} and takes no index.")
            continue
        assert entry.tensor is not None
        box, rest[entry.fqn] = _boxed(entry.fqn, entry.tensor.shape, indices.get(entry.fqn, ...))
        target = _room(entry.fqn, box, torch_dtype(entry.tensor.dtype))
        found[entry.fqn] = target
        if box.volume:  # a box without elements needs no chunk
            requests.append(BoxRequest(entry, box, target))
    read_boxes(requests, catalog, packs, version=version, verify=verify)
    for fqn, index in rest.items():
        found[fqn] = found[fqn][index]
    plain = [entry for entry in entries if entry.kind != "tensor"]
    values = read_values(plain, catalog, packs, version=version, allow_pickle=allow_pickle)
    found.update(zip((entry.fqn for entry in plain), values, strict=True))
    return {
        one.fqn: _together(one, found, version)
        if isinstance(one, ComposedEntry)
        else found[one.fqn]
        for one in fold_entries(entries)
    }


def _together(one: ComposedEntry, found: Mapping[str, Any], version: int) -> torch.Tensor:
    parts = {one.part_name(part): found[part.fqn] for part in one.parts}
    with errors_named(one.fqn, version=version):
        return put_together(one.composition, parts)


def _room(fqn: str, box: Box, dtype: torch.dtype) -> torch.Tensor:
    """Return uninitialised memory for a box of a stored tensor."""
    try:
        return torch.empty(box.sizes, dtype=dtype, device="cpu")
    except RuntimeError as error:  # torch does not raise MemoryError
        raise DcpstoreError(
            f"not enough memory for {fqn!r}: {box.volume} elements of {dtype}; read slices of it, "
            "or run 'dcpstore verify' if the tensor should not be so large."
        ) from error


def _boxed(fqn: str, shape: tuple[int, ...], index: Index) -> tuple[Box, tuple[int | slice, ...]]:
    """Return the smallest box that holds what `index` selects, and the index into that box."""
    given = index if isinstance(index, tuple) else (index,)
    dims = sum(part is not ... for part in given)
    if dims > len(shape) or dims < len(given) - 1:
        raise InvalidInputError(f"index {index!r} does not fit {fqn!r} of shape {shape}.")
    fill = [slice(None)] * (len(shape) - dims)
    at = next((i for i, part in enumerate(given) if part is ...), len(given))
    full = [*given[:at], *fill, *given[at + 1 :]]
    offsets: list[int] = []
    sizes: list[int] = []
    rest: list[int | slice] = []
    for part, n in zip(full, shape, strict=True):
        if isinstance(part, slice) and (bounds := _bounds(part, n)) is not None:
            start, stop, step = bounds
            offsets.append(start)
            sizes.append(max(stop - start, 0))
            rest.append(slice(None, None, step))
        elif isinstance(part, int) and not isinstance(part, bool) and -n <= part < n:
            offsets.append(part % n)
            sizes.append(1)
            rest.append(0)  # drops the dimension, as an integer index does
        else:
            raise InvalidInputError(
                f"index {part!r} does not fit {fqn!r} of shape {shape}; use integers inside it, "
                "slices with a positive step, or '...'."
            )
    return Box(tuple(offsets), tuple(sizes)), tuple(rest)


def _bounds(part: slice, n: int) -> tuple[int, int, int] | None:
    """Return start, stop and step inside `n`; None for a slice that is not supported."""
    try:
        start, stop, step = part.indices(n)
    except (TypeError, ValueError):  # not integers, or a step of zero
        return None
    return (start, stop, step) if step > 0 else None
