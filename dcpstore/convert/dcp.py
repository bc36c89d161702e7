"""DCP folders, as `torch.distributed.checkpoint.save` writes them: in, and out again.

In: each piece of a tensor is read where it lies, whatever number of ranks wrote it. Out: torch's
own writer writes, box after box, so any number of ranks load what it wrote.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, cast

import torch
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from dcpstore.arguments import RepositoryLike
from dcpstore.convert.dcp_metadata import read_description, stored_at
from dcpstore.convert.dcp_writing import ExportPlanner, write_folder
from dcpstore.convert.exporting import DEEPEST, Exported, ExportedVersion
from dcpstore.convert.file_tensors import FileBox, FileTensor
from dcpstore.convert.importing import Foreign, Naming, save_foreign
from dcpstore.convert.pickles import Odd, odd_inside
from dcpstore.convert.sources import FileView
from dcpstore.convert.targets import new_folder
from dcpstore.convert.torch_archive import load_archive, open_source, refuse_odd
from dcpstore.errors import CorruptionError
from dcpstore.geometry.boxes import Box
from dcpstore.records import ObjectPath, Version
from dcpstore.repository import opened

__all__ = ["export_dcp", "import_dcp"]


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
