"""Manifests of format 1: everything comes back, and every flipped bit is seen."""

import json
import math
from datetime import UTC, datetime

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpstore.errors import CorruptionError, SchemaError
from dcpstore.formats.first_manifest import FirstManifest
from dcpstore.formats.manifest import decode_manifest
from dcpstore.formats.version import encode_facts
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
    tensor("a" * 64, (4, 2), SPLIT, "packs/ab12/0-0.pack"),
    tensor("b" * 64, (), SCALAR, "packs/old/3-1.pack"),
    tensor("c" * 64, (0,), EMPTY, ""),
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
        NewEntry("model.ä", ("model", "a\ud800"), "tensor", "a" * 64),
        NewEntry("model.tied", ("model", 0), "tensor", "a" * 64),
        NewEntry("optim.step", ("optim", "step"), "tensor", "b" * 64),
        NewEntry("empty", ("empty",), "tensor", "c" * 64),
        NewEntry("lr", ("lr",), "value", None, "0.001"),
    ],
    tensors=TENSORS,
    packs=[PackRecord("packs/ab12/0-0.pack", 40)],
    plan=PlanRecord("d" * 64, 2, [ShardRecord("model.a", 1, Box((3, 0), (1, 2)))]),
    nbytes=18,
    nbytes_written=40,
    nbytes_reused=2,
    seconds={"write": 0.25},
    created_at=datetime(2026, 11, 24, 12, 30, 0, 5, UTC),
)


def body(draft: VersionDraft = DRAFT, content: VersionContent = CONTENT) -> dict:
    """Return what dcpstore wrote before pages, without its digest."""
    packs = list(dict.fromkeys(chunk.pack for t in content.tensors for chunk in t.chunks))
    plan = content.plan
    version = {
        "format": 1,
        **encode_facts(draft, content),
        "parent": draft.parent,
        "aliases": dict(content.aliases),
        "planner_data": content.planner_data,
        "written": [[pack.key, pack.nbytes] for pack in content.packs],
        "plan": {
            "digest": plan.digest,
            "ranks": plan.ranks,
            "shards": [[s.fqn, s.rank, s.box.offsets, s.box.sizes] for s in plan.shards],
        },
        "entries": [[e.fqn, e.path, e.kind, e.tensor_digest, e.value] for e in content.entries],
        "packs": packs,
        "tensors": [
            {
                "digest": t.digest,
                "dtype": t.dtype,
                "shape": t.shape,
                "codec": t.codec,
                "nbytes": t.nbytes,
                "parts": [[g.offsets, g.shape, g.chunk_shape] for g in t.parts],
                "chunks": [
                    [c.digest.hex(), packs.index(c.pack), c.offset, c.length] for c in t.chunks
                ],
            }
            for t in content.tensors
        ],
    }
    refs = {"zarr.json": "{}"}
    # Through JSON, so that a test can change it in place.
    made = {"templates": {"data": "/data"}, "refs": refs, "dcpstore": version}
    return json.loads(json.dumps(made))


def signed(body: object) -> bytes:
    text = json.dumps(body)
    digest = blake3(text.encode()).hexdigest()
    return f'{{"version": 1, "digest": "{digest}", {text[1:]}'.encode()


def test_everything_comes_back() -> None:
    assert decode_manifest(signed(body())) == FirstManifest(DRAFT, CONTENT, "/data")


@settings(deadline=None)
@given(st.data())
def test_every_flipped_bit_and_every_cut_is_seen(data: st.DataObject) -> None:
    raw = bytearray(signed(body()))
    if data.draw(st.booleans()):
        bit = data.draw(st.integers(0, 8 * len(raw) - 1))
        raw[bit // 8] ^= 1 << bit % 8
    else:
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    with pytest.raises(CorruptionError):
        decode_manifest(bytes(raw))


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
    found = body()
    found["dcpstore"][member] = value
    with pytest.raises(CorruptionError, match="lacks a member or has an invalid one"):
        decode_manifest(signed(found))


def test_grids_without_end_are_not_counted_through() -> None:
    found = body()
    found["dcpstore"]["tensors"][0] |= {"shape": [10**18], "parts": [[[0], [10**18], [1]]]}
    with pytest.raises(CorruptionError, match="4 chunks for 1000000000000000000 cells"):
        decode_manifest(signed(found))
    found["dcpstore"]["tensors"][0]["parts"] = [[[0], [1], [0]]]
    with pytest.raises(CorruptionError):
        decode_manifest(signed(found))


def test_a_newer_format_says_update() -> None:
    found = body()
    found["dcpstore"]["format"] = 2
    with pytest.raises(SchemaError, match="update dcpstore"):
        decode_manifest(signed(found))
