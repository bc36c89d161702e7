"""Segments of the journal: many operations in one object, "operations/<first>-<last>.segment".

A segment begins with a line of JSON that has a digest over the rest. What follows is compressed by
zlib: the operations of a span, one a line, each as it is stored alone, with a digest of its own. So
what is still whole in a damaged segment can be read.

Spans are aligned: they have 32 operations, or 8 times as many up to 131,072, and begin after a
multiple of their size. `spans_within(1, n)` has at most 7 spans of each size but the largest. So
up to five million operations are at most 28 + 38 segments, and fewer than 32 operations that stay
alone.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dcpstore.errors import CorruptionError, SchemaError
from dcpstore.formats.journal_entry import decode_operation
from dcpstore.formats.sealed import check_seal, seal

__all__ = [
    "SHORTEST",
    "Span",
    "encode_segment",
    "read_segment",
    "segment_key",
    "segment_span",
    "spans_within",
]

_FORMAT = 1
SHORTEST = 32  # operations of the smallest segment
_SIZES = [SHORTEST * 8**level for level in range(5)]
_KEY_PATTERN = re.compile(r"operations/([0-9]{12,18})-([0-9]{12,18})\.segment")
# A reader expands a segment to at most so many times its length, so that a stranger's file cannot
# fill the memory. What compresses better is stored as it is.
_MOST_EXPANDED = 100
_STEP = 1 << 20  # bytes that are expanded at a time

# JSON of an operation, as `decode_operation` returns it, hence `Any`.
Json = dict[str, Any]


class Span(NamedTuple):
    """Consecutive operations, `first` and `last` both included."""

    first: int
    last: int

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and self.first <= number <= self.last

    @property
    def size(self) -> int:
        """The number of operations."""
        return self.last - self.first + 1

    def holds(self, other: Span) -> bool:
        """Tell whether every operation of another span is in this one."""
        return self.first <= other.first and other.last <= self.last


def segment_key(span: Span) -> str:
    """Return the key of the segment of a span."""
    return f"operations/{span.first:012}-{span.last:012}.segment"


def segment_span(key: str) -> Span | None:
    """Return the span of the segment that lies under `key`, or None if it is not a segment."""
    match = _KEY_PATTERN.fullmatch(key)
    if match is None:
        return None
    span = Span(int(match[1]), int(match[2]))
    is_span = span.size in _SIZES and (span.first - 1) % span.size == 0
    return span if is_span and segment_key(span) == key else None


def spans_within(first: int, last: int) -> Iterator[Span]:
    """Yield the largest spans of segments that lie within two numbers, in order."""
    at = first
    while at + SHORTEST - 1 <= last:
        sizes = [n for n in _SIZES if (at - 1) % n == 0 and at + n - 1 <= last]
        if sizes:
            yield Span(at, at + sizes[-1] - 1)
            at += sizes[-1]
        else:
            at += SHORTEST - (at - 1) % SHORTEST


def encode_segment(span: Span, operations: Sequence[bytes]) -> bytes:
    """Return a segment.

    Args:
        span: of the operations.
        operations: each as it is stored alone, without a line break in it.
    """
    assert len(operations) == span.size
    nbytes = sum(map(len, operations)) + len(operations)
    packed = _compressed(operations, zlib.Z_DEFAULT_COMPRESSION)
    if nbytes > _MOST_EXPANDED * len(packed):
        packed = _compressed(operations, zlib.Z_NO_COMPRESSION)
    head = f'"first": {span.first}, "last": {span.last}}}\n'.encode()
    return seal("segment", _FORMAT, [head, packed])


def read_segment(data: bytes, span: Span) -> Iterator[tuple[bytes, Json]]:
    """Yield each intact operation of a segment, as it is stored alone and decoded, in order.

    Raises:
        CorruptionError: after the last one, if the segment is not whole.
        SchemaError: a newer dcpstore wrote it.
    """
    fault = None
    try:
        version = check_seal(data, "segment", what="segment of the journal")
        if version < 1:
            raise CorruptionError(f"the segment is damaged: its format is {version}")
        if version > _FORMAT:
            raise SchemaError(
                f"a segment of the journal has format {version}, newer than {_FORMAT}; update "
                "dcpstore."
            )
    except CorruptionError as error:
        fault = str(error)
    count, before = 0, span.first - 1
    lines = _lines(data[data.find(b"\n") + 1 :])
    try:
        for line in lines:
            try:
                operation = decode_operation(line)
            except CorruptionError as error:
                fault = fault or f"the operation after {before}: {error}"
                continue
            number = operation["operation"]
            if number not in span or number <= before:
                fault = fault or f"operation {number} lies after {before}"
                continue
            count, before = count + 1, number
            yield line, operation
    except (zlib.error, EOFError) as error:
        fault = fault or f"it cannot be expanded: {error}"
    if fault is None and count != span.size:
        fault = f"it has {count} operations of {span.size}"
    if fault is not None:
        raise CorruptionError(fault)


def _compressed(operations: Sequence[bytes], level: int) -> bytes:
    compressor = zlib.compressobj(level)
    pieces = [compressor.compress(line + b"\n") for line in operations]
    return b"".join([*pieces, compressor.flush()])


def _lines(packed: bytes) -> Iterator[bytes]:
    """Yield the lines of compressed text.

    Raises:
        zlib.error, EOFError: it is not compressed text, has no end, or expands to too much.
    """
    expander = zlib.decompressobj()
    room = _MOST_EXPANDED * len(packed)
    begun: list[bytes] = []
    rest = packed
    while not expander.eof:
        text = expander.decompress(rest, _STEP)
        rest = expander.unconsumed_tail
        room -= len(text)
        if room < 0:
            raise EOFError(f"it expands to more than {_MOST_EXPANDED} times its length")
        if not text and not rest and not expander.eof:
            raise EOFError("it ends early")
        *ended, last = text.split(b"\n")
        if ended:
            yield b"".join([*begun, ended[0]])
            yield from ended[1:]
            begun = []
        begun.append(last)
