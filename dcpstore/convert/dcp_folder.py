"""DCP folders, as `torch.distributed.checkpoint.save` writes them: in, and out again.

An import reads each piece of a tensor where it is, whatever number of ranks wrote it. An export
uses torch's own FileSystemWriter, box by box, so any number of ranks load the result. That writer
holds the tensors of one file until the file is written (torch 2.13 collects them for another
format), so it is given many small files, each with some boxes of tensors; that bounds its memory.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from dcpstore.api import RepositoryLike
from dcpstore.convert.atomic_output import new_folder
from dcpstore.convert.dcp_metadata import read_description, stored_at
from dcpstore.convert.exporting import BOX, DEEPEST, Exported, ExportedTensor, ExportedVersion
from dcpstore.convert.file_tensors import FileBox, FileTensor
from dcpstore.convert.importing import Foreign, Naming, save_foreign
from dcpstore.convert.pickles import Odd, odd_inside
from dcpstore.convert.safe_path import FileView
from dcpstore.convert.torch_archive import load_archive, open_source, refuse_odd
from dcpstore.encoding.values import PlannerBytes
from dcpstore.errors import CorruptionError
from dcpstore.geometry.boxes import Box
from dcpstore.planning import DefaultSavePlanner
from dcpstore.planning.balance import item_nbytes
from dcpstore.planning.plan_checks import item_box
from dcpstore.records import ObjectPath, Version
from dcpstore.repository import opened

__all__ = ["ExportPlanner", "export_dcp", "import_dcp", "write_folder"]


class ExportPlanner(DefaultSavePlanner):
    """Plans the save of a version by torch's storage; the save's own state is empty.

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
        """Take the paths of the version, under which torch's loads nest it again."""
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
        """Return a value, or the box of a tensor, read and verified now."""
        return self._values[index.fqn]

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Return the box of a tensor, read and verified now, or torch's bytes of a value."""
        if write_item.tensor_data is None:
            value = self._values[write_item.index.fqn]
            if isinstance(value, PlannerBytes):  # what a planner of its own made of a value
                return io.BytesIO(value)
            return super().resolve_data(write_item)
        return self._version.read(self._tensors[write_item.index.fqn], item_box(write_item))


def write_folder(folder: Path, planner: ExportPlanner, *, file: int = 128 << 20) -> int:
    """Fill an empty folder with what the planner plans; return the number of files.

    A file holds about `file` bytes of tensors.

    These are the steps of `torch.distributed.checkpoint.save` on one rank, without its exception
    that is not an Exception and without a process group. The caller syncs the folder.
    """
    writer = FileSystemWriter(
        folder, sync_files=False
    )  # the whole folder is synced before its name
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
    """Yield plans of some items each, every one with a prefix of its own for its file."""
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


def import_dcp(
    path: str | os.PathLike[str],
    repo: RepositoryLike,
    *,
    branch: str = "main",
    step: int | None = None,
    tags: Iterable[str] = (),
    message: str = "",
    dtype: str | torch.dtype | None = None,
    tensors_only: bool = False,
    allow_pickle: bool = False,
) -> Version:
    """Save a DCP folder as a version, in this process alone and in the memory of a few chunks.

    Args:
        path: the folder that holds `.metadata`.
        repo: a `Repository`, or what `dcpstore.open` takes.
        branch, step, tags, message: as for `dcpstore.save`.
        dtype: what floating tensors are converted to, such as "bf16".
        tensors_only: leave the values out, those too that only code could build.
        allow_pickle: let values run the code that they name, and be stored as pickles.

    Raises:
        NotFoundError: it is no DCP folder.
        CorruptionError: it is damaged or incomplete.
        UnsafeDataError: it would run code, and for which FQNs; and as for `dcpstore.save`.
    """
    foreign = _described(Path(path), tensors_only=tensors_only, allow_pickle=allow_pickle)
    naming = Naming(branch, step, tuple(tags), message)
    return save_foreign(foreign, repo, naming, dtype=dtype, allow_pickle=allow_pickle)


def export_dcp(
    repo: RepositoryLike,
    ref: str | int | None,
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    tensors_only: bool = False,
    allow_pickle: bool = False,
) -> Exported:
    """Write a version as a folder that `torch.distributed.checkpoint.load` reads on any ranks.

    Args:
        repo: a `Repository`, or what `dcpstore.open` takes.
        ref: the version; None is the tip of `main`.
        path: the new folder.
        dtype: what floating tensors are converted to, such as "bf16".
        tensors_only: leave the values out.
        allow_pickle: let values that are pickles run their code, and be pickled again.

    Raises:
        AlreadyExistsError: the folder exists.
        NotFoundError: no such version, or no folder to put it in.
        UnsafeDataError: a value is a pickle, and that is not allowed.
        CorruptionError: stored bytes are damaged; nothing is there then.
    """
    target = Path(path)
    with opened(repo, create=False) as repository:
        version = ExportedVersion(repository, ref, dtype=dtype, tensors_only=tensors_only)
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
        and 0 < len(path) <= DEEPEST  # what is deeper no export nests again
        and isinstance(path[0], str)
        and all(isinstance(part, str | int) for part in path)
    }
