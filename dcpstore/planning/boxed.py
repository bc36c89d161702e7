"""What a save asks of a planner whose tensors do not lie in memory.

Such a planner is asked for a box at a time and for each box more than once; what it gave is let go
before the next, so a state may be larger than the memory of the process that saves it.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch.distributed.checkpoint.planner import WriteItem

from dcpstore.geometry.boxes import Box

__all__ = ["BoxResolver"]


@runtime_checkable
class BoxResolver(Protocol):
    """A save planner that resolves boxes; threads ask it at once."""

    def resolve_box(self, write_item: WriteItem, box: Box) -> torch.Tensor:
        """Return a CPU tensor of the elements of `box`, which lies inside the item's own box."""
