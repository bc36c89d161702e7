"""Plans: everything comes back, every flipped bit is seen."""

from __future__ import annotations

import json

import pytest
from blake3 import blake3

from dcpstore.errors import CorruptionError, SchemaError
from dcpstore.formats.plan import decode_plan, encode_plan, plan_key
from dcpstore.geometry.boxes import Box
from dcpstore.records import PlanRecord, ShardRecord

PLAN = PlanRecord(
    "d" * 64,
    2,
    [
        ShardRecord("model.ä", 0, Box((0, 0), (3, 2))),
        ShardRecord("model.ä", 1, Box((3, 0), (1, 2))),
        ShardRecord("scalar", 1, Box((), ())),
    ],
)


def signed(body: object, version: int = 1) -> bytes:
    text = json.dumps(body)
    digest = blake3(text.encode()).hexdigest()
    return f'{{"plan": {version}, "digest": "{digest}", {text[1:]}'.encode()


def test_everything_comes_back() -> None:
    assert decode_plan(encode_plan(PLAN)) == PLAN
    assert plan_key("ab12") == "plans/ab12.json"


def test_every_flipped_bit_is_seen() -> None:
    whole = encode_plan(PLAN)
    for bit in range(8 * len(whole)):
        raw = bytearray(whole)
        raw[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptionError):
            decode_plan(bytes(raw))


NAMED = {"digest": "d" * 64, "algorithm": "blake3", "ranks": 1}


@pytest.mark.parametrize(
    "body",
    [
        {"format": 1, "named": NAMED},
        {"format": 1, "named": {**NAMED, "digest": "d"}, "shards": []},
        {"format": 1, "named": NAMED, "shards": [["w", 0, [0], [1, 2]]]},
        {"format": 1, "named": NAMED, "shards": [["w", -1, [0], [1]]]},
        {"format": "1", "named": NAMED, "shards": []},
    ],
)
def test_a_whole_plan_with_a_wrong_member_is_corruption(body: object) -> None:
    with pytest.raises(CorruptionError, match="lacks a member or has an invalid one"):
        decode_plan(signed(body))


def test_a_newer_format_says_update() -> None:
    with pytest.raises(SchemaError, match="update dcpstore"):
        decode_plan(signed({"format": 2}, 2))
