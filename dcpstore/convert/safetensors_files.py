"""Safetensors files: one, several, or Hugging Face's sharded index; in, and out again."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Unpack

import torch

from dcpstore.api import RepositoryLike
from dcpstore.convert.exporting import (
    Exported,
    ExportedTensor,
    ExportedVersion,
    ExportOptions,
    find_ties,
    shows_export_options,
)
from dcpstore.convert.importing import FileBox, FileTensor, Foreign, row_major, save_foreign
from dcpstore.convert.paths import inside, new_file, new_folder
from dcpstore.convert.safetensors_header import (
    NOTES,
    TAGS,
    Header,
    aliases,
    encode_header,
    notes,
    paths_of,
    plain_text,
    read_header,
    values_of,
)
from dcpstore.errors import (
    CorruptionError,
    InvalidInputError,
    NotFoundError,
    UnsafeDataError,
)
from dcpstore.geometry.boxes import Box
from dcpstore.records import RefLike, Version
from dcpstore.repository import opened
from dcpstore.saving.request import VersionOptions, shows_options

__all__ = [
    "INDEX",
    "export_safetensors",
    "import_safetensors",
    "parse_size",
    "shard_names",
    "shards_of",
]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40}

INDEX = "model.safetensors.index.json"
_LARGEST_INDEX = 1 << 30
_SHOWN = 8  # FQNs that one message names
_SHARDING = "DCP_SHARDING_INFO"  # torch's note in files that hold pieces of tensors


@shows_options(VersionOptions)
def import_safetensors(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    repo: RepositoryLike,
    *,
    dtype: str | torch.dtype | None = None,
    tensors_only: bool = False,
    **options: Unpack[VersionOptions],
) -> Version:
    """Save what safetensors files hold as one version, in the memory of a few chunks.

    Args:
        path: a file, several, an index (`model.safetensors.index.json`), or the folder of either.
        repo: a `Repository`, or what `dcpstore.open` takes.
        dtype: what floating tensors are converted to, such as "bf16".
        tensors_only: leave out the values that an export put into the notes of a file.
        options: how the version is described, as for `dcpstore.save`.

    Raises:
        NotFoundError: there is no such file.
        CorruptionError: a file is damaged or truncated, or not what the index says.
        InvalidInputError: two files hold the same name; and as for `dcpstore.save`.
    """
    given = [path] if isinstance(path, str | os.PathLike) else list(path)
    foreign = _read([Path(one) for one in given])
    if tensors_only:
        foreign.leave_values_out()
    return save_foreign(foreign, repo, dtype=dtype, allow_pickle=False, **options)


@shows_export_options
def export_safetensors(
    repo: RepositoryLike,
    ref: RefLike | None,
    path: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    **options: Unpack[ExportOptions],
) -> Exported:
    """Write a version as safetensors, in the memory of a box of a tensor.

    Values and nested paths go into the notes of the first file. A tied tensor is written once, with
    the note by which safetensors ties it again.

    Args:
        repo: a `Repository`, or what `dcpstore.open` takes.
        ref: the version; None is the tip of `main`.
        path: one new file, where it ends in ".safetensors"; else a new folder, with as many files
            and the index that Hugging Face's libraries read.
        max_shard_size: of a file in a folder, in bytes or such as "5GB"; a larger tensor has a file
            to itself.
        options: which entries, and how; `ExportOptions` explains each.

    Raises:
        AlreadyExistsError: the file or folder exists.
        NotFoundError: no such version, or no folder to put it in.
        InvalidInputError: safetensors has no such dtype, or cannot hold a value; names the FQNs.
        CorruptionError: stored bytes are damaged; nothing is there then.
    """
    target, most = Path(path), parse_size(max_shard_size)
    with opened(repo, create=False) as repository:
        version = ExportedVersion(repository, ref, **options)
        _refuse_unfit(version)
        ties = find_ties(version)
        written = [tensor for tensor in version.tensors if tensor.fqn not in ties]
        values = _value_texts(version)
        if target.suffix == ".safetensors":
            with new_file(target) as file:
                (whole,) = shards_of(written, sys.maxsize)
                _write(file, version, whole, ties, values)
            return version.report(target, "safetensors", files=1, tensors=written)
        shards = shards_of(written, most)
        names = shard_names(len(shards))
        with new_folder(target) as folder:
            for name, shard in zip(names, shards, strict=True):
                with (folder / name).open("xb") as file:
                    _write(file, version, shard, ties, values if name == names[0] else {})
            if len(shards) > 1:
                (folder / INDEX).write_text(_index(names, shards))
        files = len(shards) + (len(shards) > 1)
        return version.report(target, "safetensors", files=files, tensors=written)


def _refuse_unfit(version: ExportedVersion) -> None:
    """Refuse what the format cannot hold."""
    unfit = [t.fqn for t in version.tensors if t.dtype not in TAGS]
    if unfit:
        kinds = sorted({str(t.dtype) for t in version.tensors if t.fqn in unfit})
        raise InvalidInputError(
            f"safetensors has no dtype {', '.join(kinds)}, which {_some(unfit)} have; export as "
            "torch, dcp or zarr."
        )
    reserved = [t.fqn for t in version.tensors if t.fqn == NOTES]
    if reserved:
        raise InvalidInputError(
            f"safetensors reserves the name {NOTES!r}; export as torch, dcp or zarr."
        )


def _value_texts(version: ExportedVersion) -> dict[str, str]:
    """Return the values as typed JSON; long ones are blobs, which are read.

    Raises:
        InvalidInputError: some can only be pickled.
    """
    texts = {e.fqn: e.value for e in version.plain if e.kind == "value" and e.value is not None}
    pickled = []
    for entry in version.plain:
        if entry.kind == "blob":
            try:
                (value,) = version.values([entry], allow_pickle=False)
                texts[entry.fqn] = plain_text(value)
            except UnsafeDataError:
                pickled.append(entry.fqn)
    if pickled:
        raise InvalidInputError(
            f"safetensors cannot hold pickles, which {_some(pickled)} are; leave the values out "
            "(tensors_only, --tensors-only), or export as torch or dcp."
        )
    return texts


def _write(
    file: IO[bytes],
    version: ExportedVersion,
    shard: Sequence[ExportedTensor],
    ties: Mapping[str, str],
    values: Mapping[str, str],
) -> None:
    held = {tensor.fqn for tensor in shard}
    tied = {fqn: kept for fqn, kept in ties.items() if kept in held}
    paths = {fqn: version.paths[fqn] for fqn in sorted({*held, *tied, *values})}
    described = {tensor.fqn: (tensor.dtype, tensor.shape) for tensor in shard}
    file.write(encode_header(described, notes(values, paths, tied)))
    for tensor in shard:
        for part in version.raw(tensor):
            file.write(part)


def _index(names: Sequence[str], shards: Sequence[Sequence[ExportedTensor]]) -> str:
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    held = {t.fqn: name for name, shard in zip(names, shards, strict=True) for t in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(held.items()))}
    return json.dumps(index, indent=2) + "\n"


def _some(fqns: Sequence[str]) -> str:
    more = f" and {len(fqns) - _SHOWN} more" if len(fqns) > _SHOWN else ""
    return ", ".join(map(repr, fqns[:_SHOWN])) + more


def _read(given: Sequence[Path]) -> Foreign:
    if not given:
        raise InvalidInputError("no path is given; give that of a safetensors file.")
    files = [(file, read_header(file)) for path in given for file in _files(path)]
    foreign = Foreign()
    holders: dict[str, Path] = {}
    paths = {fqn: at for _, header in files for fqn, at in paths_of(header).items()}
    for file, header in files:
        _refuse_pieces(file, header)
        for name, tensor in header.tensors.items():
            if name in holders:
                raise _held_twice(name, holders[name], file)
            holders[name] = file
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


def _held_twice(name: str, first: Path, second: Path) -> InvalidInputError:
    """Return the error for a tensor in two files, or in one file that is given twice."""
    if first.resolve() == second.resolve():
        return InvalidInputError(
            f"{str(second)!r} is given twice: by its name, by an index that names it or by its "
            "folder; give the index alone, the folder alone, or each file once without the index."
        )
    return InvalidInputError(
        f"{str(first)!r} and {str(second)!r} both hold {name!r}; give the files of one checkpoint "
        "only, best by its index or its folder alone."
    )


def _files(path: Path) -> list[Path]:
    """Return the files that a path stands for."""
    if path.is_dir():
        if (path / INDEX).is_file():
            return _indexed(path / INDEX)
        found = [inside(path, file.name) for file in sorted(path.glob("*.safetensors"))]
        if not found:
            raise NotFoundError(f"the folder {str(path)!r} holds no safetensors file.")
        return found
    if not path.is_file():
        raise NotFoundError(f"no file {str(path)!r}; give a safetensors file or its index.")
    return _indexed(path) if path.suffix == ".json" else [path]


def _indexed(index: Path) -> list[Path]:
    """Return the files of an index, after checking that each file holds exactly its names.

    Raises:
        CorruptionError: it is not an index, or differs from what its files hold.
        UnsafeDataError: it leads out of its folder.
    """
    try:
        if index.stat().st_size > _LARGEST_INDEX:
            raise ValueError("it is larger than 1 GiB")
        wanted: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(wanted.values()))
        folder = index.parent
        found = [inside(folder, name) for name in names]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptionError(
            f"{str(index)!r} is not an index of safetensors files "
            f"({type(error).__name__}: {error}); copy it again from its source."
        ) from error
    for name, file in zip(names, found, strict=True):
        if not file.is_file():
            raise CorruptionError(
                f"{str(index)!r} names {name!r}, which is missing; copy the files again."
            )
        held = set(read_header(file).tensors)
        listed = {fqn for fqn, holder in wanted.items() if holder == name}
        if held != listed:
            raise CorruptionError(
                f"{str(index)!r} and {name!r} differ in {sorted(held ^ listed)[:5]}; "
                "copy both again."
            )
    return found


def _refuse_pieces(file: Path, header: Header) -> None:
    """Refuse a file of torch's HuggingFaceStorageWriter that holds pieces of tensors."""
    try:
        sharding = json.loads(header.notes.get(_SHARDING, "{}"))
        pieces = [fqn for fqn, info in sharding.items() if any(info["saved_offsets"])]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptionError(
            f"{str(file)!r} has a {_SHARDING} that is not torch's ({error}); copy it again."
        ) from error
    if pieces:
        raise InvalidInputError(
            f"{str(file)!r} holds pieces of {pieces[0]!r}, not whole tensors; consolidate the "
            "files first (torch's consolidate_safetensors_files)."
        )


