"""Checksums of stored bytes: written by every way into a pack, and checked by a deep verify."""

from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import dcpstore
from dcpstore import Repository
from dcpstore.catalog.maintenance.export import load_content
from dcpstore.catalog.maintenance.fsck import PackedChunk, packed_chunks
from dcpstore.catalog.maintenance.preview import preview
from dcpstore.core.checksums import (
    CHECKSUM,
    PIECE,
    check_pieces,
    joined_checksum,
    piece_checksums,
)
from dcpstore.maintenance import rewrite as rewriting
from dcpstore.maintenance import verify as verifying
from dcpstore.records import ChunkPlace, NewChunk
from dcpstore.storage.packs import PackReader
from tests.maintenance.test_verify import flip
from tests.soundness import Place

# A chunk of one piece, one of exactly one, one of many, one without bytes, and one more.
STATE = {
    "a": torch.arange(50),
    "b": torch.randn(PIECE // 4),
    "c": torch.randn(PIECE // 4 * 9 + 1),
    "d": torch.zeros(0, 3),
    "e": torch.arange(7.0),
}


def check_places(repo: Repository, chunks: Iterable[ChunkPlace | NewChunk]) -> int:
    """Check the bytes of chunks against their records; return the bytes of checksums behind."""
    reader = PackReader(repo.storage)
    trailers = 0
    for chunk in chunks:
        assert chunk.checksum is not None
        encoded, pieces = reader.read_with_checksums(
            chunk.pack, chunk.offset, chunk.length, chunk.checksum
        )
        check_pieces(encoded, pieces)
        trailers += len(pieces) if len(pieces) > CHECKSUM else 0
    reader.close()
    return trailers


def stored_chunks(repo: Repository) -> list[NewChunk]:
    """Return the chunks of version 1, as the catalog has them."""
    _, content = load_content(repo.catalog, 1)
    return [chunk for tensor in content.tensors for chunk in tensor.chunks]


def test_a_save_and_a_copy_record_the_checksums_of_what_they_write(
    repo: Repository, other: Repository
) -> None:
    version = dcpstore.save(STATE, repo)
    chunks = stored_chunks(repo)
    assert len(chunks) == 4  # a tensor without elements has no chunk
    assert check_places(repo, chunks) == 10 * CHECKSUM
    assert version.nbytes_written == sum(c.length for c in chunks) + 10 * CHECKSUM
    repo.copy_to(other)
    assert check_places(other, stored_chunks(other)) == 10 * CHECKSUM
    assert {c.checksum for c in stored_chunks(other)} == {c.checksum for c in chunks}
    assert all(torch.equal(other.read()[fqn], tensor) for fqn, tensor in STATE.items())


def test_a_repacked_chunk_has_its_checksums_behind_it_again(
    repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[Mapping[int, ChunkPlace]] = []
    switch = rewriting.switch_pack

    def keep(catalog: Any, old: str, new: Any, moves: Mapping[int, ChunkPlace], **rest: Any) -> Any:
        moved.append(moves)
        return switch(catalog, old, new, moves, **rest)

    monkeypatch.setattr(rewriting, "switch_pack", keep)
    dcpstore.save({**STATE, "big": torch.randn(PIECE * 3)}, repo)
    dcpstore.save(STATE, repo)
    repo.expire(keep_last=1)
    ((_, new),) = repo.gc(grace="0s").repacked
    assert new is not None
    (moves,) = moved
    trailers = check_places(repo, moves.values())
    assert trailers == 10 * CHECKSUM
    assert new.nbytes == sum(place.length for place in moves.values()) + trailers
    assert all(torch.equal(repo.read()[fqn], tensor) for fqn, tensor in STATE.items())


def test_checksums_count_as_used_bytes_of_a_pack(repo: Repository) -> None:
    """Else a pack of which everything is used would look sparse, and be repacked for ever."""
    version = dcpstore.save(STATE, repo)
    week = timedelta(weeks=1)
    found = preview(repo.catalog, now=version.created_at, grace=week, lease=week, live_share=1.0)
    assert found.sparse == []


@pytest.fixture
def recorded(
    place: Place, repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], dict[int, PackedChunk]]:
    """Let the catalog have the checksums of a pack as its file has them now."""

    def record() -> dict[int, PackedChunk]:
        (pack,) = repo.storage.list("packs")
        data = (Path(place.data) / pack).read_bytes()
        chunks = {
            chunk.length: chunk._replace(
                checksum=joined_checksum(
                    piece_checksums(data[chunk.offset : chunk.offset + chunk.length])
                )
            )
            for chunk in packed_chunks(repo.catalog, pack)
        }
        monkeypatch.setattr(verifying, "packed_chunks", lambda catalog, key: [*chunks.values()])
        return chunks

    return record


def test_a_deep_verify_finds_a_flipped_bit_in_the_checksums_of_a_chunk(
    place: Place, repo: Repository, recorded: Callable[[], dict[int, PackedChunk]]
) -> None:
    dcpstore.save(STATE, repo)
    chunks = recorded()
    assert repo.verify(deep=True).damaged == ()
    large = chunks[max(chunks)]
    (pack,) = repo.storage.list("packs")
    for at in (0, 10 * CHECKSUM - 1):
        flip(Path(place.data) / pack, large.offset + large.length + at)
        (damage,) = repo.verify(deep=True).damaged
        (chunk,) = damage.chunks
        assert (chunk.offset, chunk.fqns) == (large.offset, ("c",))
        assert "checksums behind it are damaged" in chunk.reason
        flip(Path(place.data) / pack, large.offset + large.length + at)
    assert repo.verify(deep=True).damaged == ()


def test_a_deep_verify_finds_a_checksum_that_is_not_of_the_stored_bytes(
    repo: Repository,
    recorded: Callable[[], dict[int, PackedChunk]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dcpstore.save(STATE, repo)
    chunks = recorded()
    wrong = [c._replace(checksum=bytes(16)) if c.length <= PIECE else c for c in chunks.values()]
    monkeypatch.setattr(verifying, "packed_chunks", lambda catalog, key: wrong)
    (damage,) = repo.verify(deep=True).damaged
    assert {chunk.fqns for chunk in damage.chunks} == {("a",), ("b",), ("e",)}
    assert all("piece at byte 0 does not match" in chunk.reason for chunk in damage.chunks)
    monkeypatch.undo()
    assert repo.verify(deep=True).damaged == ()
