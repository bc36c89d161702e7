"""Files of `torch.save`: in, and out again.

In: the file's pickle is read, its tensors' bytes stay where they lie until a chunk wants them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dcpstore.arguments import RepositoryLike
from dcpstore.compositions import Composition
from dcpstore.convert.exporting import Exported, ExportedVersion
from dcpstore.convert.importing import Foreign, Naming, save_foreign
from dcpstore.convert.pickles import Odd, odd_inside
from dcpstore.convert.targets import new_file
from dcpstore.convert.ties import find_ties
from dcpstore.convert.torch_archive import Loaded, is_archive, load_archive, open_source, refuse_odd
from dcpstore.convert.torch_writing import PlannedTensor, write_archive
from dcpstore.encoding.values import PlannerBytes, encode_value
from dcpstore.errors import InvalidInputError, NotFoundError, UnsafeDataError
from dcpstore.planning.nesting import flattened, nested_state
from dcpstore.records import Version
from dcpstore.repository import opened

__all__ = ["export_torch", "import_torch"]


def import_torch(
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
    """Save what a `torch.save` file holds as a version, in the memory of a few chunks.

    Args:
        path: the file; it holds a dict, nested or flat.
        repo: a `Repository`, or what `dcpstore.open` takes.
        branch, step, tags, message: as for `dcpstore.save`.
        dtype: what floating tensors are converted to, such as "bf16".
        tensors_only: leave the values out, those too that only code could build.
        allow_pickle: let the file run the code that it names, and store pickles.

    Raises:
        NotFoundError: there is no such file.
        CorruptionError: it is damaged or truncated.
        InvalidInputError: it holds no dict, or was written before torch 1.6.
        UnsafeDataError: it would run code, and for which FQNs; and as for `dcpstore.save`.
    """
    foreign = _read(Path(path), tensors_only=tensors_only, allow_pickle=allow_pickle)
    naming = Naming(branch, step, tuple(tags), message)
    return save_foreign(foreign, repo, naming, dtype=dtype, allow_pickle=allow_pickle)


def export_torch(
    repo: RepositoryLike,
    ref: str | int | None,
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    tensors_only: bool = False,
    allow_pickle: bool = False,
) -> Exported:
    """Write a version as a file that `torch.load` reads, in the memory of a box of a tensor.

    The nested state comes back: dicts, lists, an optimizer's numbered parameters, tied tensors.

    Args:
        repo: a `Repository`, or what `dcpstore.open` takes.
        ref: the version; None is the tip of `main`.
        path: the new file.
        dtype: what floating tensors are converted to, such as "bf16".
        tensors_only: leave the values out.
        allow_pickle: let values that are pickles run their code, and be pickled again.

    Raises:
        AlreadyExistsError: the file exists.
        NotFoundError: no such version, or no folder for the file.
        UnsafeDataError: a value is a pickle, and that is not allowed.
        CorruptionError: stored bytes are damaged; there is no file then.
    """
    target = Path(path)
    with opened(repo, create=False) as repository, new_file(target) as file:
        version = ExportedVersion(repository, ref, dtype=dtype, tensors_only=tensors_only)
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
    """Return a value that torch.load needs no class of ours for."""
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
        # What such a value holds inside is unknown, and may be tensors: it is loaded with data.
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