def parse_size(size: int | str) -> int:
    """Return a size in bytes: a number, or a text such as "5GB" (powers of 1000) or "5GiB".

    Raises:
        InvalidInputError: it is neither, or not positive.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", str(size).strip().upper())
    unit = (_UNITS | _BINARY).get(found[2]) if found else None
    nbytes = int(float(found[1]) * unit) if found and unit else 0
    if nbytes <= 0:
        raise InvalidInputError(
            f"size {size!r} is not a size; give bytes, or a text such as '5GB' or '512MiB'."
        )
    return nbytes


def shards_of(tensors: Sequence[ExportedTensor], most: int) -> list[list[ExportedTensor]]:
    """Return the tensors of each file: in the order of their names, up to `most` bytes a file.

    Inside a file wide dtypes come first, so that each tensor begins at a multiple of its own width,
    for programs that map the file. A tensor larger than `most` has a file to itself.
    """
    shards: list[list[ExportedTensor]] = [[]]
    held = 0
    for tensor in tensors:
        if shards[-1] and held + tensor.nbytes > most:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.nbytes
    return [sorted(shard, key=lambda t: (-t.dtype.itemsize, t.fqn)) for shard in shards]


def shard_names(count: int) -> list[str]:
    """Return the names of `count` files, as Hugging Face's libraries look for them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
