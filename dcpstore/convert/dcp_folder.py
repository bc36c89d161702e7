"""DCP folders, as `torch.distributed.checkpoint.save` writes them: in, and out again.

An import reads each piece of a tensor where it is, whatever number of ranks wrote it. An export
uses torch's own FileSystemWriter, box by box, so any number of ranks load the result. That writer
holds all tensors of a file in memory until the file is written (torch 2.13 collects them in a dict
that only its safetensors format needs), so the export is split into many small files.

The `.metadata` of a folder is a pickle, and only torch's plain description in it is read.
Invariant: only the classes named here are built from it, and what it says about the files is
checked against them before a byte is used.
"""

from __future__ import annotations

import collections
import io
import os
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Unpack, cast

import torch
from torch.distributed.checkpoint import filesystem as torch_files
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from dcpstore.api import RepositoryLike
from dcpstore.compat.torch_private import (
    MEMORY_FORMATS,
    StorageInfo,
    layout_from_name,
    sharded_metadata,
)
from dcpstore.convert.exporting import (
    BOX,
    DEEPEST,
    Exported,
    ExportedTensor,
    ExportedVersion,
    ExportOptions,
    shows_export_options,
)
from dcpstore.convert.importing import FileBox, FileTensor, Foreign, save_foreign
from dcpstore.convert.paths import inside, new_folder
from dcpstore.convert.pickles import Odd, Unpickler, odd_inside
from dcpstore.convert.torch_archive import FileView, load_archive, open_source, refuse_odd
from dcpstore.encoding.dtypes import MOST_DIMS
from dcpstore.encoding.values import PlannerBytes
from dcpstore.errors import CorruptionError, NotFoundError, UnsafeDataError
from dcpstore.geometry.boxes import Box
from dcpstore.planning import DefaultSavePlanner
from dcpstore.planning.plan_table import item_box, item_nbytes
from dcpstore.records import ObjectPath, RefLike, Version
from dcpstore.repository import opened
from dcpstore.saving.request import VersionOptions, shows_options

__all__ = [
    "DESCRIPTION",
    "ExportPlanner",
    "export_dcp",
    "import_dcp",
    "read_description",
    "write_folder",
]

DESCRIPTION = ".metadata"

