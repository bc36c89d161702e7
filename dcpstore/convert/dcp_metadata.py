"""The `.metadata` of a DCP folder: a pickle, of which only torch's plain description is let in.

Invariant: nothing but the classes named here is built from it, and what it says of the files is
held against them before a byte is believed.
"""

from __future__ import annotations

import collections
import io
import pathlib
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed._shard.sharded_tensor import metadata as torch_shards
from torch.distributed.checkpoint import filesystem as torch_files
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dcpstore.convert.pickles import Unpickler
from dcpstore.convert.safe_path import inside
from dcpstore.encoding.dtypes import MOST_DIMS
from dcpstore.errors import CorruptionError, NotFoundError, UnsafeDataError

__all__ = ["DESCRIPTION", "read_description", "stored_at"]

DESCRIPTION = ".metadata"

_LET_IN: dict[tuple[str, str], Any] = {  # classes and one function: their kinds differ, hence `Any`
    **{
        (torch_metadata.__name__, name): getattr(torch_metadata, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
    (torch_files.__name__, "_StorageInfo"): _StorageInfo,
    # Until 2.2 torch took these two from its sharded tensors.
    (torch_shards.__name__, "TensorProperties"): TensorProperties,
    (torch_shards.__name__, "MEM_FORMAT_ENCODING"): torch_metadata._MEM_FORMAT_ENCODING,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): collections.OrderedDict,
    # where the folder lay when it was saved; only its text is of interest, on any system
    **{
        (module, name): pathlib.PurePosixPath if "Posix" in name else pathlib.PureWindowsPath
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    },
}


class _Unpickler(Unpickler):
    """Builds what torch's Metadata is made of."""

    def known(self, module: str, name: str) -> Any:
        """Return what a name stands for.

        Raises:
            UnsafeDataError: it is not a part of a description.
        """
        if (module, name) in _LET_IN:
            return _LET_IN[module, name]
        found = getattr(torch, name, None) if module == "torch" and "." not in name else None
        if isinstance(found, torch.dtype):
            return found
        raise UnsafeDataError(
            f"it names {module}.{name}, which is no part of torch's description of a checkpoint"
        )

    def may_build(self, inst: Any) -> bool:
        """Tell whether the pickle may set the state of this object: of one, not of a class."""
        return type(inst) in _LET_IN.values()


def read_description(folder: Path) -> Metadata:
    """Return what a DCP folder says of itself.

    Raises:
        NotFoundError: it is no DCP folder.
        UnsafeDataError: the description is a pickle that names code.
        CorruptionError: it is damaged, or no description.
    """
    path = inside(folder, DESCRIPTION)
    if not path.is_file():
        alone = (folder / f"__0{DESCRIPTION}").is_file()
        raise NotFoundError(
            f"{str(folder)!r} has no {DESCRIPTION!r}; "
            + (
                "it was saved with use_collectives=False, each rank for itself: load it with torch "
                "and save it as a whole."
                if alone
                else "give the folder that torch.distributed.checkpoint.save wrote."
            )
        )
    described = _unpickled(io.BytesIO(path.read_bytes()), path)  # which reads no more than it has
    problem = _problem(described)
    if problem:
        raise CorruptionError(
            f"{str(path)!r} is no description of a checkpoint: {problem}; copy the folder again "
            "from its source."
        )
    assert isinstance(described, Metadata)
    return described


def stored_at(folder: Path, described: Metadata, index: MetadataIndex) -> tuple[Path, int, int]:
    """Return the file, offset and length in bytes of what an index names.

    Raises:
        CorruptionError: the description lacks it, or the file is missing or too short.
        UnsafeDataError: it leads out of the folder, or is encoded by code of a stranger.
    """
    info = described.storage_data.get(index)
    fqn = index.fqn
    if info is None:
        raise CorruptionError(
            f"{str(folder)!r} does not say where {fqn!r} at {tuple(index.offset or ())} lies; the "
            "checkpoint is incomplete: copy it again from its source."
        )
    name, offset, length = info.relative_path, info.offset, info.length
    if info.transform_descriptors:
        raise UnsafeDataError(
            f"{fqn!r} is stored through the extensions {list(info.transform_descriptors)!r}, which "
            "only the code that saved it can undo; load it with torch and save it plainly."
        )
    path = inside(folder, name)
    size = path.stat().st_size if path.is_file() else -1
    if offset < 0 or length < 0 or offset + length > size:
        state = "is missing" if size < 0 else f"has {size} bytes"
        raise CorruptionError(
            f"{fqn!r} lies in {str(path)!r} at {offset} to {offset + length}, and the file "
            f"{state}; copy it again from its source."
        )
    return path, offset, length


def _unpickled(file: IO[bytes], path: Path) -> object:
    try:
        found: object = _Unpickler(file).load()
        return found
    except UnsafeDataError as error:
        raise UnsafeDataError(
            f"{str(path)!r} would run code: {error}. Load it with torch, if you trust its "
            "writer, and save it again."
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CorruptionError(
            f"{str(path)!r} does not unpickle ({type(error).__name__}: {error}); copy the folder "
            "again from its source."
        ) from error


def _problem(described: object) -> str | None:
    """Return what is wrong with the types of a description, which a pickle does not check."""
    if not isinstance(described, Metadata):
        return f"it holds {type(described).__name__}"
    try:
        for fqn, kind in described.state_dict_metadata.items():
            if not _is_item(fqn, kind):
                return f"{str(fqn)[:200]!r} is no item"
        for index, info in described.storage_data.items():
            if not _is_place(index, info):
                return "it lists no places"
    except (AttributeError, TypeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _is_item(fqn: object, kind: object) -> bool:
    if not isinstance(fqn, str) or isinstance(kind, BytesStorageMetadata):
        return isinstance(fqn, str)
    return (
        isinstance(kind, TensorStorageMetadata)
        and isinstance(kind.properties, TensorProperties)
        and isinstance(kind.properties.dtype, torch.dtype)
        and _is_extent(kind.size)
        and isinstance(kind.chunks, list)
        and all(isinstance(chunk, ChunkStorageMetadata) for chunk in kind.chunks)
        and all(_is_extent(chunk.offsets) and _is_extent(chunk.sizes) for chunk in kind.chunks)
    )


def _is_extent(found: object) -> bool:
    if not isinstance(found, tuple) or len(found) > MOST_DIMS:
        return False
    return all(type(n) is int and 0 <= n < 2**63 for n in found)


def _is_place(index: object, info: object) -> bool:
    return (
        isinstance(index, MetadataIndex)
        and isinstance(info, _StorageInfo)
        and isinstance(info.relative_path, str)
        and type(info.offset) is int
        and type(info.length) is int
    )
