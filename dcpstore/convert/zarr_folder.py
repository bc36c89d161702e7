"""A version as an ordinary Zarr v3 folder, with neither packs nor database: out only.

Each tensor is one array by the name that `repo.zarr` gives it, also where its shards lay on no
regular grid; the documents are the same, so values stand as attributes of the root group.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import numpy as np
import numpy.typing as npt
import torch

from dcpstore.api import RepositoryLike
from dcpstore.convert.exporting import (
    Exported,
    ExportedTensor,
    ExportedVersion,
    ExportOptions,
    shows_export_options,
)
from dcpstore.convert.paths import new_folder
from dcpstore.encoding.codecs import choose_codec, encode
from dcpstore.encoding.dtypes import as_bytes, dtype_name
from dcpstore.geometry.boxes import Box
from dcpstore.geometry.grids import Grid, lay_grids
from dcpstore.records import EntryRecord, RefLike
from dcpstore.repository import opened
from dcpstore.zarr.documents import array_name, chunk_keys, zarr_documents

__all__ = ["export_zarr"]


@shows_export_options
def export_zarr(
    repo: RepositoryLike,
    ref: RefLike | None,
    path: str | os.PathLike[str],
    **options: Unpack[ExportOptions],
) -> Exported:
    """Write a version as a Zarr v3 folder, in the memory of a box of a tensor.

    Args:
        repo: a `Repository`, or what `dcpstore.open` takes.
        ref: the version; None is the tip of `main`.
        path: the new folder.
        options: which entries, and how; `ExportOptions` explains each. A dtype that Zarr lacks is
            held as an unsigned integer of its width, with the attribute "torch_dtype".

    Raises:
        AlreadyExistsError: the folder exists.
        NotFoundError: no such version, or no folder to put it in.
        CorruptionError: stored bytes are damaged; nothing is there then.
    """
    target = Path(path)
    with opened(repo, create=False) as repository:
        version = ExportedVersion(repository, ref, **options)
        blobs = [
            ExportedTensor(entry, torch.uint8) for entry in version.plain if entry.kind == "blob"
        ]
        setting, nbytes = repository.about.chunk.codec, repository.about.chunk.nbytes
        arrays = [
            (tensor, _laid_out(tensor, setting, nbytes)) for tensor in (*version.tensors, *blobs)
        ]
        values = [entry for entry in version.plain if entry.kind == "value"]
        documents = zarr_documents(
            [*(entry for _, entry in arrays), *values],
            {
                "version": version.version.number,
                "uid": version.version.uid,
                "step": version.version.step,
            },
        )
        files = len(documents)
        with new_folder(target) as folder:
            for tensor, entry in arrays:
                files += _write_chunks(folder, version, tensor, entry)
            for key, text in sorted(documents.items(), reverse=True):  # the root's comes last
                (folder / key).parent.mkdir(parents=True, exist_ok=True)
                (folder / key).write_text(text)
        return version.report(target, "zarr", files=files, tensors=version.tensors)


def _laid_out(tensor: ExportedTensor, setting: str, nbytes: int) -> EntryRecord:
    """Return the entry of a tensor as the folder holds it: one grid, in the dtype of the export."""
    stored, name = tensor.stored, dtype_name(tensor.dtype)
    grids = stored.parts
    if len(grids) > 1 or grids[0].shape != stored.shape:
        whole = Box.whole(stored.shape)
        grids = lay_grids(stored.shape, tensor.dtype.itemsize, [whole], target=nbytes)
    codec = stored.codec if name == stored.dtype else choose_codec(setting, name)
    return replace(tensor.entry, tensor=replace(stored, dtype=name, codec=codec, parts=grids))


def _write_chunks(
    folder: Path, version: ExportedVersion, tensor: ExportedTensor, entry: EntryRecord
) -> int:
    """Write the chunks of one array; return their number."""
    assert entry.tensor is not None
    (grid,) = entry.tensor.parts
    for ordinal, key in enumerate(chunk_keys(array_name(entry.fqn), grid)):
        piece = as_bytes(version.read(tensor, grid.cell(ordinal)))
        raw = _padded(piece, grid).reshape(-1).view(np.uint8).data
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(entry.tensor.codec, raw, piece.dtype.itemsize))
    return grid.size


def _padded(piece: npt.NDArray[np.generic], grid: Grid) -> npt.NDArray[np.generic]:
    """Return a chunk of the grid's size, past its array zeros."""
    if piece.shape == grid.chunk_shape:
        return piece
    padded = np.zeros(grid.chunk_shape, piece.dtype)
    padded[tuple(map(slice, piece.shape))] = piece
    return padded
