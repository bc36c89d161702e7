"""Chunks handed out to ranks: each gets those of its ranges, from one look-up."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from dcpstore.loading.chunk_rows import as_rows, hand_out
from dcpstore.records import ChunkRange, StoredChunk

# The stored tensors: by id and part, the number of chunks.
STORED = {(3, 0): 7, (3, 1): 4, (8, 0): 1, (9, 0): 20, (2**40, 2): 5}


def chunks_of(ranges: Sequence[ChunkRange]) -> list[StoredChunk]:
    """Return the chunks of ranges, each once, in pack order."""
    places = {(t, p, o) for t, p, first, last in ranges for o in range(first, last + 1)}
    found = [
        StoredChunk(
            tensor,
            part,
            ordinal,
            bytes([part, ordinal, 0]) + bytes([tensor % 251]) * 29,
            f"packs/{ordinal % 3}.pack",
            1000 * ordinal + part,
            2**33 + ordinal,
            None if ordinal % 2 else bytes(15) + bytes([ordinal]),
        )
        for tensor, part, ordinal in places
    ]
    return sorted(found, key=lambda chunk: (chunk.pack, chunk.offset, chunk[:3]))


@st.composite
def ranges(draw: st.DrawFn) -> list[ChunkRange]:
    drawn = []
    for tensor, part in draw(st.lists(st.sampled_from([*STORED]), max_size=4)):
        first = draw(st.integers(0, STORED[tensor, part] - 1))
        last = draw(st.integers(first, STORED[tensor, part] - 1))
        drawn.append(ChunkRange(tensor, part, first, last))
    return drawn


@given(st.lists(ranges(), min_size=1, max_size=4))
def test_each_rank_gets_the_chunks_of_its_ranges(wanted: list[list[ChunkRange]]) -> None:
    asked: list[list[ChunkRange]] = []

    def find(given: list[ChunkRange]) -> list[StoredChunk]:
        asked.append(given)
        return chunks_of(given)

    handed = hand_out([as_rows(of_rank) for of_rank in wanted], find)
    assert [rows.chunks() for rows in handed] == [chunks_of(of_rank) for of_rank in wanted]
    (once,) = asked
    places = [(t, p, o) for t, p, first, last in once for o in range(first, last + 1)]
    assert len(places) == len(set(places))  # the ranges do not overlap
    assert all(type(number) is int for one in once for number in one)
    for rows in handed:
        assert len(rows.packs) == len({chunk.pack for chunk in rows.chunks()})


def test_ranks_that_ask_for_the_same_share_the_answer() -> None:
    same = as_rows([ChunkRange(9, 0, 0, 19)])
    first, second, other = hand_out(
        [same, same.copy(), as_rows([ChunkRange(9, 0, 1, 2)])], chunks_of
    )
    assert first is second
    assert len(other.chunks()) == 2
