"""The names that torch has deprecated, for code that still uses them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load_state_dict as _torch_load
from torch.distributed.checkpoint.state_dict_saver import save_state_dict as _torch_save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

__all__ = ["load_state_dict", "save_state_dict"]


def save_state_dict(  # noqa: PLR0917 (torch's order)
    state_dict: dict[str, Any],
    storage_writer: StorageWriter,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: SavePlanner | None = None,
) -> Metadata:
    """Save through a storage writer, as torch's deprecated `save_state_dict`; use `save`.

    Warns:
        FutureWarning: always.
    """
    return _torch_save(
        state_dict, storage_writer, process_group, coordinator_rank, no_dist, planner
    )


def load_state_dict(  # noqa: PLR0917 (torch's order)
    state_dict: dict[str, Any],
    storage_reader: StorageReader,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: LoadPlanner | None = None,
) -> None:
    """Load through a storage reader, as torch's deprecated `load_state_dict`; use `load`.

    Warns:
        FutureWarning: always.
    """
    _torch_load(state_dict, storage_reader, process_group, coordinator_rank, no_dist, planner)
