"""Values and blobs of a version, read back as Python objects."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch

from dcpstore.catalog import Catalog
from dcpstore.encoding.values import decode_value
from dcpstore.errors import CorruptionError, MismatchError, UnsafeDataError
from dcpstore.geometry.boxes import Box
from dcpstore.reading.boxes import BoxRequest, read_boxes
from dcpstore.records import EntryRecord
from dcpstore.storage.packs import PackReader

__all__ = ["read_values"]


def read_values(
    entries: Sequence[EntryRecord],
    catalog: Catalog,
    packs: PackReader,
    *,
    version: int,
    allow_pickle: bool,
    templates: Sequence[object] = (),
) -> list[object]:
    """Return the values of entries that are values or blobs, in their order.

    `templates` are values in whose classes they are to come back, one for each entry.

    Raises:
        MismatchError: a value is not of the class that its template holds.
        UnsafeDataError: one is a pickle, and `allow_pickle` is not given.
        CorruptionError: a text or its bytes are damaged.
    """
    blobs = {
        entry.fqn: torch.empty(entry.tensor.shape, dtype=torch.uint8, device="cpu")
        for entry in entries
        if entry.tensor is not None
    }
    requests = [
        BoxRequest(entry, Box.whole(blobs[entry.fqn].shape), blobs[entry.fqn])
        for entry in entries
        if entry.fqn in blobs
    ]
    if requests:
        read_boxes(requests, catalog, packs, version=version)
    values = []
    for entry, template in zip_longest(entries, templates):
        assert entry.value is not None
        blob = blobs.get(entry.fqn)
        data = None if blob is None else blob.numpy().tobytes()
        try:
            values.append(
                decode_value(entry.value, data, allow_pickle=allow_pickle, template=template)
            )
        except MismatchError as error:
            raise MismatchError.listing(
                f"{entry.fqn!r} {difference}" for difference in error.differences
            ) from error
        except (UnsafeDataError, CorruptionError) as error:
            raise type(error)(f"v{version}: {entry.fqn!r}: {error}") from error
    return values
