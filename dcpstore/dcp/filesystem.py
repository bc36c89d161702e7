"""`FileSystemWriter` and `FileSystemReader` with torch's names and arguments, on a folder.

The folder holds an embedded repository, so a second save to it makes a new version and overwrites
nothing. Arguments that say how torch lays out its files have no effect here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.planner import SavePlan

from dcpstore.catalog.location import absolute_target
from dcpstore.dcp.reader import RepositoryReader
from dcpstore.dcp.writer import RepositoryWriter
from dcpstore.errors import AlreadyExistsError, InvalidInputError, NotFoundError
from dcpstore.repository import open as open_repository

__all__ = ["FileSystemReader", "FileSystemWriter"]


class _InFolder:
    """What writer and reader share: torch's id of a checkpoint is the path of a folder."""

    path: Path

    @property
    def checkpoint_id(self) -> Path:
        """The folder."""
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Tell whether this can be a folder's path."""
        return "://" not in os.fspath(checkpoint_id)


class FileSystemWriter(_InFolder, RepositoryWriter):
    """Torch's FileSystemWriter on an embedded repository in the folder `path`.

    A `checkpoint_id` given to torch's call is another folder, used from then on.

    Args:
        path: the folder; created if it is missing.
        single_file_per_rank, sync_files, thread_count: accepted as torch does, without effect;
            packs are always durable, and dcpstore chooses threads and files.
        per_thread_copy_ahead, cache_staged_state_dict, serialization_format: likewise.
        overwrite: False refuses a folder that holds a version already; True adds one.
        allow_pickle: store values that JSON cannot hold as pickles.

    Raises:
        InvalidInputError: extensions, which would change the stored bytes.
    """

    def __init__(  # noqa: PLR0917 (torch's order)
        self,
        path: str | os.PathLike[str],
        single_file_per_rank: bool = True,
        sync_files: bool = True,
        thread_count: int = 1,
        per_thread_copy_ahead: int = 10_000_000,
        cache_staged_state_dict: bool = False,
        overwrite: bool = True,
        _extensions: Sequence[Any] | None = None,
        serialization_format: SerializationFormat = SerializationFormat.TORCH_SAVE,
        *,
        allow_pickle: bool = False,
    ) -> None:
        if _extensions:
            raise InvalidInputError(
                f"_extensions={_extensions!r}: stream extensions are not supported, because packs "
                "are read by range; leave the argument out."
            )
        super().__init__(path, allow_pickle=allow_pickle)
        self.path = Path(path)
        self._overwrite = overwrite

    @property
    def _lasting_id(self) -> Path:
        return self.path

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new save, into another folder if one is given."""
        self._renew()  # first: it aborts a pending version, which is in the old folder
        if checkpoint_id:
            self._repo = absolute_target(checkpoint_id)
            self.path = Path(checkpoint_id)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan as it is.

        Raises:
            AlreadyExistsError: `overwrite=False`, and the folder holds a version.
        """
        if not self._overwrite and _holds_version(self.path):
            raise AlreadyExistsError(
                f"Checkpoint already exists in {str(self.path)!r} and overwrite=False; choose "
                "another folder, or let overwrite=True add a version (nothing is lost)."
            )
        return plan


class FileSystemReader(_InFolder, RepositoryReader):
    """Torch's FileSystemReader on an embedded repository: the tip of `main` in the folder `path`.

    A `checkpoint_id` given to torch's call is another folder, used from then on.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        _extension_registry: Any = None,
        *,
        verify: bool = True,
        allow_pickle: bool = False,
    ) -> None:
        super().__init__(path, verify=verify, allow_pickle=allow_pickle)
        self.path = Path(path)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new load, of another folder if one is given."""
        if checkpoint_id:
            self._repo = absolute_target(checkpoint_id)
            self.path = Path(checkpoint_id)
        super().reset()


def _holds_version(path: Path) -> bool:
    try:
        with open_repository(path, create=False) as repo:
            return bool(repo.log(limit=1))
    except NotFoundError:
        return False
