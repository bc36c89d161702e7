"""Segments of the journal: their spans, what is read of damaged ones, and what is refused."""

import json
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

from dcpstore.errors import CorruptionError, SchemaError
from dcpstore.formats import journal_segment
from dcpstore.formats.journal_entry import encode_operation
from dcpstore.formats.journal_segment import (
    SHORTEST,
    Span,
    encode_segment,
    read_segment,
    segment_key,
    segment_span,
    spans_within,
)

FIRST = Span(1, 32)


def operation(number: int, **more: Any) -> bytes:
    return encode_operation(
        {
            **{"operation": number, "kind": "gc", "target": "", "old": None, "new": None},
            **{"author": "ada", "created_at": "2026-11-30T09:00:00+00:00", "detail": None},
            **more,
        }
    )


def read(data: bytes, span: Span = FIRST) -> tuple[list[int], str | None]:
    """Return the numbers of what is intact in a segment, and what is wrong with it, if anything."""
    numbers = []
    try:
        for line, found in read_segment(data, span):
            assert line == operation(found["operation"])
            numbers.append(found["operation"])
    except CorruptionError as error:
        return numbers, str(error)
    return numbers, None


SEGMENT = encode_segment(FIRST, [operation(n) for n in range(1, 33)])


def counts() -> Iterator[int]:
    """Yield numbers of operations: all small ones, each border of a segment, and some between."""
    yield from range(2000)
    for size in (32, 256, 2048, 16_384, 131_072):
        for times in (1, 7, 8, 30, 38):
            yield from (size * times - 1, size * times, size * times + 31)
    yield from range(0, 5_000_000, 99_991)


def test_under_a_hundred_objects_up_to_five_million_operations() -> None:
    most = 0
    for last in counts():
        spans = list(spans_within(1, last))
        in_order = [number for span in spans for number in (span.first - 1, span.last)]
        assert in_order == sorted(in_order)
        assert in_order[1:-1:2] == in_order[2::2]  # nothing between two of them
        alone = last - sum(span.size for span in spans)
        assert 0 <= alone < SHORTEST
        most = max(most, len(spans) + alone + 1)  # the first operation lies alone too
    assert most < 100


def test_spans_of_any_run_are_aligned() -> None:
    assert list(spans_within(1, 31)) == []
    assert list(spans_within(2, 70)) == [Span(33, 64)]
    assert list(spans_within(200, 600)) == [
        Span(225, 256),
        Span(257, 512),
        *[Span(513, 544)],
        Span(545, 576),
    ]
    assert list(spans_within(1, 300)) == [Span(1, 256), Span(257, 288)]


def test_a_key_names_a_span() -> None:
    for span in (FIRST, Span(257, 512), Span(131_073, 262_144)):
        assert segment_span(segment_key(span)) == span


@pytest.mark.parametrize(
    "name",
    [
        "000000000001-000000000031.segment",
        "000000000002-000000000033.segment",
        "000000000033-000000000001.segment",
        "000000000001-999999999999.segment",
        "0000000000001-0000000000032.segment",
        "000000000001.json",
    ],
)
def test_other_names_are_no_segments(name: str) -> None:
    assert segment_span(f"operations/{name}") is None


def test_what_is_written_is_read() -> None:
    assert read(SEGMENT) == (list(range(1, 33)), None)
    head, packed = SEGMENT.split(b"\n", 1)
    assert json.loads(head) | {"digest": ""} == {
        **{"segment": 1, "digest": "", "algorithm": "blake3", "first": 1, "last": 32}
    }
    assert zlib.decompress(packed).splitlines()[31] == operation(32)


def test_every_flipped_bit_is_seen() -> None:
    for bit in range(0, 8 * len(SEGMENT), 3):
        flipped = bytearray(SEGMENT)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            assert read(bytes(flipped))[1] is not None, bit
        except SchemaError:  # its format, or the name of the algorithm
            assert bit // 8 < SEGMENT.index(b"\n")


def test_of_a_cut_segment_what_is_whole_is_read() -> None:
    numbers, fault = read(SEGMENT[: len(SEGMENT) - 60])
    assert fault is not None
    assert 0 < len(numbers) < 32
    assert numbers == list(range(1, len(numbers) + 1))
    for end in (0, 1, 100, SEGMENT.index(b"\n") + 1):
        assert read(SEGMENT[:end])[0] == []


def test_a_segment_under_another_name_is_refused() -> None:
    numbers, fault = read(SEGMENT, Span(33, 64))
    assert (numbers, fault is None) == ([], False)


def test_a_newer_format_is_refused_and_format_0_is_damage() -> None:
    with pytest.raises(SchemaError, match="update dcpstore"):
        list(read_segment(SEGMENT.replace(b'"segment": 1', b'"segment": 2', 1), FIRST))
    assert "format is 0" in str(read(SEGMENT.replace(b'"segment": 1', b'"segment": 0', 1))[1])


def test_what_compresses_too_well_is_stored_as_it_is() -> None:
    long = [operation(n, author="a" * 100_000) for n in range(1, 33)]
    data = encode_segment(FIRST, long)
    assert len(data) > 3_000_000
    assert [line for line, _ in read_segment(data, FIRST)] == long


def test_what_expands_too_much_is_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_segment, "_MOST_EXPANDED", 10_000)  # so that it is compressed
    data = encode_segment(FIRST, [operation(n, author="a" * 100_000) for n in range(1, 33)])
    monkeypatch.undo()
    assert "expands to more than 100 times" in str(read_fault(data))


def read_fault(data: bytes) -> CorruptionError:
    with pytest.raises(CorruptionError) as raised:
        list(read_segment(data, FIRST))
    return raised.value
