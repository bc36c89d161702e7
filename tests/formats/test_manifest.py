"""Manifests: everything comes back, every flipped bit is seen, and large ones are cheap."""

import dataclasses
import json
import math
from datetime import UTC, datetime

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpstore.errors import CorruptionError, SchemaError
from dcpstore.formats.manifest import Manifest, decode_manifest, encode_manifest, manifest_key
from dcpstore.geometry.boxes import Box
from dcpstore.geometry.grids import Grid
from dcpstore.records import (
    NewChunk,
    NewEntry,
    NewTensor,
    PackRecord,
    PlanRecord,
    ShardRecord,
    VersionContent,
    VersionDraft,
)

SPLIT = (Grid((0, 0), (3, 2), (2, 2)), Grid((3, 0), (1, 2), (1, 1)))
SCALAR = (Grid((), (), ()),)
EMPTY = (Grid((0,), (0,), (1,)),)


def tensor(digest: str, shape: tuple[int, ...], parts: tuple[Grid, ...], pack: str) -> NewTensor:
    cells = [(i, j) for i, part in enumerate(parts) for j in range(math.prod(part.counts))]
    chunks = [
        NewChunk(part, ordinal, bytes([n]) * 32, pack, n * 10, 10)
        for n, (part, ordinal) in enumerate(cells)
    ]
    return NewTensor(digest, "bfloat16", shape, "blosc", 2 * math.prod(shape), parts, chunks)


TENSORS = [
    tensor("aa", (4, 2), SPLIT, "packs/ab12/0-0.pack"),
    tensor("bb", (), SCALAR, "packs/old/3-1.pack"),
    tensor("cc", (0,), EMPTY, ""),
]
DRAFT = VersionDraft(
    uid="ab12",
    branch="main",
    step=1000,
    message='nach dem "Aufwärmen"\n\x1b',
    tags=("best",),
    metrics={"val_loss": 2.31, "lr": 0.1 + 0.2, "nan": math.inf},
    labels={"lr": "3e-4"},
    author="ada",
    host="node-1",
    ranks=2,
    parent=7,
)
CONTENT = VersionContent(
    entries=[
        NewEntry("model.ä", ("model", "a\ud800"), "tensor", "aa"),
        NewEntry("model.tied", ("model", 0), "tensor", "aa"),
        NewEntry("optim.step", ("optim", "step"), "tensor", "bb"),
        NewEntry("empty", ("empty",), "tensor", "cc"),
        NewEntry("lr", ("lr",), "value", None, "0.001"),
    ],
    tensors=TENSORS,
    packs=[PackRecord("packs/ab12/0-0.pack", 40)],
    plan=PlanRecord("dd", 2, [ShardRecord("model.a", 1, Box((3, 0), (1, 2)))]),
    nbytes=18,
    nbytes_written=40,
    nbytes_reused=2,
    seconds={"write": 0.25},
    created_at=datetime(2026, 11, 24, 12, 30, 0, 5, UTC),
)


def encode(draft: VersionDraft = DRAFT, content: VersionContent = CONTENT) -> bytes:
    return encode_manifest(
        draft,
        content,
        data_url="/data",
        documents={"zarr.json": "{}"},
        references=[("model.a/c/0/0", NewChunk(0, 0, b"", "packs/ab12/0-0.pack", 0, 10))],
    )


def test_everything_comes_back() -> None:
    assert decode_manifest(encode()) == Manifest(DRAFT, CONTENT, "/data")
    assert manifest_key("ab12") == "manifests/ab12.json"


def test_a_tensor_that_lost_chunks_is_refused() -> None:
    lost = [TENSORS[0]._replace(chunks=TENSORS[0].chunks[1:]), *TENSORS[1:]]
    with pytest.raises(AssertionError, match="chunks of aa"):
        encode(content=dataclasses.replace(CONTENT, tensors=lost))


def test_it_is_a_kerchunk_reference_file() -> None:
    body = json.loads(encode())
    assert body["version"] == 1
    assert body["templates"] == {"data": "/data"}
    assert body["refs"] == {
        "zarr.json": "{}",
        "model.a/c/0/0": ["{{data}}/packs/ab12/0-0.pack", 0, 10],
    }


@settings(deadline=None)
@given(st.data())
def test_every_flipped_bit_and_every_cut_is_seen(data: st.DataObject) -> None:
    raw = bytearray(encode())
    if data.draw(st.booleans()):
        bit = data.draw(st.integers(0, 8 * len(raw) - 1))
        raw[bit // 8] ^= 1 << bit % 8
    else:
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    with pytest.raises(CorruptionError):
        decode_manifest(bytes(raw))


def signed(body: object) -> bytes:
    text = json.dumps(body)
    digest = blake3(text.encode()).hexdigest()
    return f'{{"version": 1, "digest": "{digest}", {text[1:]}'.encode()


def unsigned() -> dict:
    body = json.loads(encode())
    return {key: body[key] for key in ("templates", "refs", "dcpstore")}


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("tensors", None),
        ("tensors", [{}]),
        ("packs", []),
        ("created_at", "yesterday"),
        ("entries", [["a"]]),
        ("metrics", {"x": "much"}),
        ("plan", []),
        ("format", None),
    ],
)
def test_a_whole_file_with_wrong_content_is_corruption(member: str, value: object) -> None:
    body = unsigned()
    body["dcpstore"][member] = value
    with pytest.raises(CorruptionError, match="lacks a member or has an invalid one"):
        decode_manifest(signed(body))


def test_grids_without_end_are_not_counted_through() -> None:
    body = unsigned()
    body["dcpstore"]["tensors"][0] |= {"shape": [10**18], "parts": [[[0], [10**18], [1]]]}
    with pytest.raises(CorruptionError, match="4 chunks for 1000000000000000000 cells"):
        decode_manifest(signed(body))
    body["dcpstore"]["tensors"][0]["parts"] = [[[0], [1], [0]]]
    with pytest.raises(CorruptionError):
        decode_manifest(signed(body))


def test_a_newer_format_says_update() -> None:
    body = unsigned()
    body["dcpstore"]["format"] = 2
    with pytest.raises(SchemaError, match="update dcpstore"):
        decode_manifest(signed(body))
