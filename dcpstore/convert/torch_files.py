"""Files of `torch.save`: in, and out again.

An import reads the pickle of a file; the bytes of its tensors stay in the file until a chunk needs
them. An export writes tensor after tensor, none of them whole in memory; torch itself writes only
tensors that are in memory. The format is a zip archive of uncompressed records: a pickle whose
tensors name their storages, and one record for each storage, aligned to 64 bytes so that it can be
mapped. Invariant: an export makes no false claims. Torch's `.format_version` and
`.storage_alignment` are left out: with them torch computes where storages are, from the exact bytes
of the headers that its own writer makes, and zipfile makes others. Without them it looks.
"""

from __future__ import annotations

import io
import os
import pickle
import secrets
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Unpack

import numpy as np
import torch

from dcpstore.api import RepositoryLike
from dcpstore.compat.torch_private import rebuild_tensor_v2, rebuild_tensor_v3
from dcpstore.convert.exporting import (
    Exported,
    ExportedVersion,
    ExportOptions,
    find_ties,
    shows_export_options,
)
from dcpstore.convert.importing import Foreign, row_major, save_foreign
from dcpstore.convert.paths import new_file
from dcpstore.convert.pickles import Odd, odd_inside
from dcpstore.convert.torch_archive import Loaded, is_archive, load_archive, open_source, refuse_odd
from dcpstore.encoding.dtypes import DTYPES, as_bytes
from dcpstore.encoding.values import PlannerBytes, encode_value
from dcpstore.errors import InvalidInputError, NotFoundError, UnsafeDataError
from dcpstore.formats.composition import Composition
from dcpstore.records import RefLike, Version
from dcpstore.repository import opened
from dcpstore.saving.request import VersionOptions, shows_options
from dcpstore.state.tree import flattened, nested_state

__all__ = ["PlannedTensor", "export_torch", "import_torch", "write_archive"]

_ALIGNMENT = 64
_PROTOCOL = 2  # torch's
_ROOT = "archive"
_ZIP_HEADER = 30  # bytes of a record's own header, without name and extra fields
_ZIP64_EXTRA = 20
_PADDING = struct.Struct("<HH")  # an extra field's id and length
_PADDING_ID = 0x4246  # "FB", as torch pads
_STORAGES = {row.torch: row.storage for row in DTYPES}  # None: named by its dtype


@dataclass(frozen=True, slots=True, eq=False)
class PlannedTensor:
    """A tensor that the archive will hold; one that is in the state twice is tied."""

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
        key = str(len(self.planned))  # the pickler memoizes it, and asks once for each tensor
        self.planned.append(obj)
        typed = _STORAGES[obj.dtype]
        count = obj.nbytes // obj.dtype.itemsize if typed else obj.nbytes
        storage = _StorageName(typed or torch.UntypedStorage, key, count)
        strides = row_major(obj.shape)
        hooks: OrderedDict[str, object] = OrderedDict()
        shaped = (storage, 0, obj.shape, strides, requires_grad, hooks)
        return (rebuild_tensor_v2, shaped) if typed else (rebuild_tensor_v3, (*shaped, obj.dtype))


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


@shows_options(VersionOptions)
def import_torch(
    path: str | os.PathLike[str],
    repo: RepositoryLike,
    *,
    dtype: str | torch.dtype | None = None,
    tensors_only: bool = False,
    allow_pickle: bool = False,
    **options: Unpack[VersionOptions],
) -> Version:
    """Save what a `torch.save` file holds as a version, in the memory of a few chunks.

    Args:
        path: the file; it holds a dict, nested or flat.
        repo: a `Repository`, or what `dcpstore.open` takes.
        dtype: what floating tensors are converted to, such as "bf16".
        tensors_only: leave the values out, also those that only code could build.
        allow_pickle: let the file run the code that it names, and store pickles.
        options: how the version is described, as for `dcpstore.save`.

    Raises:
        NotFoundError: there is no such file.
        CorruptionError: it is damaged or truncated.
        InvalidInputError: it holds no dict, or was written before torch 1.6.
        UnsafeDataError: it would run code, and for which FQNs; and as for `dcpstore.save`.
    """
    foreign = _read(Path(path), tensors_only=tensors_only, allow_pickle=allow_pickle)
    return save_foreign(foreign, repo, dtype=dtype, allow_pickle=allow_pickle, **options)


