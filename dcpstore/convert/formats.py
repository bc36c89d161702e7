"""Which format a path is in, and the import for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import torch

from dcpstore.api import RepositoryLike
from dcpstore.convert.dcp_folder import DESCRIPTION, import_dcp
from dcpstore.convert.safetensors_files import import_safetensors
from dcpstore.convert.torch_files import import_torch
from dcpstore.errors import InvalidInputError, NotFoundError
from dcpstore.records import Version
from dcpstore.saving.request import VersionOptions, shows_options

__all__ = ["import_any"]


@shows_options(VersionOptions)
def import_any(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    repo: RepositoryLike,
    *,
    dtype: str | torch.dtype | None = None,
    tensors_only: bool = False,
    allow_pickle: bool = False,
    **options: Unpack[VersionOptions],
) -> Version:
    """Save a checkpoint of any of the formats as a version.

    Args:
        path: a DCP folder, a file of `torch.save`, a safetensors file, index or folder; or several
            safetensors files.
        repo: a `Repository`, or what `dcpstore.open` takes.
        dtype: what floating tensors are converted to, such as "bf16".
        tensors_only: leave the values out, also those that only code could build.
        allow_pickle: let a DCP folder or a `torch.save` file run the code that it names.
        options: how the version is described, as for `dcpstore.save`.

    Raises:
        NotFoundError: nothing is there, or nothing that this can import.
        InvalidInputError: several paths that are not all safetensors; and as the bridges do.
    """
    given = [path] if isinstance(path, str | os.PathLike) else list(path)
    paths = [Path(one) for one in given]
    if _is_safetensors(paths):
        return import_safetensors(paths, repo, dtype=dtype, tensors_only=tensors_only, **options)
    (only,) = paths
    bridge = import_dcp if only.is_dir() else import_torch
    return bridge(
        only, repo, dtype=dtype, tensors_only=tensors_only, allow_pickle=allow_pickle, **options
    )


def _is_safetensors(paths: Sequence[Path]) -> bool:
    if not paths:
        raise InvalidInputError("no path is given; give that of a checkpoint.")
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise NotFoundError(f"nothing is at {missing[0]!r}; give the path of a checkpoint.")
    safe = [path for path in paths if path.suffix in (".safetensors", ".json") or _holds(path)]
    if len(safe) == len(paths):
        return True
    if len(paths) > 1:
        (odd, *_) = (path for path in paths if path not in safe)
        raise InvalidInputError(
            f"{str(odd)!r} is not a safetensors file; only safetensors files can be imported "
            "together, so import it alone."
        )
    if paths[0].is_dir() and not (paths[0] / DESCRIPTION).is_file():
        raise NotFoundError(
            f"the folder {str(paths[0])!r} holds neither {DESCRIPTION!r} nor safetensors files; "
            "give the folder of a checkpoint."
        )
    return False


def _holds(folder: Path) -> bool:
    """Return whether a folder holds safetensors files, and is not a DCP folder."""
    return not (folder / DESCRIPTION).is_file() and any(folder.glob("*.safetensors"))
