"""One process as any rank of a group: torch's "fake" process group, which sends nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

__all__ = ["as_rank", "cpu_mesh", "distributed"]


@contextmanager
def as_rank(rank: int, size: int) -> Iterator[None]:
    """Run the block as one rank of a group of `size` ranks."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def cpu_mesh(*shape: int) -> DeviceMesh:
    """Return the mesh of all ranks in this shape."""
    ranks = torch.arange(dist.get_world_size())
    return DeviceMesh("cpu", ranks.reshape(shape or (-1,)))


def distributed(whole: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """Return a tensor split over a mesh; every rank cuts its own part out of `whole`."""
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)
