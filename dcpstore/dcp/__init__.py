"""Torch's StorageWriter and StorageReader on a repository, and the names that go with them."""

from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from dcpstore.dcp.filesystem import (
    FileSystemReader,
    FileSystemWriter,
    load_state_dict,
    save_state_dict,
)
from dcpstore.dcp.reader import RepositoryReader
from dcpstore.dcp.writer import RepositoryWriter

__all__ = [
    "FileSystemReader",
    "FileSystemWriter",
    "LoadPlan",
    "LoadPlanner",
    "ReadItem",
    "RepositoryReader",
    "RepositoryWriter",
    "SavePlan",
    "SavePlanner",
    "Stateful",
    "StorageReader",
    "StorageWriter",
    "WriteItem",
    "load_state_dict",
    "save_state_dict",
]
