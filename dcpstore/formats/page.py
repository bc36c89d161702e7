"""Pages: stored objects with the contents of nodes, each written by the save that first had them.

A page holds entry sets with all their tensors, groups that name the page of each child, and runs:
16 chunks at a time of tensors that have more. All digests of nodes, runs and tensors are computed
again when it is read, so what another page names is either exactly what was meant, or not found.
The digest of a tensor that lies in the page whole is not even stored.

The bytes are a sealed JSON line, a compressed JSON header, and one column after another. Python's
standard library alone reads them: columns of digests and checksums are raw, and columns of integers
are little-endian 64-bit numbers, compressed by zlib. `references.py` in the data folder does so.
"""

from __future__ import annotations

import array
import itertools
import operator
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from dcpstore.core.digests import RUN, content_digest, run_digest
from dcpstore.errors import CorruptionError, SchemaError
from dcpstore.formats import json_fields
from dcpstore.formats.entry_tree import Child, EntrySet, Group, entry_set, group
from dcpstore.formats.json_fields import Natural, Naturals, PackKey, PageKey, Text
from dcpstore.formats.sealed import check_seal, seal
from dcpstore.geometry.grids import Grid
from dcpstore.records import EntryKind, NewChunk, NewEntry, NewTensor, StatePath

__all__ = [
    "Page",
    "PagedGroup",
    "PagedTensor",
    "PlacedChunk",
    "Run",
    "RunPlace",
    "decode_page",
    "encode_page",
    "page_key",
    "runs_of",
    "whole_tensor",
]

_FORMAT = 1
_DIGEST, _CHECKSUM = 32, 16  # bytes
_LARGEST = 2**63 - 1  # that a database takes
_LEVEL = 6  # of zlib: half the size of level 1, and far from the slowest step of a save
_MOST = 256  # raw bytes for each stored one, and a megabyte; a page says no more than that


class PlacedChunk(NamedTuple):
    """A chunk and its place, without its number in a tensor; the checksum as in `NewChunk`."""

    digest: bytes
    pack: str
    offset: int
    length: int
    checksum: bytes | None


class Run(NamedTuple):
    """Consecutive chunks of large tensors, whose codec and algorithm are the same."""

    digest: bytes
    codec: str
    algorithm: str
    chunks: Sequence[PlacedChunk]


class RunPlace(NamedTuple):
    """A run of a large tensor, and the page that holds it."""

    digest: bytes
    page: str


class PagedTensor(NamedTuple):
    """A tensor as its page holds it: with its chunks or, if it has more than `RUN`, its runs."""

    tensor: NewTensor
    runs: Sequence[RunPlace] = ()


class PagedGroup(NamedTuple):
    """A group or, on level 2, a root, with the page in which each child lies."""

    level: int
    group: Group
    pages: Sequence[str]


@dataclass(frozen=True, slots=True)
class Page:
    """What a page holds: nodes and runs by digest, tensors by hex digest; `key` is its own."""

    key: str
    sets: Mapping[bytes, EntrySet]
    groups: Mapping[bytes, PagedGroup]
    tensors: Mapping[str, PagedTensor]
    runs: Mapping[bytes, Run]


class _Layout(msgspec.Struct):
    """What tensors have in common; its "documents" are for others, one a part."""

    dtype: Text
    shape: Naturals
    codec: Text
    nbytes: Natural
    algorithm: Text
    parts: list[tuple[Naturals, Naturals, Naturals]]


class _Head(msgspec.Struct):
    """The line at the beginning: bytes of the header as it is stored, and raw."""

    header: Natural
    raw: Natural


class _Header(msgspec.Struct):
    format: Natural
    pages: list[PageKey]  # the first is this one
    packs: list[PackKey]
    layouts: list[_Layout]
    sets: list[list[tuple[Text, Any, EntryKind, Natural | None, Text | None]]]
    groups: list[tuple[Natural, list[Text]]]  # level, and the first FQN of each child
    runs: list[tuple[Text, Text, Natural]]  # of this page: codec, algorithm, number of chunks
    columns: dict[str, Natural]  # stored bytes, in this order


