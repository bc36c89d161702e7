"""Simulated ranks: the coordinator does with them what it does with real ones."""

from __future__ import annotations

from benchmarks.simulated import SimulatedRanks, plan_alone
from dcpstore.saving.commit import SaveTarget
from tests.soundness import Place


def test_simulated_ranks_send_what_changed(place: Place) -> None:
    with place.open() as repo:  # not sound: the packs are said to be written, and are not
        target = SaveTarget(repo.catalog, repo.storage, repo.memory, repo.location)
        ranks = SimulatedRanks(16, 80, target)
        first, unchanged, half = ranks.save(), ranks.save(changed=0), ranks.save(changed=0.5)
        stored = [entry.tensor for entry in repo.entries() if entry.tensor is not None]
        assert [version.number for version in repo.log()] == [3, 2, 1]
    chunks = sum(grid.size for tensor in stored for grid in tensor.parts)
    assert len(stored) == 80
    assert (first.chunks, unchanged.chunks, half.chunks) == (chunks, 0, chunks // 2)
    assert first.received["digest"] > 32 * chunks
    assert half.received["digest"] - unchanged.received["digest"] >= 36 * chunks // 2
    assert unchanged.received["digest"] < 500 * 16
    assert unchanged.received["plan"] < 500 * 16


def test_more_ranks_than_rows_are_planned() -> None:
    few, many = plan_alone(1024, 4), plan_alone(2048, 4)
    assert 1.5 < many.received / few.received < 2.5
    assert 1.5 < many.sent / few.sent < 2.5
