"""Manifests: everything comes back, every flipped bit is seen, and each is small."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from blake3 import blake3

from dcpstore.errors import CorruptionError, SchemaError
from dcpstore.formats.manifest import Manifest, decode_manifest, encode_manifest, manifest_key
from dcpstore.records import PackRecord, VersionStats
from tests.formats.test_first_manifest import DRAFT

MANIFEST = Manifest(
    draft=DRAFT,
    stats=VersionStats(
        created_at=datetime(2026, 11, 24, 12, 30, 0, 5, UTC),
        nbytes=18,
        nbytes_written=40,
        nbytes_reused=2,
        seconds={"write": 0.25},
    ),
    root=bytes(range(32)),
    page="pages/ab12.page",
    plan="plans/0123.json",
    packs=[PackRecord("packs/ab12/0-0.pack", 40)],
    aliases={"a" * 64: "b" * 64},
    planner_data='{"$tuple": [1]}',
)


def signed(body: dict[str, Any], version: int = 2) -> bytes:
    text = json.dumps(body)
    digest = blake3(text.encode()).hexdigest()
    return f'{{"manifest": {version}, "digest": "{digest}", {text[1:]}'.encode()


def body() -> dict[str, Any]:
    found = json.loads(encode_manifest(MANIFEST))
    return {
        name: value
        for name, value in found.items()
        if name not in ("manifest", "digest", "algorithm")
    }


def test_everything_comes_back() -> None:
    assert decode_manifest(encode_manifest(MANIFEST)) == MANIFEST
    assert decode_manifest(signed(body())) == MANIFEST
    assert manifest_key("ab12") == "manifests/ab12.json"


def test_it_is_small_whatever_the_version_holds() -> None:
    assert len(encode_manifest(replace(MANIFEST, aliases={}))) < 1500


def test_every_flipped_bit_and_every_cut_is_seen() -> None:
    whole = encode_manifest(MANIFEST)
    for bit in range(8 * len(whole)):
        raw = bytearray(whole)
        raw[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptionError):
            decode_manifest(bytes(raw))
    for end in range(len(whole)):
        with pytest.raises(CorruptionError):
            decode_manifest(whole[:end])


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("root", "aa"),
        ("root", None),
        ("page", "pages/../catalog.db"),
        ("page", "packs/ab12/0-0.pack"),
        ("plan", "plans/x.json"),
        ("written", [["pages/ab12.page", 4]]),
        ("aliases", {"a": "b"}),
        ("parent", -1),
        ("uid", "../ab"),
        ("created_at", "yesterday"),
        ("seconds", {"x": "much"}),
        ("format", None),
    ],
)
def test_a_manifest_with_a_wrong_member_or_without_it_is_corruption(
    member: str, value: object
) -> None:
    with pytest.raises(CorruptionError, match="lacks a member or has an invalid one"):
        decode_manifest(signed({**body(), member: value}))
    lacking = {name: held for name, held in body().items() if name != member}
    with pytest.raises(CorruptionError, match="lacks a member or has an invalid one"):
        decode_manifest(signed(lacking))


def test_a_newer_format_says_update() -> None:
    with pytest.raises(SchemaError, match="update dcpstore"):
        decode_manifest(signed({**body(), "format": 3}, 3))
    with pytest.raises(CorruptionError, match="format is 3 in the seal, and 2 inside"):
        decode_manifest(signed(body(), 3))
