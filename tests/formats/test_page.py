"""Pages: nodes come back with their tensors, and damage is seen; the standard library reads."""

from __future__ import annotations

import array
import itertools
import json
import sys
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpstore.core.digests import RUN, chunk_digest, content_digest, run_digest
from dcpstore.errors import CorruptionError, SchemaError
from dcpstore.formats.entry_tree import EntryTree, grow
from dcpstore.formats.page import Page, RunPlace, decode_page, encode_page, page_key, whole_tensor
from dcpstore.geometry.grids import Grid
from dcpstore.records import NewChunk, NewEntry, NewTensor, StatePath

KEY = page_key("ab12")
SPLIT = (Grid((0, 0), (3, 2), (2, 2)), Grid((3, 0), (1, 2), (1, 1)))


def tensor(
    seed: int, shape: tuple[int, ...], parts: tuple[Grid, ...], *, codec: str = "none"
) -> NewTensor:
    """Return a tensor whose chunks lie in two packs, one without a checksum."""
    cells = [(i, j) for i, part in enumerate(parts) for j in range(part.size)]
    chunks = [
        NewChunk(
            part,
            ordinal,
            chunk_digest(bytes([seed, n])),
            f"packs/{seed:02x}/{n % 2}-0.pack",
            100 * n,
            90 + n,
            None if n == 1 else bytes([n]) * 16,
        )
        for n, (part, ordinal) in enumerate(cells)
    ]
    digest = content_digest("float32", shape, parts, [chunk.digest for chunk in chunks])
    return NewTensor(digest, "float32", shape, codec, 4, parts, chunks)


def regular(seed: int, chunks: int) -> NewTensor:
    return tensor(seed, (chunks,), (Grid((0,), (chunks,), (1,)),))


TENSORS = [
    tensor(1, (4, 2), SPLIT, codec="zstd"),
    tensor(2, (), (Grid((), (), ()),)),
    tensor(3, (0,), (Grid((0,), (0,), (1,)),)),
    regular(4, RUN),
    regular(5, RUN + 1),
    regular(6, 5 * RUN),
]


def entries(tensors: Iterable[NewTensor] = TENSORS) -> list[NewEntry]:
    held = [NewEntry(f"w{i}", (f"w{i}",), "tensor", t.digest) for i, t in enumerate(tensors)]
    return [
        *held,
        NewEntry("tied", StatePath(("tied", 3), "..v."), "tensor", held[0].tensor_digest),
        NewEntry("blob", ("b", "\ud800", 7), "blob", held[1].tensor_digest, '{"$blob":"json"}'),
        NewEntry("lr", ("lr",), "value", None, "0.001"),
        NewEntry("ä", ("ä",), "value", None, '"\u00fc"'),
    ]


TREE = grow(entries())


def encode(
    tree: EntryTree = TREE,
    tensors: Iterable[NewTensor] = TENSORS,
    elsewhere: Mapping[bytes, str] | None = None,
) -> bytes:
    """Return the page of the nodes that are not elsewhere."""
    elsewhere = elsewhere or {}
    groups = [*((1, one) for one in tree.groups), (2, tree.root)]
    return encode_page(
        KEY,
        sets=[one for one in tree.sets if one.digest not in elsewhere],
        groups=[(level, one) for level, one in groups if one.digest not in elsewhere],
        tensors={tensor.digest: tensor for tensor in tensors},
        elsewhere=elsewhere,
        documents=lambda tensor: [f"part {i}" for i, _ in enumerate(tensor.parts)],
    )


def whole(page: Page, *others: Page) -> dict[str, NewTensor]:
    runs = {one.key: one.runs for one in (page, *others)}
    return {
        digest: whole_tensor(paged, lambda run: runs[run.page][run.digest])
        for digest, paged in page.tensors.items()
    }