@shows_export_options
def export_torch(
    repo: RepositoryLike,
    ref: RefLike | None,
    path: str | os.PathLike[str],
    *,
    allow_pickle: bool = False,
    **options: Unpack[ExportOptions],
) -> Exported:
    """Write a version as a file that `torch.load` reads, in the memory of a box of a tensor.

    The nested state comes back: dicts, lists, an optimizer's numbered parameters, tied tensors.

    Args:
        repo: a `Repository`, or what `dcpstore.open` takes.
        ref: the version; None is the tip of `main`.
        path: the new file.
        allow_pickle: let values that are pickles run their code, and be pickled again.
        options: which entries, and how; `ExportOptions` explains each.

    Raises:
        AlreadyExistsError: the file exists.
        NotFoundError: no such version, or no folder for the file.
        UnsafeDataError: a value is a pickle, and that is not allowed.
        CorruptionError: stored bytes are damaged; there is no file then.
    """
    target = Path(path)
    with opened(repo, create=False) as repository, new_file(target) as file:
        version = ExportedVersion(repository, ref, **options)
        ties = find_ties(version)
        planned = {
            tensor.fqn: PlannedTensor(
                tensor.dtype, tensor.shape, tensor.nbytes, partial(version.raw, tensor)
            )
            for tensor in version.tensors
            if tensor.fqn not in ties
        }
        values = version.values(version.plain, allow_pickle=allow_pickle)
        named = {e.fqn: _plain(value) for e, value in zip(version.plain, values, strict=True)}
        items: dict[str, Any] = {
            **planned,
            **{fqn: planned[kept] for fqn, kept in ties.items()},
            **named,
        }
        with version.pickling(named):
            write_archive(file, nested_state(items, version.nested_paths()))
        written = [tensor for tensor in version.tensors if tensor.fqn in planned]
        return version.report(target, "torch", files=1, tensors=written)


def _plain(value: object) -> object:
    """Return a value that torch.load reads without a class of ours."""
    if isinstance(value, Composition):
        return value.to_text()
    return bytes(value) if isinstance(value, PlannerBytes) else value


def _read(path: Path, *, tensors_only: bool, allow_pickle: bool) -> Foreign:
    if not path.is_file():
        raise NotFoundError(f"no file {str(path)!r}; give a file that torch.save wrote.")
    archive = _loaded(path, device="meta", allow_pickle=allow_pickle)
    flat = flattened(archive.held)
    items = flat.items
    if tensors_only:
        items = {fqn: item for fqn, item in items.items() if isinstance(item, torch.Tensor)}
    found = {fqn: odd_inside(item) for fqn, item in items.items()}
    refuse_odd(repr(str(path)), {fqn: odd for fqn, odd in found.items() if odd is not None})
    if any(_needs_pickle(item) for item in items.values()):
        # Such a value may hold tensors, so it is loaded with their data.
        whole = flattened(_loaded(path, device="cpu", allow_pickle=allow_pickle).held).items
        items |= {fqn: whole[fqn] for fqn, item in items.items() if _needs_pickle(item)}
    foreign = Foreign()
    for fqn, item in items.items():
        at = flat.paths.recorded(fqn)
        if isinstance(item, torch.Tensor):
            foreign.add_tensor(fqn, at, archive.whole_tensor(item, path, fqn=fqn))
        else:
            foreign.add_value(fqn, at, item)
    return foreign


def _loaded(path: Path, *, device: str, allow_pickle: bool) -> Loaded:
    with open_source(path) as file:
        if not is_archive(file):
            raise InvalidInputError(
                f"{str(path)!r} is not an archive of torch.save (torch 1.6 or later); if "
                "torch.load reads it, save it again with torch.save, and import that."
            )
        found = load_archive(file, repr(str(path)), device=device, allow_pickle=allow_pickle)
    if isinstance(found.held, Odd):
        refuse_odd(repr(str(path)), {"": found.held})
    if not isinstance(found.held, Mapping):
        raise InvalidInputError(
            f"{str(path)!r} holds a {type(found.held).__name__}; save a dict, such as a "
            "state_dict()."
        )
    return found


def _needs_pickle(item: object) -> bool:
    if isinstance(item, torch.Tensor):
        return False
    try:
        encode_value(item, allow_pickle=False)
    except UnsafeDataError:
        return True
    return False
