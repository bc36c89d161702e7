"""An archive as `torch.save` writes it, tensor after tensor, none of them ever whole in memory.

torch itself writes an archive only of tensors that it holds. The format is a zip archive of
uncompressed records: a pickle whose tensors name their storages, and a record a storage, each at a
multiple of 64 bytes so that it can be mapped.

Invariant: it claims nothing that does not hold. torch's `.format_version` and `.storage_alignment`
are left out: by them torch computes where storages lie, from the very bytes of headers that its own
writer makes, and zipfile makes others. Without them it looks.
"""

from __future__ import annotations

import io
import pickle
import secrets
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from torch._utils import _rebuild_tensor_v2, _rebuild_tensor_v3

from dcpstore.convert.file_tensors import row_major
from dcpstore.encoding.dtypes import as_bytes

__all__ = ["PlannedTensor", "write_archive"]

_ALIGNMENT = 64
_PROTOCOL = 2  # torch's
_ROOT = "archive"
_ZIP_HEADER = 30  # bytes of a record's own header, without name and extra fields
_ZIP64_EXTRA = 20
_PADDING = struct.Struct("<HH")  # an extra field's id and length
_PADDING_ID = 0x4246  # "FB", as torch pads
_TYPED: Mapping[torch.dtype, Any] = {  # classes of storages; torch names the rest by dtype
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
    torch.complex64: torch.ComplexFloatStorage,
    torch.complex128: torch.ComplexDoubleStorage,
}


@dataclass(frozen=True, slots=True, eq=False)
class PlannedTensor:
    """A tensor that the archive is to hold; where one stands twice in the state, it is tied."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    raw: Callable[[], Iterable[memoryview]]


@dataclass(frozen=True, slots=True)
class _StorageName:
    """The storage of a planned tensor, as the pickle names it."""

    kind: Any
    key: str
    count: int


class _Pickler(pickle.Pickler):
    """Pickles a state, its planned tensors by the names of their storages."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, _PROTOCOL)
        self.planned: list[PlannedTensor] = []

    def persistent_id(self, obj: object) -> Any:
        if isinstance(obj, _StorageName):
            return ("storage", obj.kind, obj.key, "cpu", obj.count)
        return None

    def reducer_override(self, obj: object) -> Any:
        requires_grad = False
        if type(obj) is torch.Tensor:  # inside a value, whose bytes are in memory already
            requires_grad = obj.requires_grad
            obj = _planned(obj)
        if not isinstance(obj, PlannedTensor):
            return NotImplemented
        key = str(len(self.planned))  # the pickler remembers it, and asks once a tensor
        self.planned.append(obj)
        typed = _TYPED.get(obj.dtype)
        count = obj.nbytes // obj.dtype.itemsize if typed else obj.nbytes
        storage = _StorageName(typed or torch.UntypedStorage, key, count)
        strides = row_major(obj.shape)
        hooks: OrderedDict[str, object] = OrderedDict()
        shaped = (storage, 0, obj.shape, strides, requires_grad, hooks)
        return (_rebuild_tensor_v2, shaped) if typed else (_rebuild_tensor_v3, (*shaped, obj.dtype))


def _planned(tensor: torch.Tensor) -> PlannedTensor:
    held = as_bytes(tensor)
    data = np.ascontiguousarray(held).reshape(-1).view(np.uint8).data
    return PlannedTensor(tensor.dtype, tuple(tensor.shape), held.nbytes, lambda: [data])


def write_archive(file: IO[bytes], state: object) -> None:
    """Write an archive of a state whose tensors are planned ones."""
    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(state)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _write(archive, "data.pkl", [pickled.getbuffer()])
        _write(archive, "byteorder", [memoryview(sys.byteorder.encode())])
        for key, planned in enumerate(pickler.planned):
            _write(archive, f"data/{key}", planned.raw())
        _write(archive, "version", [memoryview(b"3\n")])
        serial = f"{secrets.randbelow(10**40):040}".encode()
        _write(archive, ".data/serialization_id", [memoryview(serial)])


def _write(archive: zipfile.ZipFile, name: str, parts: Iterable[memoryview]) -> None:
    assert archive.fp is not None
    record = zipfile.ZipInfo(f"{_ROOT}/{name}")
    header = _ZIP_HEADER + len(record.filename.encode()) + _ZIP64_EXTRA + _PADDING.size
    padding = -(archive.fp.tell() + header) % _ALIGNMENT
    record.extra = _PADDING.pack(_PADDING_ID, padding) + b"Z" * padding
    with archive.open(record, "w", force_zip64=True) as out:
        for part in parts:
            out.write(part)
