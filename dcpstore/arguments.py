"""What `save`, `load` and `async_save` are given: a repository or a storage of torch's, a planner.

Torch's older forms are taken. Invariant: what stands in the place of another argument is refused by
the name of the argument that it is for, before anything is opened.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from dcpstore.errors import InvalidInputError
from dcpstore.places import absolute_target
from dcpstore.records import Version
from dcpstore.repository import Repository

__all__ = [
    "RepositoryLike",
    "check_planner",
    "check_ref",
    "check_unused",
    "taken_reader",
    "taken_writer",
    "where_given",
]

RepositoryLike = Repository | str | os.PathLike[str]

# What else a caller may have, and what it is for.
_MEANT_FOR: tuple[tuple[type, str], ...] = (
    (StorageWriter, "pass it as storage_writer= to save or async_save"),
    (StorageReader, "pass it as storage_reader= to load"),
    (SavePlanner, "pass it as planner= to save or async_save"),
    (LoadPlanner, "pass it as planner= to load"),
    (Repository, "pass it as the repository"),
    (Version, "pass the repository, and for a load str(version) as ref"),
    (Metadata, "it describes a checkpoint and holds none; pass where the checkpoint is"),
    (dist.ProcessGroup, "pass it as process_group="),
)


def taken_writer(
    call: str, repo: RepositoryLike | StorageWriter | None, writer: StorageWriter | None
) -> tuple[RepositoryLike | None, StorageWriter | None]:
    """Return the repository and the writer that a call is given.

    Torch's first releases had a storage second, without its name. As there, this is taken.

    Raises:
        InvalidInputError: a writer is given twice, or what is given as one is something else.

    Warns:
        UserWarning: it stands in the place of the repository.
    """
    return _taken(call, repo, writer, "storage_writer", StorageWriter)


def taken_reader(
    call: str, repo: RepositoryLike | StorageReader | None, reader: StorageReader | None
) -> tuple[RepositoryLike | None, StorageReader | None]:
    """Return the repository and the reader that a call is given, as `taken_writer`."""
    return _taken(call, repo, reader, "storage_reader", StorageReader)


def _taken(call: str, repo: Any, storage: Any, name: str, kind: type) -> tuple[Any, Any]:
    if isinstance(repo, kind):
        if storage is not None:
            raise InvalidInputError(f"{call} is given two storages; pass one, as {name}=.")
        warnings.warn(
            f"The argument order of {call} has been changed. Please check the document to avoid "
            f"future breakages: give the storage by its name, {name}=.",
            stacklevel=4,  # where the caller stands
        )
        repo, storage = None, repo
    if storage is not None and not isinstance(storage, kind):
        is_place = isinstance(storage, str | os.PathLike)
        _check_meant(name, storage, "pass it as the repository" if is_place else "")
    return repo, storage


def where_given(
    repo: RepositoryLike | None, checkpoint_id: str | os.PathLike[str] | None
) -> RepositoryLike:
    """Return the repository that a caller names, by torch's argument or by ours.

    Raises:
        InvalidInputError: neither of them is given, or both are, or what is given is not a place.
    """
    if (repo is None) == (checkpoint_id is None):
        raise InvalidInputError(
            f"{'neither' if repo is None else 'both'} of repo and checkpoint_id are given; pass "
            "one of them: a Repository, a folder or a database URL."
        )
    if isinstance(repo, Repository):
        return repo
    named = checkpoint_id if repo is None else repo
    assert named is not None, "one of them is given"
    _check_meant("checkpoint_id" if repo is None else "repo", named)
    return absolute_target(named)  # an asynchronous save opens it later, perhaps from elsewhere


def check_planner(planner: object, kind: type[LoadPlanner] | type[SavePlanner]) -> None:
    """Check that a planner is not one for the other direction, nor something else.

    Raises:
        InvalidInputError: it is.
    """
    if planner is not None and not isinstance(planner, kind):
        _check_meant("planner", planner, f"pass a {kind.__name__}" if _is_plain(planner) else "")


def check_ref(ref: object) -> None:
    """Check that a ref is not what another argument is for.

    Raises:
        InvalidInputError: it is.
    """
    if ref is not None:
        _check_meant("ref", ref)


def check_unused(storage: str, /, *named: str, **given: bool) -> None:
    """Check that a call on another storage has no argument that only a repository can honour.

    Raises:
        InvalidInputError: some are `named`, or are `given`.
    """
    names = [*named, *(name for name, is_given in given.items() if is_given)]
    if names:
        raise InvalidInputError(
            f"{', '.join(names)}: for a repository only, and {storage} names another storage; "
            f"leave them out, or give a repository in the place of {storage}."
        )


def _check_meant(name: str, given: object, instead: str = "") -> None:
    """Check that what is given as `name` is none of what other arguments are for."""
    if isinstance(given, type):
        instead = f"pass an object: {given.__name__}(...)"
    instead = next((use for kind, use in _MEANT_FOR if isinstance(given, kind)), instead)
    if instead:
        raise InvalidInputError(f"{name} is {_shown(given)}; {instead}.")


def _is_plain(given: object) -> bool:
    return isinstance(given, str | os.PathLike | int | float | bool | dict | list)


def _shown(given: object) -> str:
    if isinstance(given, type):
        return f"the class {given.__name__}"
    is_short = isinstance(given, str | os.PathLike | int)
    return repr(given) if is_short else f"a {type(given).__name__}"
