"""Safetensors files: one, several, or Hugging Face's sharded index; in, and out again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from dcpstore.api import RepositoryLike
from dcpstore.convert.file_tensors import FileBox, FileTensor, row_major
from dcpstore.convert.importing import Foreign, Naming, save_foreign
from dcpstore.convert.safetensors_header import Header, read_header
from dcpstore.convert.safetensors_notes import aliases, paths_of, values_of
from dcpstore.errors import CorruptionError, InvalidInputError, NotFoundError, UnsafeDataError
from dcpstore.geometry.boxes import Box
from dcpstore.records import Version

__all__ = ["INDEX", "import_safetensors"]

INDEX = "model.safetensors.index.json"
_LARGEST_INDEX = 1 << 30
_SHARDING = "DCP_SHARDING_INFO"  # torch's note in files that hold pieces of tensors


def import_safetensors(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    repo: RepositoryLike,
    *,
    branch: str = "main",
    step: int | None = None,
    tags: Iterable[str] = (),
    message: str = "",
    dtype: str | torch.dtype | None = None,
) -> Version:
    """Save what safetensors files hold as one version, in the memory of a few chunks.

    Args:
        path: a file, several, an index (`model.safetensors.index.json`), or the folder of either.
        repo: a `Repository`, or what `dcpstore.open` takes.
        branch, step, tags, message: as for `dcpstore.save`.
        dtype: what floating tensors are converted to, such as "bf16".

    Raises:
        NotFoundError: there is no such file.
        CorruptionError: a file is damaged or truncated, or not what the index says.
        InvalidInputError: two files hold the same name; and as for `dcpstore.save`.
    """
    given = [path] if isinstance(path, str | os.PathLike) else list(path)
    foreign = _read([Path(one) for one in given])
    naming = Naming(branch, step, tuple(tags), message)
    return save_foreign(foreign, repo, naming, dtype=dtype, allow_pickle=False)


def _read(given: Sequence[Path]) -> Foreign:
    files = [(file, read_header(file)) for path in given for file in _files(path)]
    foreign = Foreign()
    paths = {fqn: at for _, header in files for fqn, at in paths_of(header).items()}
    for file, header in files:
        _refuse_pieces(file, header)
        for name, tensor in header.tensors.items():
            whole = Box.whole(tensor.shape)
            piece = FileBox(file, whole, tensor.offset, row_major(tensor.shape))
            found = FileTensor(tensor.dtype, tensor.shape, (piece,))
            foreign.add_tensor(name, paths.get(name, (name,)), found)
    for file, header in files:
        for name, kept in aliases(header).items():
            if name not in foreign.paths:
                foreign.add_tensor(name, paths.get(name, (name,)), foreign.tensors[kept])
        for name, value in values_of(file, header).items():
            foreign.add_value(name, paths.get(name, (name,)), value)
    return foreign


def _files(path: Path) -> list[Path]:
    """Return the files that a path stands for."""
    if path.is_dir():
        if (path / INDEX).is_file():
            return _indexed(path / INDEX)
        found = sorted(path.glob("*.safetensors"))
        if not found:
            raise NotFoundError(f"the folder {str(path)!r} holds no safetensors file.")
        return found
    if not path.is_file():
        raise NotFoundError(f"no file {str(path)!r}; give a safetensors file or its index.")
    return _indexed(path) if path.suffix == ".json" else [path]


def _indexed(index: Path) -> list[Path]:
    """Return the files of an index, once each of its names is known to lie where it says.

    Raises:
        CorruptionError: it is no index, or not what its files hold.
        UnsafeDataError: it leads out of its folder.
    """
    try:
        if index.stat().st_size > _LARGEST_INDEX:
            raise ValueError("it is larger than 1 GiB")
        wanted: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(wanted.values()))
        folder = index.parent
        outside = [n for n in names if not (folder / n).resolve().is_relative_to(folder.resolve())]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptionError(
            f"{str(index)!r} is no index of safetensors files ({type(error).__name__}: {error}); "
            "copy it again from its source."
        ) from error
    if outside:
        raise UnsafeDataError(
            f"{str(index)!r} names {outside[0]!r}, outside of its folder; do not trust it."
        )
    for name in names:
        if not (folder / name).is_file():
            raise CorruptionError(
                f"{str(index)!r} names {name!r}, which is missing; copy the files again."
            )
        held = set(read_header(folder / name).tensors)
        said = {fqn for fqn, file in wanted.items() if file == name}
        if held != said:
            raise CorruptionError(
                f"{str(index)!r} and {name!r} differ in {sorted(held ^ said)[:5]}; copy both again."
            )
    return [folder / name for name in names]


def _refuse_pieces(file: Path, header: Header) -> None:
    """Refuse a file of torch's HuggingFaceStorageWriter that holds pieces of tensors."""
    try:
        told = json.loads(header.notes.get(_SHARDING, "{}"))
        pieces = [fqn for fqn, info in told.items() if any(info["saved_offsets"])]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CorruptionError(
            f"{str(file)!r} has a {_SHARDING} that is not torch's ({error}); copy it again."
        ) from error
    if pieces:
        raise InvalidInputError(
            f"{str(file)!r} holds pieces of {pieces[0]!r}, not whole tensors; consolidate the "
            "files first (torch's consolidate_safetensors_files)."
        )
