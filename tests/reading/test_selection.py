"""Indices of `Repository.read`: an invalid index raises an error of dcpstore."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dcpstore

ODD: list[Any] = [
    slice("a", None),
    slice(1.5, None),
    slice(None, None, "x"),
    slice(None, None, 0),
    slice(None, None, -1),
    (np.arange(2),),
    (torch.arange(2), ...),
    [0, 1],
    None,
    True,
]


def test_an_invalid_index_is_refused(tmp_path: Path, subtests: pytest.Subtests) -> None:
    dcpstore.save({"w": torch.arange(12.0).reshape(3, 4)}, tmp_path)
    with dcpstore.open(tmp_path) as repo:
        for index in ODD:
            with (
                subtests.test(index=repr(index)),
                pytest.raises(dcpstore.InvalidInputError, match="does not fit 'w'"),
            ):
                repo.read("main", {"w": index})