# Classes and functions, which have no type in common but `Any`.
_ALLOWED: dict[tuple[str, str], Any] = {
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
        )
    },
    (torch_metadata.__name__, "_MEM_FORMAT_ENCODING"): MEMORY_FORMATS,
    (torch_files.__name__, "_StorageInfo"): StorageInfo,
    # Until 2.2 torch imported these two from its sharded tensors.
    (sharded_metadata.__name__, "TensorProperties"): TensorProperties,
    (sharded_metadata.__name__, "MEM_FORMAT_ENCODING"): MEMORY_FORMATS,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): layout_from_name,
    ("collections", "OrderedDict"): collections.OrderedDict,
    # The path where the folder was saved: only its text matters, on any system.
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
            UnsafeDataError: it is not part of a description.
        """
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        found = getattr(torch, name, None) if module == "torch" and "." not in name else None
        if isinstance(found, torch.dtype):
            return found
        raise UnsafeDataError(
            f"it names {module}.{name}, which is not part of torch's description of a checkpoint"
        )

    def may_build(self, inst: Any) -> bool:
        """Return whether the pickle may set the state of this object; never if it is a class."""
        return type(inst) in _ALLOWED.values()


def read_description(folder: Path) -> Metadata:
    """Return the description of a DCP folder.

    Raises:
        NotFoundError: it is not a DCP folder.
        UnsafeDataError: the description is a pickle that names code.
        CorruptionError: it is damaged, or not a description.
    """
    path = inside(folder, DESCRIPTION)
    if not path.is_file():
        alone = (folder / f"__0{DESCRIPTION}").is_file()
        raise NotFoundError(
            f"{str(folder)!r} has no {DESCRIPTION!r}; "
            + (
                "it was saved with use_collectives=False, each rank separately: load it with torch "
                "and save it as a whole."
                if alone
                else "give the folder that torch.distributed.checkpoint.save wrote."
            )
        )
    # The whole file is in memory: the pickle cannot read past it.
    described = _unpickled(io.BytesIO(path.read_bytes()), path)
    problem = _problem(described)
    if problem:
        raise CorruptionError(
            f"{str(path)!r} is not a description of a checkpoint: {problem}; copy the folder again "
            "from its source."
        )
    assert isinstance(described, Metadata)
    return described


def stored_at(folder: Path, described: Metadata, index: MetadataIndex) -> tuple[Path, int, int]:
    """Return the file, offset and length in bytes of what an index names.

    Raises:
        CorruptionError: the description lacks it, or the file is missing or too short.
        UnsafeDataError: it leads out of the folder, or is encoded by code that is not ours.
    """
    info = described.storage_data.get(index)
    fqn = index.fqn
    if info is None:
        raise CorruptionError(
            f"{str(folder)!r} does not say where {fqn!r} at {tuple(index.offset or ())} is; the "
            "checkpoint is incomplete: copy it again from its source."
        )
    name, offset, length = info.relative_path, info.offset, info.length
    if info.transform_descriptors:
        raise UnsafeDataError(
            f"{fqn!r} is stored through the extensions {list(info.transform_descriptors)!r}, which "
            "only the code that saved it can undo; load it with torch and save it without them."
        )
    path = inside(folder, name)
    size = path.stat().st_size if path.is_file() else -1
    if offset < 0 or length < 0 or offset + length > size:
        state = "is missing" if size < 0 else f"has {size} bytes"
        raise CorruptionError(
            f"{fqn!r} is in {str(path)!r} at {offset} to {offset + length}, and the file "
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
                return f"{str(fqn)[:200]!r} is not an item"
        for index, info in described.storage_data.items():
            if not _is_place(index, info):
                return "it does not say where its items are stored"
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
        and isinstance(info, StorageInfo)
        and isinstance(info.relative_path, str)
        and type(info.offset) is int
        and type(info.length) is int
    )


class ExportPlanner(DefaultSavePlanner):
    """Plans an export: its own state is empty, and the items of the plan are the version's.

    Args:
        version: whose tensors are written.
        values: by FQN.
        box: bytes of a tensor that are read at a time, where its chunks allow it.
    """

    def __init__(
        self, version: ExportedVersion, values: Mapping[str, object], *, box: int = BOX
    ) -> None:
        super().__init__()
        self._version = version
        self._values = values
        self._box = box
        self._tensors = {tensor.fqn: tensor for tensor in version.tensors}

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Set `mappings` to the version's paths, from which torch rebuilds the nested state."""
        super().set_up_planner(state_dict, storage_meta, is_coordinator)
        named = self._tensors.keys() | self._values.keys()
        self.mappings = {
            fqn: tuple(path) for fqn, path in self._version.paths.items() if fqn in named
        }

    def create_local_plan(self) -> SavePlan:
        """Return an item for each box of a tensor, and one for each value."""
        items = [WriteItem(MetadataIndex(fqn), WriteItemType.BYTE_IO) for fqn in self._values]
        for tensor in self._tensors.values():
            items += _items(tensor, self._box)
        self.plan = SavePlan(items, planner_data=self.mappings)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return a value."""
        return self._values[index.fqn]

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Return the box of a tensor, read and verified now, or torch's bytes of a value."""
        if write_item.tensor_data is None:
            value = self._values[write_item.index.fqn]
            if isinstance(value, PlannerBytes):  # bytes that a custom planner made of a value
                return io.BytesIO(value)
            return super().resolve_data(write_item)
        return self._version.read(self._tensors[write_item.index.fqn], item_box(write_item))