# Raw ones have the bytes of one element, those of integers None.
_COLUMNS = {
    "nodes": _DIGEST,  # of the sets, then of the groups
    "children": _DIGEST,  # of all groups, one after another
    "child_pages": None,
    "layouts": None,  # of each tensor
    "large": _DIGEST,  # the tensors with more than `RUN` chunks
    "named": _DIGEST,  # the runs of these, one tensor after another
    "named_pages": None,
    "runs": _DIGEST,  # of this page
    # Chunks: of each tensor with at most `RUN`, then of each run of this page.
    "digests": _DIGEST,
    "packs": None,
    "steps": None,  # from the end of the chunk before to the beginning of this one
    "lengths": None,
    "checked": None,  # 1 where the chunk has a checksum
    "checksums": _CHECKSUM,
}


def page_key(uid: str) -> str:
    """Return the key of the page that the save of this uid writes."""
    return f"pages/{uid}.page"


def encode_page(
    key: str,
    *,
    sets: Iterable[EntrySet],
    groups: Iterable[tuple[int, Group]],
    tensors: Mapping[str, NewTensor],
    elsewhere: Mapping[bytes, str],
    documents: Callable[[NewTensor], Sequence[str]],
    runs: Iterable[Run] = (),
) -> bytes:
    """Return a page.

    Args:
        key: of the page.
        sets: that it is to hold.
        groups: that it is to hold, with their levels.
        tensors: by digest, each with all its chunks in order of (part, ordinal): at least those
            that the sets name.
        elsewhere: the pages of the children and runs that other pages hold, by digest.
        documents: returns the Zarr document of the array of each part, without attributes.
        runs: more of this page, for tensors in other pages.
    """
    sets, groups = list(sets), list(groups)
    named = dict.fromkeys(e.tensor_digest for s in sets for e in s.entries if e.tensor_digest)
    held = [tensors[digest] for digest in named]
    number = {tensor.digest: i for i, tensor in enumerate(held)}
    pages = _Numbers([key])
    nodes = {one.digest for one in sets} | {one.digest for _, one in groups}
    children = [child.digest for _, one in groups for child in one.children]
    layouts: dict[tuple[object, ...], int] = {}
    texts: list[str] = []
    layout_of = []
    for tensor in held:
        cut = _cut(tensor)
        if cut not in layouts:
            layouts[cut] = len(layouts)
            texts.append(_encode_layout(tensor, documents(tensor)))
        layout_of.append(layouts[cut])
    large = {tensor.digest: runs_of(tensor) for tensor in held if _is_large(tensor)}
    refs = [run for listed in large.values() for run in listed]
    new = {run.digest: run for run in (*refs, *runs) if run.digest not in elsewhere}
    chunks = [PlacedChunk(*c[2:]) for t in held if t.digest not in large for c in t.chunks]
    chunks += itertools.chain.from_iterable(run.chunks for run in new.values())
    packs = _Numbers()
    pack_of = [packs[chunk.pack] for chunk in chunks]
    lengths = [chunk.length for chunk in chunks]
    ends = [0, *(chunk.offset + chunk.length for chunk in chunks)]
    checksums = [chunk.checksum for chunk in chunks]
    columns: dict[str, bytes] = {
        "nodes": b"".join([*(one.digest for one in sets), *(one.digest for _, one in groups)]),
        "children": b"".join(children),
        "child_pages": _packed([0 if d in nodes else pages[elsewhere[d]] for d in children]),
        "layouts": _packed(layout_of),
        "large": b"".join(map(bytes.fromhex, large)),
        "named": b"".join([run.digest for run in refs]),
        "named_pages": _packed(
            [0 if run.digest in new else pages[elsewhere[run.digest]] for run in refs]
        ),
        "runs": b"".join(new),
        "digests": b"".join([chunk.digest for chunk in chunks]),
        "packs": _packed(pack_of),
        "steps": _packed([c.offset - end for c, end in zip(chunks, ends, strict=False)]),
        "lengths": _packed(lengths),
        "checked": _packed([checksum is not None for checksum in checksums]),
        "checksums": b"".join(filter(None, checksums)),
    }
    sizes = {name: len(column) for name, column in columns.items()}
    own = [[run.codec, run.algorithm, len(run.chunks)] for run in new.values()]
    header = (
        f'{{"format":{_FORMAT},"pages":{json_fields.encode(list(pages))},'
        f'"packs":{json_fields.encode(list(packs))},"layouts":[{",".join(texts)}],'
        f'"sets":[{",".join([_encode_set(one, number) for one in sets])}],'
        f'"groups":[{",".join([_encode_group(level, one) for level, one in groups])}],'
        f'"runs":{json_fields.encode(own)},"columns":{json_fields.encode(sizes)}}}'
    ).encode()
    stored = _compressed(header)
    head = f'"header": {len(stored)}, "raw": {len(header)}}}\n'.encode()
    return seal("page", _FORMAT, [head, stored, *columns.values()])