def opened(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the header and the columns of a page, read by the standard library alone."""
    line, _, rest = data.partition(b"\n")
    head = json.loads(line)
    header = json.loads(zlib.decompress(rest[: head["header"]]))
    rest = rest[head["header"] :]
    columns: dict[str, Any] = {}
    for name, size in header["columns"].items():
        column, rest = rest[:size], rest[size:]
        if name in RAW:
            columns[name] = [column[i : i + RAW[name]] for i in range(0, size, RAW[name])]
            continue
        numbers = array.array("q", zlib.decompress(column))
        if sys.byteorder == "big":
            numbers.byteswap()
        columns[name] = numbers.tolist()
    assert not rest
    return header, columns


RAW = {
    "nodes": 32,
    "children": 32,
    "large": 32,
    "named": 32,
    "runs": 32,
    "digests": 32,
    "checksums": 16,
}


def made(header: dict[str, Any], columns: Mapping[str, Any], version: int = 1) -> bytes:
    """Return a page of any content, with a digest that is right."""
    data = {
        name: b"".join(column)
        if name in RAW
        else zlib.compress(b"".join(n.to_bytes(8, "little", signed=True) for n in column))
        for name, column in columns.items()
    }
    sizes = {name: len(column) for name, column in data.items()}
    raw = json.dumps({**header, "columns": sizes}).encode()
    stored = zlib.compress(raw)
    body = b"".join(
        [f'"header": {len(stored)}, "raw": {len(raw)}}}\n'.encode(), stored, *data.values()]
    )
    digest = blake3(b"{" + body).hexdigest()
    return f'{{"page": {version}, "digest": "{digest}", '.encode() + body


def test_everything_comes_back() -> None:
    page = decode_page(encode(), KEY)
    assert page.key == KEY == "pages/ab12.page"
    assert list(page.sets.values()) == list(TREE.sets)
    assert [e.path for s in page.sets.values() for e in s.entries] == [
        e.path for s in TREE.sets for e in s.entries
    ]
    marks = [getattr(e.path, "marks", "") for s in page.sets.values() for e in s.entries]
    assert "..v." in marks
    groups = [(one.level, one.group, one.pages) for one in page.groups.values()]
    assert groups == [(1, TREE.groups[0], (KEY,)), (2, TREE.root, (KEY,))]
    assert whole(page) == {tensor.digest: tensor for tensor in TENSORS}


def test_large_tensors_have_runs_that_other_pages_may_hold() -> None:
    before = decode_page(encode(), KEY)
    assert [len(one.chunks) for one in before.runs.values()] == [RUN, 1, *[RUN] * 5]
    changed = TENSORS[5].chunks[40]._replace(digest=bytes(32), pack="packs/ff/0-0.pack")
    chunks = [*TENSORS[5].chunks[:40], changed, *TENSORS[5].chunks[41:]]
    cells = TENSORS[5].parts
    digest = content_digest("float32", TENSORS[5].shape, cells, [c.digest for c in chunks])
    after = [*TENSORS[:5], TENSORS[5]._replace(digest=digest, chunks=chunks)]
    other = page_key("cd")
    data = encode(grow(entries(after)), after, dict.fromkeys(before.runs, other))
    page = decode_page(data, KEY)
    own = run_digest("none", [c.digest for c in chunks[32:48]])
    assert list(page.runs) == [own]
    assert page.tensors[digest].runs[2] == RunPlace(own, KEY)
    assert {run.page for run in page.tensors[digest].runs} == {KEY, other}
    own_first = next(iter(before.runs))
    there = Page(other, {}, {}, {}, before.runs)
    assert whole(page, there)[digest] == after[5]
    wrong = Page(other, {}, {}, {}, dict.fromkeys(before.runs, before.runs[own_first]))
    with pytest.raises(CorruptionError, match="is not what its 2 runs hold"):
        whole(page, wrong)


def test_a_page_holds_runs_of_tensors_in_other_pages() -> None:
    before = decode_page(encode(), KEY)
    data = encode_page(
        KEY,
        sets=[],
        groups=[],
        tensors={},
        elsewhere={},
        documents=lambda _: [],
        runs=before.runs.values(),
    )
    assert decode_page(data, KEY) == Page(KEY, {}, {}, {}, before.runs)


def test_equal_runs_are_held_once() -> None:
    chunks = TENSORS[3].chunks
    twice = [chunk._replace(ordinal=i) for i, chunk in enumerate([*chunks, *chunks])]
    parts = (Grid((0,), (2 * RUN,), (1,)),)
    digest = content_digest("float32", (2 * RUN,), parts, [c.digest for c in twice])
    double = NewTensor(digest, "float32", (2 * RUN,), "none", 4, parts, twice)
    page = decode_page(encode(grow([NewEntry("w", ("w",), "tensor", digest)]), [double]), KEY)
    assert len(page.runs) == 1
    assert whole(page) == {digest: double}


def test_nodes_of_other_pages_are_named() -> None:
    tree = grow([NewEntry(f"{i:04}", (f"{i:04}",), "value", None, "1") for i in range(1000)])
    other = page_key("cd")
    elsewhere = dict.fromkeys((one.digest for one in tree.sets[1:]), other)
    page = decode_page(encode(tree, (), elsewhere), KEY)
    assert list(page.sets.values()) == [tree.sets[0]]
    group = page.groups[tree.groups[0].digest]
    assert list(group.pages) == [KEY, *[other] * (len(tree.sets) - 1)]
    assert group.group == tree.groups[0]


def test_a_tensor_that_lost_chunks_is_not_written() -> None:
    lost = [TENSORS[0]._replace(chunks=TENSORS[0].chunks[1:]), *TENSORS[1:]]
    with pytest.raises(AssertionError, match="3 chunks of 4: "):
        encode(tensors=lost)


def test_five_thousand_tensors_take_less_than_80_bytes_each() -> None:
    tensors, listed = {}, []
    for i in range(5000):
        digest = chunk_digest(i.to_bytes(4, "little"))
        chunk = NewChunk(0, 0, digest, f"packs/ab12/{i % 8}-0.pack", 4096 * i, 4096, digest[:16])
        grid = (Grid((0, 0), (32, 32), (32, 32)),)
        whole_digest = content_digest("float32", (32, 32), grid, [digest])
        tensors[whole_digest] = NewTensor(
            whole_digest, "float32", (32, 32), "none", 4096, grid, [chunk]
        )
        path = (
            "optim",
            "state",
            f"layers.{i // 2:04}.mlp.weight",
            ("exp_avg", "exp_avg_sq")[i % 2],
        )
        listed.append(NewEntry(".".join(path), path, "tensor", whole_digest))
    assert len(encode(grow(listed), tensors.values())) < 5000 * 80


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_every_flipped_bit_and_every_cut_is_seen(data: st.DataObject) -> None:
    raw = bytearray(encode())
    if data.draw(st.booleans()):
        bit = data.draw(st.integers(0, 8 * len(raw) - 1))
        raw[bit // 8] ^= 1 << bit % 8
    else:
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    with pytest.raises(CorruptionError):
        decode_page(bytes(raw), KEY)


def test_the_standard_library_reads_it_and_every_flipped_bit_of_a_small_one_is_seen() -> None:
    data = encode(grow(entries(TENSORS[:2])[2:]), TENSORS[:2])
    header, columns = opened(data)
    assert [layout["documents"] for layout in header["layouts"]] == [
        ["part 0"],
        ["part 0", "part 1"],
    ]
    decode_page(made(header, columns), KEY)
    for bit in range(8 * len(data)):
        raw = bytearray(data)
        raw[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptionError):
            decode_page(bytes(raw), KEY)


def test_a_page_that_lacks_its_own_node_is_corruption() -> None:
    data = encode(elsewhere={TREE.sets[0].digest: KEY})
    with pytest.raises(CorruptionError, match="and lacks it"):
        decode_page(data, KEY)


def test_another_page_is_not_taken_for_this_one() -> None:
    with pytest.raises(CorruptionError, match=r"not pages/cd\.page"):
        decode_page(encode(), "pages/cd.page")


def test_a_newer_format_says_update() -> None:
    header, columns = opened(encode())
    with pytest.raises(SchemaError, match="update dcpstore"):
        decode_page(made({**header, "format": 2}, columns, 2), KEY)
    with pytest.raises(CorruptionError, match="format is 2 at the beginning, and 1 in the header"):
        decode_page(made(header, columns, 2), KEY)


@pytest.mark.parametrize(
    ("member", "value", "message"),
    [
        ("runs", [["zstd", "blake3", RUN]] * 7, "has other chunks"),
        ("runs", [["none", "blake3", 2**62]] * 7, "has other chunks"),
        ("pages", [KEY, "pages/../x"], "regex"),
        ("packs", ["packs/../catalog.db"], "regex"),
        ("layouts", [], "from 0 to -1"),
        ("sets", [[["a", ["a"], "tensor", 2**62, None]]], "are said to be"),
        ("groups", [], "more children"),
        ("groups", [[3, ["b"]], [2, ["b"]]], "of level 3"),
        ("groups", [[1, ["b"]], [2, []]], "of level 2"),
    ],
)
def test_a_page_with_a_wrong_member_is_corruption(member: str, value: Any, message: str) -> None:
    header, columns = opened(encode())
    with pytest.raises(CorruptionError, match=message):
        decode_page(made({**header, member: value}, columns), KEY)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["b", ["b"], "value", None, "1"], ["a", ["a"], "value", None, "1"]], "stands after 'b'"),
        ([["a", ["a"], "value", None, "1"], ["a", ["a"], "value", None, "1"]], "stands after 'a'"),
        ([["a", ["a"], "value", None, None]], "is a 'value' of tensor None and value None"),
        ([["a", ["a"], "tensor", None, None]], "is a 'tensor' of tensor None"),
        ([["a", "a", "value", None, "1"]], "names and numbers"),
        ([["a", ["a"], "other", None, "1"]], "Invalid enum value 'other'"),
        ([["a\0", ["a"], "value", None, "1"]], "regex"),
    ],
)
def test_a_set_with_a_wrong_entry_is_corruption(rows: object, message: str) -> None:
    header, columns = opened(encode(grow([NewEntry("a", ("a",), "value", None, "1")]), ()))
    with pytest.raises(CorruptionError, match=message):
        decode_page(made({**header, "sets": [rows]}, columns), KEY)


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("nodes", lambda them: [bytes(32), *them[1:]], "other nodes"),
        ("nodes", lambda them: them[1:], "other nodes"),
        ("children", lambda them: [bytes(32), *them[1:]], "other nodes"),
        ("children", lambda them: them[1:], "has an invalid one"),
        ("child_pages", lambda them: [1, *them[1:]], "from 0 to 0"),
        ("layouts", lambda them: [-1, *them[1:]], "from 0 to"),
        ("large", lambda them: them[1:], "1 digests are not those"),
        ("named", lambda them: them[1:], "6 runs are not those"),
        ("named", lambda them: [bytes(32), *them[1:]], "names its run 00"),
        ("named_pages", lambda them: [1, *them[1:]], "from 0 to 0"),
        ("runs", lambda them: them[1:], "has an invalid one"),
        ("runs", lambda them: [bytes(32), *them[1:]], "has other chunks"),
        ("digests", lambda them: them[:-1], "has an invalid one"),
        ("digests", lambda them: [*them, them[0]], "has an invalid one"),
        ("steps", lambda them: [-1, *them[1:]], "negative"),
        ("lengths", lambda them: [2**63 - 1, *them[1:]], "negative"),
        ("packs", lambda them: [2**40, *them[1:]], "from 0 to"),
        ("checked", lambda them: [2, *them[1:]], "from 0 to 1"),
        ("checksums", lambda them: them[1:], "checksums for"),
    ],
)
def test_a_page_with_a_wrong_column_is_corruption(column: str, change: Any, message: str) -> None:
    header, columns = opened(encode())
    with pytest.raises(CorruptionError, match=message):
        decode_page(made(header, {**columns, column: change(columns[column])}), KEY)


def test_claims_of_exabytes_take_no_memory() -> None:
    header, columns = opened(encode())
    giant = {**header["layouts"][0], "shape": [10**18], "parts": [[[0], [10**18], [1]]]}
    with pytest.raises(CorruptionError, match="are not those"):
        decode_page(made({**header, "layouts": [giant] * len(header["layouts"])}, columns), KEY)
    bomb = zlib.compress(bytes(1 << 26), 9)
    body = b'"header": %d, "raw": %d}\n' % (len(bomb), 1 << 26) + bomb
    data = b'{"page": 1, "digest": "%s", ' % blake3(b"{" + body).hexdigest().encode() + body
    with pytest.raises(CorruptionError, match="are said to be"):
        decode_page(data, KEY)


def test_what_zlib_shrinks_too_well_is_stored_as_it_is() -> None:
    value = json.dumps("x" * (1 << 22))
    tree = grow([NewEntry("lr", ("lr",), "value", None, value)])
    assert next(iter(decode_page(encode(tree, ()), KEY).sets.values())) == tree.sets[0]


def test_levels_are_named() -> None:
    header, _ = opened(encode())
    assert list(itertools.chain(*header["groups"])) == [1, ["blob"], 2, ["blob"]]
