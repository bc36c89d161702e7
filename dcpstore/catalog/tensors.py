"""Tensor contents as records, each with its parts."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Select, select

from dcpstore.catalog import schema
from dcpstore.errors import CorruptionError
from dcpstore.records import PartRecord, TensorRecord

__all__ = ["load_tensors"]


def load_tensors(connection: Connection, ids: Select[Any]) -> dict[int, TensorRecord]:
    """Return the tensors whose ids a query selects, by id; two queries, however many they are."""
    tensor, part = schema.tensor, schema.part
    parts: dict[int, list[PartRecord]] = {}
    cut = connection.execute(
        select(part.c.tensor, part.c.part, part.c.offsets, part.c.shape, part.c.chunk_shape)
        .where(part.c.tensor.in_(ids))
        .order_by(part.c.tensor, part.c.part)
    )
    for held, number, offsets, shape, chunk_shape in cut.all():  # quicker than one row at a time
        if 0 in chunk_shape or not len(offsets) == len(shape) == len(chunk_shape):
            raise CorruptionError(
                f"the catalog is damaged: part {number} of tensor {held} has chunks of "
                f"{chunk_shape}; restore it from a backup, or with 'dcpstore rebuild'."
            )
        parts.setdefault(held, []).append(PartRecord(offsets, shape, chunk_shape))
    rows = connection.execute(
        select(
            tensor.c.id,
            tensor.c.digest,
            tensor.c.dtype,
            tensor.c.shape,
            tensor.c.codec,
            tensor.c.nbytes,
        ).where(tensor.c.id.in_(ids))
    )
    found = {
        held: TensorRecord(
            id=held,
            digest=digest,
            dtype=dtype,
            shape=shape,
            codec=codec,
            nbytes=nbytes,
            parts=tuple(parts.get(held, ())),
        )
        for held, digest, dtype, shape, codec, nbytes in rows.all()
    }
    for record in found.values():
        if any(len(part.shape) != len(record.shape) for part in record.parts):
            raise CorruptionError(
                f"the catalog is damaged: tensor {record.id} has the shape {record.shape}, and its "
                "parts another number of dimensions; restore it from a backup, or with "
                "'dcpstore rebuild'."
            )
    return found