def write_folder(folder: Path, planner: ExportPlanner, *, file: int = 128 << 20) -> int:
    """Fill an empty folder with what the planner plans; return the number of files.

    A file holds about `file` bytes of tensors.

    These are the steps of `torch.distributed.checkpoint.save` on one rank, without a process group,
    and without wrapping errors in CheckpointException, which is a BaseException. The caller syncs
    the folder.
    """
    # No sync for each file: the whole folder is synced before it gets its name.
    writer = FileSystemWriter(folder, sync_files=False)
    planner.set_up_planner({}, writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(True)
    (plan,), described = planner.create_global_plan(
        [writer.prepare_local_plan(planner.create_local_plan())]
    )
    (plan,) = writer.prepare_global_plan([plan])
    results = []
    for part in _parts(planner.finish_plan(plan), file):
        done = writer.write_data(part, planner)
        results += done.wait()
    writer.finish(described, [results])
    return sum(1 for _ in folder.iterdir())


def _parts(plan: SavePlan, most: int) -> Iterator[SavePlan]:
    """Yield plans of some items each, each with its own file prefix."""
    parts: list[list[WriteItem]] = [[]]
    nbytes = 0
    for item in plan.items:
        if parts[-1] and nbytes + item_nbytes(item) > most:
            parts.append([])
            nbytes = 0
        parts[-1].append(item)
        nbytes += item_nbytes(item)
    for i, items in enumerate(parts):
        named = replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{i}_")
        yield replace(plan, items=items, storage_data=named)


def _items(tensor: ExportedTensor, box_nbytes: int) -> Iterator[WriteItem]:
    for box in tensor.boxes(box_nbytes) or [Box.whole(tensor.shape)]:
        offsets, sizes = torch.Size(box.offsets), torch.Size(box.sizes)
        yield WriteItem(
            index=MetadataIndex(tensor.fqn, offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offsets, sizes),
                properties=TensorProperties(dtype=tensor.dtype),
                size=torch.Size(tensor.shape),
            ),
        )


@shows_options(VersionOptions)
def import_dcp(
    path: str | os.PathLike[str],
    repo: RepositoryLike,
    *,
    dtype: str | torch.dtype | None = None,
    tensors_only: bool = False,
    allow_pickle: bool = False,
    **options: Unpack[VersionOptions],
) -> Version:
    """Save a DCP folder as a version, in this process alone and in the memory of a few chunks.

    Args:
        path: the folder that holds `.metadata`.
        repo: a `Repository`, or what `dcpstore.open` takes.
        dtype: what floating tensors are converted to, such as "bf16".
        tensors_only: import tensors only; a value that would need to run code is no error then.
        allow_pickle: let values run the code that they name, and be stored as pickles.
        options: how the version is described, as for `dcpstore.save`.

    Raises:
        NotFoundError: it is not a DCP folder.
        CorruptionError: it is damaged or incomplete.
        UnsafeDataError: it would run code; the message names the FQNs.

    It also raises what `dcpstore.save` raises.
    """
    foreign = _described(Path(path), tensors_only=tensors_only, allow_pickle=allow_pickle)
    return save_foreign(foreign, repo, dtype=dtype, allow_pickle=allow_pickle, **options)


@shows_export_options
def export_dcp(
    repo: RepositoryLike,
    ref: RefLike | None,
    path: str | os.PathLike[str],
    *,
    allow_pickle: bool = False,
    **options: Unpack[ExportOptions],
) -> Exported:
    """Write a version as a folder that `torch.distributed.checkpoint.load` reads on any ranks.

    Args:
        repo: a `Repository`, or what `dcpstore.open` takes.
        ref: the version; None is the tip of `main`.
        path: the new folder.
        allow_pickle: let values that are pickles run their code, and be pickled again.
        options: which entries, and how; `ExportOptions` explains each.

    Raises:
        AlreadyExistsError: the folder exists.
        NotFoundError: no such version, or no folder to put it in.
        UnsafeDataError: a value is a pickle, and that is not allowed.
        CorruptionError: stored bytes are damaged; the folder is not made then.
    """
    target = Path(path)
    with opened(repo, create=False) as repository:
        version = ExportedVersion(repository, ref, **options)
        values = version.values(version.plain, allow_pickle=allow_pickle)
        named = {e.fqn: value for e, value in zip(version.plain, values, strict=True)}
        with new_folder(target) as folder, version.pickling(named):
            files = write_folder(folder, ExportPlanner(version, named))
        return version.report(target, "dcp", files=files, tensors=version.tensors)


