"""Every attack fails; see `tests.hostile.attacks`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.hostile.listing import ATTACKS


def limits() -> tuple[int, int]:
    """Return what attacks must leave alone: the depth of recursion, and of digits in numbers."""
    return sys.getrecursionlimit(), sys.get_int_max_str_digits()


@pytest.mark.filterwarnings("ignore::UserWarning:torch")  # of saves without a process group
@pytest.mark.parametrize("name", ATTACKS)
def test_it_comes_to_nothing(name: str, tmp_path: Path) -> None:
    before = limits()
    ATTACKS[name](tmp_path)
    assert limits() == before