def decode_page(data: bytes, key: str) -> Page:
    """Return what a page holds; `key` is that from which it was read.

    Raises:
        CorruptionError: it is damaged, is not a page, or is another one.
        SchemaError: a newer dcpstore wrote it.
    """
    version = check_seal(data, "page", what="page")
    try:
        end = data.index(b"\n") + 1
        head = msgspec.json.decode(memoryview(data)[:end], type=_Head)
        raw = _inflated(memoryview(data)[end : end + head.header], head.raw)
        found = json_fields.decoded(raw, _Format).format
        if found != version:  # the digest does not cover the number in the seal
            raise ValueError(f"its format is {version} at the beginning, and {found} in the header")
        if version > _FORMAT:
            raise SchemaError(
                f"a page has format {version}, newer than {_FORMAT}; update dcpstore."
            )
        header = json_fields.decoded(raw, _Header)
        if header.pages[:1] != [key]:
            raise ValueError(f"it is the page {header.pages[:1]}, not {key}")
        return _decode(header, memoryview(data)[end + head.header :])
    except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise CorruptionError(
            f"a page lacks a member or has an invalid one ({type(error).__name__}: {error}); "
            "restore it from a copy, or let 'dcpstore gc' write it from the catalog."
        ) from error


def runs_of(tensor: NewTensor) -> list[Run]:
    """Return the runs of a tensor with more than `RUN` chunks, all of which it has."""
    runs = []
    for begin in range(0, len(tensor.chunks), RUN):
        chunks = [PlacedChunk(*chunk[2:]) for chunk in tensor.chunks[begin : begin + RUN]]
        digests = [chunk.digest for chunk in chunks]
        digest = run_digest(tensor.codec, digests, algorithm=tensor.algorithm)
        runs.append(Run(digest, tensor.codec, tensor.algorithm, chunks))
    return runs


def whole_tensor(paged: PagedTensor, run_of: Callable[[RunPlace], Run]) -> NewTensor:
    """Return a tensor with all its chunks; `run_of` finds its runs.

    Raises:
        CorruptionError: the runs are not those of this tensor.
    """
    tensor = paged.tensor
    if not paged.runs:
        return tensor
    chunks = [chunk for place in paged.runs for chunk in run_of(place).chunks]
    digests = [chunk.digest for chunk in chunks]
    if len(chunks) != _count(tensor) or _digest_of(tensor, digests) != tensor.digest:
        raise CorruptionError(
            f"the tensor {tensor.digest} is not what its {len(paged.runs)} runs hold; restore the "
            "pages from a copy."
        )
    places = _cells(tensor.parts)
    return tensor._replace(
        chunks=[NewChunk(i, j, *chunk) for (i, j), chunk in zip(places, chunks, strict=True)]
    )


class _Format(msgspec.Struct):
    format: Natural