def _described(folder: Path, *, tensors_only: bool, allow_pickle: bool) -> Foreign:
    described = read_description(folder)
    paths = _paths(described)
    foreign = Foreign()
    found: dict[str, Odd] = {}
    for fqn, kind in described.state_dict_metadata.items():
        at = paths.get(fqn, (fqn,))
        if isinstance(kind, TensorStorageMetadata):
            foreign.add_tensor(fqn, at, _tensor(folder, described, fqn, kind))
        elif not tensors_only:
            value = _value(folder, described, fqn, allow_pickle=allow_pickle)
            odd = odd_inside(value)
            if odd is None:
                foreign.add_value(fqn, at, value)
            else:
                found[fqn] = odd
    refuse_odd(repr(str(folder)), found)
    return foreign


def _tensor(folder: Path, described: Metadata, fqn: str, kind: TensorStorageMetadata) -> FileTensor:
    pieces = []
    for chunk in kind.chunks:
        box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
        pieces.append(_piece(folder, described, fqn, kind.properties.dtype, box))
    tensor = FileTensor(kind.properties.dtype, tuple(kind.size), tuple(pieces))
    tensor.check(fqn)
    return tensor


def _piece(folder: Path, described: Metadata, fqn: str, dtype: torch.dtype, box: Box) -> FileBox:
    path, offset, length = stored_at(folder, described, MetadataIndex(fqn, box.offsets))
    with open_source(path) as file:
        archive = load_archive(
            cast("IO[bytes]", FileView(file, offset, length)),
            f"{fqn!r} at {offset} of {str(path)!r}",
            device="meta",
            allow_pickle=False,
        )
    found = archive.held
    if isinstance(found, Odd):
        refuse_odd(repr(str(folder)), {fqn: found})
    if (
        not isinstance(found, torch.Tensor)
        or found.dtype != dtype
        or tuple(found.shape) != box.sizes
    ):
        what = (
            f"{found.dtype} {tuple(found.shape)}"
            if isinstance(found, torch.Tensor)
            else type(found).__name__
        )
        raise CorruptionError(
            f"{fqn!r} at {offset} of {str(path)!r} is {what}, and the folder describes {dtype} "
            f"{box.sizes}; copy it again from its source."
        )
    return archive.locate_tensor(found, path, fqn=fqn, start=offset, box=box)


def _value(folder: Path, described: Metadata, fqn: str, *, allow_pickle: bool) -> object:
    path, offset, length = stored_at(folder, described, MetadataIndex(fqn))
    with open_source(path) as file:
        value: object = load_archive(
            cast("IO[bytes]", FileView(file, offset, length)),
            f"the value {fqn!r} at {offset} of {str(path)!r}",
            device="cpu",
            allow_pickle=allow_pickle,
        ).held
    return value


def _paths(described: Metadata) -> dict[str, ObjectPath]:
    """Return the nested paths of FQNs, as torch's own planner keeps them."""
    given = described.planner_data
    if not isinstance(given, dict):
        return {}
    return {
        fqn: path
        for fqn, path in given.items()
        if isinstance(path, tuple)
        and 0 < len(path) <= DEEPEST  # no export can nest deeper paths
        and isinstance(path[0], str)
        and all(isinstance(part, str | int) for part in path)
    }
