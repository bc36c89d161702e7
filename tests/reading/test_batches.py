"""Chunks read in batches: each in its place, each checked, and a damaged one named."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dcpstore
from dcpstore import ChunkDefaults, CorruptionError, Repository
from dcpstore.catalog.read.entries import load_chunks
from dcpstore.core.parallel import in_batches, run_ahead
from dcpstore.geometry.boxes import Box
from dcpstore.reading.box_reads import BoxRequest, read_boxes
from dcpstore.records import ChunkRange, StoredChunk
from dcpstore.storage.packs import PackReader


def pack_of(repo: Repository) -> Path:
    (pack,) = (Path(repo.storage.url) / "packs").rglob("*.pack")
    return pack


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 40)), max_size=30))
def test_each_chunk_is_in_one_batch_and_each_batch_in_one_pack(
    wanted: list[tuple[str, int]],
) -> None:
    stored = [StoredChunk(1, 0, i, b"", pack, 0, n) for i, (pack, n) in enumerate(wanted)]
    runs = list(in_batches(stored, attrgetter("length"), place=attrgetter("pack"), limit=50))
    assert [chunk for run in runs for chunk in run] == stored
    for run in runs:
        assert len({chunk.pack for chunk in run}) == 1
        assert sum(chunk.length for chunk in run[:-1]) < 50


def test_few_tasks_run_ahead_of_the_caller_and_results_are_in_order() -> None:
    begun: list[int] = []

    def twice(n: int) -> int:
        begun.append(n)
        return 2 * n

    with ThreadPoolExecutor(2) as pool:
        results = run_ahead(pool, twice, range(40), ahead=3)
        assert next(results) == (0, 0)
        assert len(begun) <= 1 + 3
        assert list(results) == [(n, 2 * n) for n in range(1, 40)]
    assert sorted(begun) == list(range(40))


def test_an_error_of_a_task_is_raised_to_the_caller() -> None:
    with ThreadPoolExecutor(2) as pool:
        results = run_ahead(pool, lambda n: 1 // n, [1, 0, 1])
        assert next(results) == (1, 1)
        with pytest.raises(ZeroDivisionError):
            next(results)


@pytest.mark.parametrize("codec", ["none", "blosc", "zstd"])
@pytest.mark.parametrize("batch", [1, 700, 1 << 20])
def test_boxes_that_share_chunks_are_all_filled(tmp_path: Path, codec: str, batch: int) -> None:
    whole = torch.arange(600.0).reshape(30, 20)
    with dcpstore.open(tmp_path / "r", chunk=ChunkDefaults(nbytes=256, codec=codec)) as repo:
        dcpstore.save({"w": whole, "one": whole[:2].clone()}, repo)
        entries = {entry.fqn: entry for entry in repo.entries()}
        boxes = [
            Box((0, 0), (30, 20)),
            Box((3, 2), (20, 7)),
            Box((29, 0), (1, 20)),
            Box((0, 19), (30, 1)),
        ]
        targets = [torch.zeros(box.sizes) for box in boxes]
        wide = torch.zeros(2, 20, dtype=torch.float64)
        requests = [
            *(BoxRequest(entries["w"], box, t) for box, t in zip(boxes, targets, strict=True)),
            BoxRequest(entries["one"], Box((0, 0), (2, 20)), wide),
        ]
        packs = PackReader(repo.storage)
        counts = read_boxes(requests, repo.catalog, packs, version=1, batch_nbytes=batch)
        for box, target in zip(boxes, targets, strict=True):
            assert torch.equal(target, whole[box.slices])
        assert torch.equal(wide, whole[:2].double())
        assert counts.chunks == len(load_chunks(repo.catalog, _every_chunk(repo)))


def _every_chunk(repo: Repository) -> list[ChunkRange]:
    return [
        ChunkRange(entry.tensor.id, part, 0, grid.size - 1)
        for entry in repo.entries()
        if entry.tensor is not None
        for part, grid in enumerate(entry.tensor.parts)
    ]


def test_the_damaged_one_of_many_small_chunks_is_named_and_not_returned(repo: Repository) -> None:
    state = {f"t{i:02}": torch.full((16,), float(i + 1)) for i in range(40)}
    dcpstore.save(state, repo)
    pack = pack_of(repo)
    whole = pack.read_bytes()
    for damaged in (0, 17, 39):
        at = whole.index(state[f"t{damaged:02}"].numpy().tobytes())
        pack.write_bytes(whole[: at + 5] + b"\xff" + whole[at + 6 :])
        targets = {fqn: torch.zeros(16) for fqn in state}
        with pytest.raises(CorruptionError, match=rf"v1: 't{damaged:02}'.* at offset {at}, "):
            dcpstore.load(targets, repo)
        assert torch.equal(targets[f"t{damaged:02}"], torch.zeros(16))
    pack.write_bytes(whole)


def test_the_first_chunk_past_the_end_of_a_short_pack_is_named(repo: Repository) -> None:
    state = {f"t{i}": torch.full((16,), float(i + 1)) for i in range(9)}
    dcpstore.save(state, repo)
    pack = pack_of(repo)
    whole = pack.read_bytes()
    pack.write_bytes(whole[: 5 * 64 + 1])
    (sixth,) = (fqn for fqn, t in state.items() if t.numpy().tobytes() == whole[5 * 64 : 6 * 64])
    with pytest.raises(CorruptionError, match=re.escape(f"v1: '{sixth}'")):
        dcpstore.load({fqn: torch.zeros(16) for fqn in state}, repo)
    pack.write_bytes(whole)
