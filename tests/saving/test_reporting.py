"""While a save is running, the catalog shows the progress of each of its ranks."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import torch

import dcpstore
from dcpstore.records import RunningSave
from tests.ranks import RankPool
from tests.soundness import Place, assert_sound


def save_slowly(rank: int, place: Place, gate: Path) -> int:
    """Save; rank 1 waits in the planner until the file `gate` exists."""

    class Slow(dcpstore.DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            until = time.monotonic() + 60
            while rank == 1 and not gate.exists():
                assert time.monotonic() < until, "the gate was not opened"
                time.sleep(0.02)
            return super().resolve_data(write_item)

    with place.open() as repo:
        state = {f"w{rank}": torch.full((300,), float(rank))}
        return dcpstore.save(state, repo, step=7, planner=Slow()).number


def test_the_status_shows_the_phase_of_each_rank(
    place: Place, two_ranks: RankPool, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    with place.open() as repo:
        results: list[list[int]] = []
        ranks = threading.Thread(
            target=lambda: results.append(two_ranks.run(save_slowly, place, gate))
        )
        ranks.start()
        seen: list[RunningSave] = []
        while ranks.is_alive() and not (seen and len(seen[0].progress) == 2):
            seen = repo.status()
            time.sleep(0.05)
        gate.touch()
        ranks.join()
        assert results == [[1, 1]]
        (save,) = seen
        assert (save.branch, save.step, save.ranks) == ("main", 7, 2)
        first, second = save.progress
        assert (first.rank, first.nbytes, first.total) == (0, 1200, 1200)
        assert (second.rank, second.nbytes) == (1, 0)
        assert first.phase in ("digest", "write")
        assert repo.status() == []
        assert_sound(repo)
