"""The first chunks of a large save are written while the others are digested."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from typing_extensions import Buffer

import dcpstore
from dcpstore import DcpstoreError, RankFailure, Repository
from dcpstore.core.checksums import CHECKSUM, PIECE
from dcpstore.saving.coordinator import Coordinator, FirstDigests
from dcpstore.storage.local import FileSink
from tests.ranks import RankPool, mesh
from tests.soundness import Place, assert_sound


class Early:
    """Counts, for each save, the chunks that the ranks are assigned to write early."""

    def __init__(self, patch: pytest.MonkeyPatch, *, limit: int | None = 0) -> None:
        """Begin to count; `limit` replaces the bytes per rank from which a save writes early."""
        if limit is not None:
            patch.setattr("dcpstore.saving.coordinator._EARLY", limit)
        self.counts: list[int] = []
        choose = Coordinator.choose_first

        def counted(
            coordinator: Coordinator, reports: Sequence[FirstDigests]
        ) -> Sequence[Sequence[int]]:
            chosen = choose(coordinator, reports)
            self.counts.append(sum(map(len, chosen)))
            return chosen

        patch.setattr(Coordinator, "choose_first", counted)


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> Early:
    """Every save writes early, whatever its size."""
    return Early(monkeypatch)


def layers(count: int = 10) -> dict[str, torch.Tensor]:
    return {f"layer{i}": torch.randn(50, 50) for i in range(count)}


def read_back(repo: Repository, state: dict[str, torch.Tensor]) -> bool:
    kept = repo.read()
    return all(torch.equal(kept[fqn], tensor) for fqn, tensor in state.items())


def test_only_a_large_save_writes_early(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    early = Early(monkeypatch, limit=None)
    small = {"w": torch.randn(100)}
    dcpstore.save(small, repo)
    assert early.counts == []
    large = {"w": torch.arange(17 << 20, dtype=torch.float32)}  # 68 MiB, 17 chunks
    version = dcpstore.save(large, repo, branch="large")
    assert early.counts == [4]
    checksums = large["w"].nbytes // PIECE * CHECKSUM  # behind each chunk, one a piece
    assert version.nbytes_written == large["w"].nbytes + checksums
    assert torch.equal(repo.read("large")["w"], large["w"])


def test_chunks_that_are_stored_are_not_written_early(repo: Repository, early: Early) -> None:
    state = layers()
    assert dcpstore.save(state, repo).nbytes_written == 100_000
    assert dcpstore.save(state, repo).nbytes_written == 0
    state["layer0"] += 1
    state["layer9"] += 1
    assert dcpstore.save(state, repo).nbytes_written == 20_000
    assert early.counts == [2, 0, 1]
    assert read_back(repo, state)


def test_equal_chunks_are_written_once_whichever_comes_first(
    repo: Repository, early: Early
) -> None:
    state = layers()
    state["layer1"] = state["layer0"].clone()
    state["layer9"] = state["layer0"].clone()
    version = dcpstore.save(state, repo)
    assert (version.nbytes_written, version.nbytes_reused) == (80_000, 20_000)
    assert early.counts == [1]
    assert read_back(repo, state)


def test_chunks_stored_with_another_codec_are_not_written_early(
    repo: Repository, early: Early
) -> None:
    zeros = torch.zeros(2500)
    dcpstore.save({"w": zeros}, repo)
    as_bytes = {"w": zeros.view(torch.uint8)}  # the same bytes, which "auto" encodes with Blosc
    assert 0 < dcpstore.save(as_bytes, repo).nbytes_written < zeros.nbytes
    assert early.counts == [1, 0]
    assert read_back(repo, as_bytes)


def save_early(rank: int, place: Place, states: list[tuple[int, float]]) -> list[tuple[int, int]]:
    """Save a matrix sharded along an axis; return the bytes and the early chunks of each save."""
    with pytest.MonkeyPatch.context() as patch, place.open() as repo:
        early = Early(patch)
        written = []
        for axis, factor in states:
            matrix = torch.arange(40_000.0).reshape(200, 200) * factor
            same = torch.full((5000,), 7.0)
            state = {
                "sharded": distribute_tensor(matrix, mesh((2,)), [Shard(axis)]),
                "replicated": distribute_tensor(matrix[0] + 1, mesh((2,)), [Replicate()]),
                f"of{rank}": same,  # both ranks hold it, under different names
            }
            written.append(dcpstore.save(state, repo).nbytes_written)
            full = repo.read()
            assert torch.equal(full["sharded"], matrix)
            assert torch.equal(full["of0"], full["of1"])
            assert isinstance(state["sharded"], DTensor)
        return [*zip(written, early.counts or [0] * len(written), strict=False)]


def test_equal_chunks_of_two_ranks_are_written_once(place: Place, two_ranks: RankPool) -> None:
    whole = 160_000 + 800 + 20_000
    first, second = two_ranks.run(save_early, place, [(0, 1.0), (0, 1.0), (0, 2.0)])
    assert [nbytes for nbytes, _ in second] == [whole, 0, 160_800]
    assert first[1][1] == 0
    assert first[0][1] >= 1 <= first[2][1]
    with place.open() as repo:
        assert_sound(repo)


def test_nothing_is_written_early_if_bytes_must_be_compared(
    place: Place, two_ranks: RankPool
) -> None:
    """Rows cannot keep the grid of columns, so their digests differ although nothing changed."""
    first, _ = two_ranks.run(save_early, place, [(1, 1.0)])
    assert first[0][1] >= 1
    again, _ = two_ranks.run(save_early, place, [(0, 1.0)])
    assert again == [(0, 0)]
    with place.open() as repo:
        assert_sound(repo)


@pytest.mark.parametrize("when", ["early", "late"])
def test_a_failing_disk_leaves_no_packs(
    repo: Repository, early: Early, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    kept = layers()
    dcpstore.save(kept, repo)
    before = set(repo.storage.list("packs"))
    write = FileSink.write
    written = []

    def failing(sink: FileSink, data: Buffer) -> None:
        written.append(memoryview(data).nbytes)
        if len(written) > (1 if when == "early" else 4):
            raise DcpstoreError("the disk is full")
        write(sink, data)

    monkeypatch.setattr(FileSink, "write", failing)
    with pytest.raises(DcpstoreError, match="disk is full"):
        dcpstore.save(layers(), repo)
    monkeypatch.undo()
    assert set(repo.storage.list("packs")) == before
    assert len(repo.log()) == 1
    assert read_back(repo, kept)


def test_an_interrupt_while_chunks_are_written_leaves_no_packs(
    repo: Repository, early: Early, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = layers()
    dcpstore.save(kept, repo)
    before = set(repo.storage.list("packs"))

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Coordinator, "look_up", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dcpstore.save(layers(), repo)
    monkeypatch.undo()
    assert early.counts[-1] > 0
    assert set(repo.storage.list("packs")) == before
    assert repo.status() == []
    assert dcpstore.save(layers(), repo).number == 2


def save_with_a_failing_rank(rank: int, place: Place) -> tuple[str, bool]:
    """Save on two ranks, of which the second fails while its first chunks are being written."""

    def failing(*args: object) -> None:
        raise ValueError("a broken tensor")

    with pytest.MonkeyPatch.context() as patch, place.open() as repo:
        early = Early(patch)
        if rank == 1:
            patch.setattr("dcpstore.saving.rank_chunks.RankData.digest", failing)
        state = {f"of{rank}.{name}": tensor for name, tensor in layers().items()}
        try:
            dcpstore.save(state, repo)
        except RankFailure as error:
            return str(error), bool(early.counts and early.counts[-1])
    return "no failure", False


def test_a_rank_that_fails_during_early_writes_makes_all_raise(
    place: Place, two_ranks: RankPool
) -> None:
    (first, was_early), (second, _) = two_ranks.run(save_with_a_failing_rank, place)
    assert was_early
    assert first == second
    assert "rank 1: ValueError: a broken tensor" in first
    with place.open() as repo:
        assert list(repo.storage.list("packs")) == []
        assert repo.log() == []
        assert repo.status() == []
        assert_sound(repo)
