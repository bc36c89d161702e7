"""dcpstore: a versioned checkpoint store with a database for a memory.

Public are the names in `__all__` here and in `dcpstore.convert`, `dcpstore.state_dict` and
`dcpstore.testing`, and `__version__`. Every other module, and every other name in a module, is
private: it may change in any release (`docs/versioning.md`).

Names are loaded when first used, so that tools which only ask the catalog never load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import (
        LoadPlan,
        LoadPlanner,
        ReadItem,
        SavePlan,
        SavePlanner,
        WriteItem,
    )
    from torch.distributed.checkpoint.state_dict_loader import load_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save_state_dict
    from torch.distributed.checkpoint.stateful import Stateful
    from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

    from dcpstore.api import load, save
    from dcpstore.asynchronous.async_save import async_save
    from dcpstore.asynchronous.preemption import Preemption, on_preemption
    from dcpstore.catalog.maintenance.retention import Retention
    from dcpstore.dcp.filesystem import FileSystemReader, FileSystemWriter
    from dcpstore.dcp.reader import RepositoryReader
    from dcpstore.dcp.writer import RepositoryWriter
    from dcpstore.errors import (
        AlreadyExistsError,
        ConflictError,
        CorruptionError,
        DcpstoreError,
        InvalidInputError,
        MismatchError,
        NotFoundError,
        RankFailure,
        SchemaError,
        UnsafeDataError,
    )
    from dcpstore.history import Diff
    from dcpstore.planning import DefaultLoadPlanner, DefaultSavePlanner, LoadOptions, PerRank
    from dcpstore.records import ChunkDefaults, LoadReport, StorageRequest, Trace, Version
    from dcpstore.repository import Repository, open
    from dcpstore.saving.staging import PendingSave

__version__ = "0.1.0"

__all__ = [
    "AlreadyExistsError",
    "ChunkDefaults",
    "ConflictError",
    "CorruptionError",
    "DcpstoreError",
    "DefaultLoadPlanner",
    "DefaultSavePlanner",
    "Diff",
    "FileSystemReader",
    "FileSystemWriter",
    "InvalidInputError",
    "LoadOptions",
    "LoadPlan",
    "LoadPlanner",
    "LoadReport",
    "MismatchError",
    "NotFoundError",
    "PendingSave",
    "PerRank",
    "Preemption",
    "RankFailure",
    "ReadItem",
    "Repository",
    "RepositoryReader",
    "RepositoryWriter",
    "Retention",
    "SavePlan",
    "SavePlanner",
    "SchemaError",
    "Stateful",
    "StorageReader",
    "StorageRequest",
    "StorageWriter",
    "Trace",
    "UnsafeDataError",
    "Version",
    "WriteItem",
    "async_save",
    "load",
    "load_state_dict",
    "on_preemption",
    "open",
    "save",
    "save_state_dict",
    "state_dict",
]

_HOMES = {
    "dcpstore.api": ("load", "save"),
    "dcpstore.asynchronous.async_save": ("async_save",),
    "dcpstore.saving.staging": ("PendingSave",),
    "dcpstore.dcp.filesystem": ("FileSystemReader", "FileSystemWriter"),
    "dcpstore.dcp.reader": ("RepositoryReader",),
    "dcpstore.dcp.writer": ("RepositoryWriter",),
    "dcpstore.errors": (
        "AlreadyExistsError",
        "ConflictError",
        "CorruptionError",
        "DcpstoreError",
        "InvalidInputError",
        "MismatchError",
        "NotFoundError",
        "RankFailure",
        "SchemaError",
        "UnsafeDataError",
    ),
    "dcpstore.history": ("Diff",),
    "dcpstore.planning": ("DefaultLoadPlanner", "DefaultSavePlanner", "LoadOptions", "PerRank"),
    "dcpstore.asynchronous.preemption": ("Preemption", "on_preemption"),
    "dcpstore.records": ("ChunkDefaults", "LoadReport", "StorageRequest", "Trace", "Version"),
    "dcpstore.repository": ("Repository", "open"),
    # torch's own names, for code that takes all of them from here
    "torch.distributed.checkpoint.planner": (
        "LoadPlan",
        "LoadPlanner",
        "ReadItem",
        "SavePlan",
        "SavePlanner",
        "WriteItem",
    ),
    "torch.distributed.checkpoint.state_dict_loader": ("load_state_dict",),
    "torch.distributed.checkpoint.state_dict_saver": ("save_state_dict",),
    "torch.distributed.checkpoint.stateful": ("Stateful",),
    "torch.distributed.checkpoint.storage": ("StorageReader", "StorageWriter"),
    "dcpstore.catalog.maintenance.retention": ("Retention",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name == "state_dict":
        return importlib.import_module("dcpstore.state_dict")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'dcpstore' has no attribute {name!r}")
    found: object = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
