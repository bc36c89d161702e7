"""Every attack comes to nothing; see `tests.hostile.attacks`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile.attacks import ATTACKS, limits


@pytest.mark.filterwarnings("ignore::UserWarning:torch")  # of saves without a process group
@pytest.mark.parametrize("name", ATTACKS)
def test_it_comes_to_nothing(name: str, tmp_path: Path) -> None:
    before = limits()
    ATTACKS[name](tmp_path)
    assert limits() == before
