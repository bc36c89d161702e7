"""Each of torch's public names that dcpstore offers, used as its torch documentation says.

On one rank and on two; the uses stand in `calls`, `save_planners`, `load_planners` and
`state_dicts`.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from tests.dcp import calls, load_planners, save_planners, state_dicts
from tests.dcp.test_page import ours, public_names
from tests.dcp.uses import USES
from tests.ranks import RankPool
from tests.torch_release import of_newest

SUBJECTS = (calls, load_planners, save_planners, state_dicts)  # each enters its uses


pytestmark = of_newest


def test_each_name_of_torchs_has_a_use() -> None:
    offered = {name for name in public_names() if ours(name) is not None}
    assert USES.keys() == offered


def quietly(rank: int, name: str, folder: Path) -> None:
    """Run the use of a name; torch may say that there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        USES[name](rank, folder)


@pytest.mark.parametrize("name", USES)
def test_on_one_rank(name: str, tmp_path: Path) -> None:
    quietly(0, name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", USES)
def test_on_two_ranks(name: str, tmp_path: Path, two_ranks: RankPool) -> None:
    two_ranks.run(quietly, name, tmp_path)
