"""Which release of torch the tests run on, and marks for what an older one lacks."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
import torch.distributed.checkpoint.staging as torch_staging

RELEASE = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
NEWEST = (2, 13)  # whose names and arguments docs/dcp.md lists


class _Blocking(torch_staging.BlockingAsyncStager):
    """What stands in for `DefaultStager` on torch 2.8, which has none that stages in a thread."""

    def __init__(self, options: object) -> None:
        super().__init__()

    def close(self) -> None:
        """Do nothing: it holds nothing."""


def _options(*given: bool) -> object:
    return given


# Torch's own where it has them; tests that need a thread carry the mark `since_2_9`.
DefaultStager = getattr(torch_staging, "DefaultStager", _Blocking)
StagingOptions = getattr(torch_staging, "StagingOptions", _options)

since_2_9 = pytest.mark.skipif(RELEASE < (2, 9), reason="torch 2.8 lacks what is tried here")
of_newest = pytest.mark.skipif(RELEASE < NEWEST, reason="docs/dcp.md lists the names of torch 2.13")
# torchao 0.18, whose classes dcpstore knows, does not load on older releases of torch; it is a
# development dependency, so it is missing only where it cannot be used.
with_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