class _Numbers(dict[str, int]):
    """Numbers of keys, in the order in which they are first asked for."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        super().__init__((key, i) for i, key in enumerate(keys))

    def __missing__(self, key: str) -> int:
        self[key] = number = len(self)
        return number


def _cut(tensor: NewTensor) -> tuple[object, ...]:
    """Return what is stored once for all tensors that have it in common."""
    return tensor.dtype, tensor.shape, tensor.codec, tensor.nbytes, tensor.algorithm, tensor.parts


def _count(tensor: NewTensor) -> int:
    return sum(part.size for part in tensor.parts)


def _is_large(tensor: NewTensor) -> bool:
    """Tell whether a tensor is stored as runs."""
    count = _count(tensor)
    assert len(tensor.chunks) == count, f"{len(tensor.chunks)} chunks of {count}: {tensor.digest}"
    return count > RUN


def _encode_layout(tensor: NewTensor, documents: Sequence[str]) -> str:
    facts = {
        "dtype": tensor.dtype,
        "shape": tensor.shape,
        "codec": tensor.codec,
        "nbytes": tensor.nbytes,
        "algorithm": tensor.algorithm,
        "documents": documents,
    }
    return f'{json_fields.encode(facts)[:-1]},"parts":{json_fields.grids(tuple(tensor.parts))}}}'


def _encode_set(one: EntrySet, number: Mapping[str, int]) -> str:
    quoted, path = json_fields.quoted, json_fields.path
    lines = [
        f'[{quoted(fqn)},{path(keys)},"{kind}",{"null" if held is None else number[held]},'
        f"{'null' if value is None else quoted(value)}]"
        for fqn, keys, kind, held, value in one.entries
    ]
    return f"[{','.join(lines)}]"


def _encode_group(level: int, one: Group) -> str:
    return f"[{level},{json_fields.encode([child.first for child in one.children])}]"


def _packed(numbers: Iterable[int]) -> bytes:
    return zlib.compress(_little_endian(array.array("q", numbers)).tobytes(), _LEVEL)


def _little_endian(numbers: array.array[int]) -> array.array[int]:
    """Turn numbers of this machine into little-endian ones, or the other way round."""
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _compressed(header: bytes) -> bytes:
    stored = zlib.compress(header, _LEVEL)
    # What `_inflated` would refuse is stored as it is.
    return stored if len(header) <= _most(len(stored)) else zlib.compress(header, 0)


def _most(stored: int) -> int:
    """Return how many raw bytes so many stored ones may be: a hostile page cannot fill memory."""
    return _MOST * stored + (1 << 20)


def _inflated(stored: memoryview, size: int) -> bytes:
    """Return what was compressed, which must have this size."""
    if size > _most(len(stored)):
        raise ValueError(f"{len(stored)} bytes are said to be {size}")
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(stored, size + 1)  # no more than what is expected is made
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(raw) != size or not stream.eof or stream.unused_data:
        raise ValueError(f"{len(stored)} bytes are not {size} compressed ones")
    return raw


class _Columns:
    """The columns of a page, by name."""

    def __init__(self, sizes: Mapping[str, int], data: memoryview) -> None:
        if list(sizes) != list(_COLUMNS) or sum(sizes.values()) != len(data):
            raise ValueError(f"its columns are {sizes}, and {len(data)} bytes follow")
        ends = itertools.accumulate(sizes.values())
        self._data = {
            name: data[end - size : end]
            for (name, size), end in zip(sizes.items(), ends, strict=True)
        }

    def pieces(self, name: str) -> list[bytes]:
        """Return the elements of a column of digests or checksums."""
        size = _COLUMNS[name]
        assert size is not None
        data = bytes(self._data[name])
        if len(data) % size:
            raise ValueError(f"{name} has {len(data)} bytes")
        return [data[i : i + size] for i in range(0, len(data), size)]

    def numbers(self, name: str, count: int) -> list[int]:
        """Return a column of `count` integers."""
        assert _COLUMNS[name] is None
        return _little_endian(array.array("q", _inflated(self._data[name], 8 * count))).tolist()

    def indices(self, name: str, count: int, below: int) -> list[int]:
        """Return a column of `count` integers from 0 to `below` - 1."""
        found = self.numbers(name, count)
        if count and not (min(found) >= 0 and max(found) < below):
            raise ValueError(f"{name} has a number that is not from 0 to {below - 1}")
        return found


def _decode(header: _Header, data: memoryview) -> Page:
    columns = _Columns(header.columns, data)
    layouts = [_decode_layout(layout) for layout in header.layouts]
    wanted = max((e[3] + 1 for s in header.sets for e in s if e[3] is not None), default=0)
    laid = [layouts[i] for i in columns.indices("layouts", wanted, len(layouts))]
    large = [layout for layout in laid if layout.cells > RUN]
    named = _decode_named(header, columns, large)
    chunks = _decode_chunks(columns, header.packs)
    tensors = list(_decode_tensors(laid, columns.pieces("large"), iter(named), chunks))
    own = _decode_runs(header, columns, chunks)
    if next(chunks, None) is not None:
        raise ValueError("it has more chunks than its tensors")
    sets = [_decode_set(rows, tensors) for rows in header.sets]
    groups = list(_decode_groups(header, columns))
    page = Page(
        header.pages[0],
        {one.digest: one for one in sets},
        {one.group.digest: one for one in groups},
        {paged.tensor.digest: paged for paged in tensors},
        {run.digest: run for run in own},
    )
    counts = len(page.sets), len(page.groups), len(page.tensors), len(page.runs)
    if counts != (len(sets), len(groups), len(tensors), len(own)):
        raise ValueError("a node, a tensor or a run is listed twice")
    if lacking := {place.digest for place in named if place.page == page.key} - page.runs.keys():
        raise ValueError(f"it names its run {min(lacking).hex()}, and lacks it")
    if columns.pieces("nodes") != [*page.sets, *page.groups]:
        raise ValueError("it holds other nodes than it says")
    for group_ in groups:
        below = page.sets if group_.level == 1 else page.groups
        for child, key in zip(group_.group.children, group_.pages, strict=True):
            if key == page.key and child.digest not in below:
                raise ValueError(f"it names its node {child.digest.hex()}, and lacks it")
    return page


class _Laid(NamedTuple):
    """A layout as a tensor that lacks digest and chunks, and how many chunks it has."""

    tensor: NewTensor
    cells: int


def _decode_layout(stored: _Layout) -> _Laid:
    parts = tuple(json_fields.grid(part, stored.shape) for part in stored.parts)
    tensor = NewTensor(
        "", stored.dtype, stored.shape, stored.codec, stored.nbytes, parts, (), stored.algorithm
    )
    return _Laid(tensor, _count(tensor))


def _decode_named(header: _Header, columns: _Columns, large: Sequence[_Laid]) -> list[RunPlace]:
    """Return the runs of the large tensors, one tensor after another."""
    named = columns.pieces("named")
    if sum(-(-layout.cells // RUN) for layout in large) != len(named):
        raise ValueError(f"{len(named)} runs are not those of {len(large)} large tensors")
    pages = columns.indices("named_pages", len(named), len(header.pages))
    return [RunPlace(run, header.pages[i]) for run, i in zip(named, pages, strict=True)]


def _decode_runs(header: _Header, columns: _Columns, chunks: Iterator[PlacedChunk]) -> list[Run]:
    """Return the runs of the page."""
    runs = []
    for digest, (codec, algorithm, count) in zip(columns.pieces("runs"), header.runs, strict=True):
        held = list(itertools.islice(chunks, min(count, RUN)))
        found = run_digest(codec, [chunk.digest for chunk in held], algorithm=algorithm)
        if len(held) != count or found != digest:
            raise ValueError(f"the run {digest.hex()} has other chunks")
        runs.append(Run(digest, codec, algorithm, held))
    return runs


def _decode_chunks(columns: _Columns, packs: Sequence[str]) -> Iterator[PlacedChunk]:
    digests = columns.pieces("digests")
    count = len(digests)
    lengths = columns.numbers("lengths", count)
    steps = columns.numbers("steps", count)
    ends = list(itertools.accumulate(map(operator.add, steps, lengths)))
    offsets = list(map(operator.sub, ends, lengths))
    if count and (min(map(min, (lengths, offsets))) < 0 or max(ends) > _LARGEST):
        raise ValueError("a chunk has an offset or length that is negative or too large")
    checked = columns.indices("checked", count, 2)
    checksums = columns.pieces("checksums")
    if sum(checked) != len(checksums):
        raise ValueError(f"{len(checksums)} checksums for {sum(checked)} chunks")
    rest = iter(checksums)
    return map(
        PlacedChunk,
        digests,
        [packs[i] for i in columns.indices("packs", count, len(packs))],
        offsets,
        lengths,
        [next(rest) if has else None for has in checked],
    )


def _decode_tensors(
    laid: Sequence[_Laid],
    large: Sequence[bytes],
    runs: Iterator[RunPlace],
    chunks: Iterator[PlacedChunk],
) -> Iterator[PagedTensor]:
    if sum(layout.cells > RUN for layout in laid) != len(large):
        raise ValueError(f"{len(large)} digests are not those of its large tensors")
    digests = iter(large)
    for layout, count in laid:
        if count > RUN:
            named = tuple(itertools.islice(runs, -(-count // RUN)))
            yield PagedTensor(layout._replace(digest=next(digests).hex()), named)
            continue
        at = _few_cells(layout.parts)
        held = [NewChunk(i, j, *chunk) for (i, j), chunk in zip(at, chunks, strict=False)]
        if len(held) != count:
            raise ValueError(f"{len(held)} chunks for {count} cells")
        digest = _digest_of(layout, [chunk.digest for chunk in held])
        yield PagedTensor(layout._replace(digest=digest, chunks=held))


def _digest_of(tensor: NewTensor, digests: Sequence[bytes]) -> str:
    return content_digest(
        tensor.dtype, tensor.shape, tensor.parts, digests, algorithm=tensor.algorithm
    )


@lru_cache(4096)
def _few_cells(parts: tuple[Grid, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(_cells(parts))


def _cells(parts: Sequence[Grid]) -> Iterator[tuple[int, int]]:
    """Yield the part and ordinal of each cell."""
    return ((i, j) for i, part in enumerate(parts) for j in range(part.size))


def _decode_set(
    rows: Sequence[tuple[str, Any, EntryKind, int | None, str | None]],
    tensors: Sequence[PagedTensor],
) -> EntrySet:
    entries = []
    before = None
    for fqn, path, kind, held, value in rows:
        if (kind == "value") == (held is not None) or (kind == "value" and value is None):
            raise ValueError(f"{fqn!r} is a {kind!r} of tensor {held!r} and value {value!r}")
        if before is not None and before >= fqn:
            raise ValueError(f"{fqn!r} stands after {before!r}")
        before = fqn
        digest = None if held is None else tensors[held].tensor.digest
        entries.append(NewEntry(fqn, StatePath.parsed(path), kind, digest, value))
    return entry_set(entries)


def _decode_groups(header: _Header, columns: _Columns) -> Iterator[PagedGroup]:
    digests = columns.pieces("children")
    every = zip(
        digests, columns.indices("child_pages", len(digests), len(header.pages)), strict=True
    )
    for level, firsts in header.groups:
        below = [
            (Child(first, digest), page)
            for first, (digest, page) in zip(
                firsts, itertools.islice(every, len(firsts)), strict=True
            )
        ]
        if not below or level not in (1, 2) or any(a >= b for a, b in itertools.pairwise(firsts)):
            raise ValueError(f"a node of level {level} has the children {firsts!r:.200}")
        yield PagedGroup(
            level,
            group([child for child, _ in below]),
            tuple(header.pages[page] for _, page in below),
        )
    if next(every, None) is not None:
        raise ValueError("it has more children than its groups")
