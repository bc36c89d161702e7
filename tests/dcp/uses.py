"""The registry of uses of torch's names, and the state that they save.

A use is a function of the rank and an empty folder that all ranks share.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.ranks import mesh

WHOLE = torch.arange(15.0).reshape(5, 3)  # 5 rows: three on one rank, two on the other
Use = Callable[[int, Path], None]
USES: dict[str, Use] = {}


def use_of(*names: str) -> Callable[[Use], Use]:
    """Register a function as the use of these names."""

    def register(use: Use) -> Use:
        USES.update(dict.fromkeys(names, use))
        return use

    return register


def state(*, filled: bool = True) -> dict[str, Any]:
    whole = WHOLE.clone() if filled else torch.zeros(5, 3)
    if dist.is_initialized():
        whole = distribute_tensor(whole, mesh((dist.get_world_size(),)), [Shard(0)])
    plain = torch.ones(4) if filled else torch.zeros(4)
    return {"w": whole, "nest": {"p": plain, "list": [plain.clone(), 3]}, "step": 7 * filled}


def assert_filled(found: dict[str, Any]) -> None:
    whole = found["w"].full_tensor() if isinstance(found["w"], DTensor) else found["w"]
    assert torch.equal(whole, WHOLE)
    assert torch.equal(found["nest"]["p"], torch.ones(4))
    assert torch.equal(found["nest"]["list"][0], torch.ones(4))
    assert (found["nest"]["list"][1], found["step"]) == (3, 7)


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
