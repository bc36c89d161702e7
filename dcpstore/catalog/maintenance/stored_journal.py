"""The journal as it lies in the data folder: single operations, and segments of many.

`compact` replaces single operations and small segments by larger segments, so that few objects lie
in the journal however many operations there are. Invariant: an object is deleted only when a
segment that holds the same operations is durable. So a process that is killed, or two that compact
at once, leave some operations twice, never none; the next compaction removes what is twice. The
first operation stays alone too, for it names the owner of the data folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from dcpstore.errors import CorruptionError, NotFoundError
from dcpstore.formats.journal_entry import (
    decode_operation,
    encode_operation,
    operation_key,
    operation_number,
)
from dcpstore.formats.journal_segment import (
    Span,
    encode_segment,
    read_segment,
    segment_key,
    segment_span,
    spans_within,
)
from dcpstore.storage.interface import Storage

__all__ = [
    "Listing",
    "StoredJournal",
    "compact",
    "first_intact",
    "list_journal",
    "read_journal",
]

_TRIES = 8  # times that the journal is listed while other processes compact it
_AT_ONCE = 8  # requests to the storage

# JSON of an operation, of every kind, hence `Any`.
Json = dict[str, Any]


class Listing(NamedTuple):
    """The objects of a journal by their names: single operations, and the spans of segments."""

    single: frozenset[int]
    spans: frozenset[Span]

    def inside(self, span: Span) -> tuple[list[int], list[Span]]:
        """Return the single operations in a span, and the smaller spans in it, small ones first."""
        smaller = [other for other in self.spans if other != span and span.holds(other)]
        return sorted(filter(span.__contains__, self.single)), sorted(smaller, key=_size)


@dataclass(frozen=True, slots=True)
class StoredJournal:
    """What was read of a journal.

    Attributes:
        operations: each intact operation by its number, once, wherever it lies.
        listing: the objects that there are.
        single_faults: what is wrong with single operations, by number.
        span_faults: what is wrong with segments, by span.
    """

    operations: dict[int, Json]
    listing: Listing
    single_faults: dict[int, str]
    span_faults: dict[Span, str]


def list_journal(storage: Storage) -> Listing:
    """Return the objects of a journal."""
    keys = list(storage.list("operations"))
    numbers = (operation_number(key) for key in keys)
    spans = map(segment_span, keys)
    return Listing(frozenset(filter(None, numbers)), frozenset(filter(None, spans)))


def read_journal(storage: Storage) -> StoredJournal:
    """Return every operation of a journal; another process may compact it meanwhile.

    Raises:
        SchemaError: a newer dcpstore wrote it.
    """
    operations: dict[int, Json] = {}
    span_faults: dict[Span, str] = {}
    read: set[Span] = set()
    before = None
    for _ in range(_TRIES):
        listing = list_journal(storage)
        single_faults: dict[int, str] = {}
        for number in sorted(listing.single - operations.keys()):
            try:
                operations[number] = _single(storage, number)[1]
            except NotFoundError:
                single_faults[number] = "it is missing"
            except CorruptionError as error:
                single_faults[number] = str(error)
        gone = [number for number, fault in single_faults.items() if fault == "it is missing"]
        for span in sorted(listing.spans - read, key=_size):
            try:
                for _, operation in read_segment(storage.get(segment_key(span)), span):
                    operations.setdefault(operation["operation"], operation)
            except NotFoundError:
                gone.append(span.first)
                continue
            except CorruptionError as error:
                span_faults[span] = str(error)
            read.add(span)
        # Nothing is missing; or it is in no segment either, for nothing was changed meanwhile.
        is_whole = not gone and len(operations) == max(operations, default=0)
        if is_whole or listing == before:
            break
        before = listing
    single_faults = {
        number: fault
        for number, fault in single_faults.items()
        if fault != "it is missing" or number not in operations
    }
    there = {span: fault for span, fault in span_faults.items() if span in listing.spans}
    return StoredJournal(operations, listing, single_faults, there)


def first_intact(storage: Storage, *, after: int) -> Json | None:
    """Return the intact operation with the smallest number above `after`, or None.

    Only as many objects are read as that takes.
    """
    listing = list_journal(storage)
    alone = [Span(number, number) for number in listing.single]
    best: Json | None = None
    for span in sorted([*alone, *listing.spans]):
        if best is not None and span.first > best["operation"]:
            break
        best = min(
            [best, _first_of(storage, span, after)],
            key=lambda one: one["operation"] if one is not None else float("inf"),
        )
    return best


def compact(storage: Storage, last: int, find: Callable[[Sequence[int]], Sequence[Json]]) -> None:
    """Put the operations up to `last` into as few segments as there may be.

    Another process may do the same: then this one stops where it misses what the other deleted.

    Args:
        storage: of the journal.
        last: the number of the last operation that is durable in the journal.
        find: returns operations by their numbers, for those of which no intact copy is stored.

    Raises:
        CorruptionError: an operation is stored nowhere, and `find` does not know it either.
        DcpstoreError: the storage failed.
    """
    listing = list_journal(storage)
    try:
        for span in spans_within(1, last):
            single, smaller = listing.inside(span)
            is_there = span in listing.spans
            doubled = [operation_key(n) for n in single if n > 1] + [*map(segment_key, smaller)]
            is_held = any(other != span and other.holds(span) for other in listing.spans)
            if is_held or (is_there and not doubled):
                continue
            if not (is_there and _is_sound(storage, span)):
                held = [*smaller, span] if is_there else smaller
                lines = _gathered(storage, span, single, held, find)
                storage.put(segment_key(span), encode_segment(span, lines))
            with ThreadPoolExecutor(_AT_ONCE, "dcpstore-journal") as pool:
                list(pool.map(storage.delete, doubled))
    except NotFoundError:  # deleted by another process that compacts
        return


def _gathered(
    storage: Storage,
    span: Span,
    single: Sequence[int],
    held: Sequence[Span],
    find: Callable[[Sequence[int]], Sequence[Json]],
) -> list[bytes]:
    """Return the operations of a span, each as it is stored alone, from wherever one is intact."""
    lines: dict[int, bytes] = {}
    with ThreadPoolExecutor(_AT_ONCE, "dcpstore-journal") as pool:
        found = pool.map(lambda number: _single_or_none(storage, number), single)
        lines |= {number: line for number, line in zip(single, found, strict=True) if line}
    for other in held:
        try:
            for line, operation in read_segment(storage.get(segment_key(other)), other):
                lines.setdefault(operation["operation"], line)
        except CorruptionError:
            continue  # what was intact in it has been taken
    missing = [n for n in range(span.first, span.last + 1) if n not in lines]
    if missing:
        lines |= {one["operation"]: encode_operation(one) for one in find(missing)}
    if lacking := [number for number in missing if number not in lines]:
        raise CorruptionError(
            f"operation {lacking[0]} is neither in the journal nor in the catalog; run 'dcpstore "
            "verify --deep'."
        )
    return [lines[number] for number in range(span.first, span.last + 1)]


def _first_of(storage: Storage, span: Span, after: int) -> Json | None:
    """Return the first intact operation above `after` of one object of the journal, or None."""
    try:
        if span.size == 1:
            operation = _single(storage, span.first)[1]
            return operation if span.first > after else None
        for _, operation in read_segment(storage.get(segment_key(span)), span):
            if operation["operation"] > after:
                return operation
    except (NotFoundError, CorruptionError):
        return None
    return None


def _single(storage: Storage, number: int) -> tuple[bytes, Json]:
    """Return a single operation on one line, and decoded."""
    data = storage.get(operation_key(number))
    operation = decode_operation(data)
    if operation["operation"] != number:
        raise CorruptionError(f"it holds operation {operation['operation']}")
    return data if b"\n" not in data else encode_operation(operation), operation


def _single_or_none(storage: Storage, number: int) -> bytes | None:
    try:
        return _single(storage, number)[0]
    except CorruptionError:
        return None


def _is_sound(storage: Storage, span: Span) -> bool:
    try:
        for _ in read_segment(storage.get(segment_key(span)), span):
            pass
    except CorruptionError:
        return False
    return True


def _size(span: Span) -> tuple[int, int]:
    return span.size, span.first
