"""The head of a sealed object: a flipped bit in it is seen, though no digest covers the version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dcpstore.errors import CorruptionError, SchemaError
from dcpstore.formats.journal_entry import decode_operation, encode_operation
from dcpstore.formats.manifest import decode_manifest, encode_manifest
from tests.formats import test_first_manifest
from tests.formats.test_manifest import MANIFEST

FIRST = test_first_manifest.signed(test_first_manifest.body())

OPERATION = {
    "operation": 1,
    "kind": "tag",
    "target": "best",
    "old": None,
    "new": {"uid": "ab12", "version": 1},
    "author": "ada",
    "created_at": "2026-11-29T10:00:00+00:00",
    "detail": None,
}


@pytest.mark.parametrize(
    ("data", "decode", "errors"),
    [
        (encode_manifest(MANIFEST), decode_manifest, (CorruptionError,)),
        (FIRST, decode_manifest, (CorruptionError,)),
        # a flipped number of its format may be a newer one
        (encode_operation(OPERATION), decode_operation, (CorruptionError, SchemaError)),
    ],
    ids=["manifest", "first", "operation"],
)
def test_every_flipped_bit_of_the_head_is_seen(
    data: bytes, decode: Callable[[bytes], Any], errors: tuple[type[Exception], ...]
) -> None:
    decode(data)
    for bit in range(8 * 140):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(errors):
            decode(bytes(flipped))


@pytest.mark.parametrize("version", [0, 2])
def test_a_manifest_of_another_kerchunk_version_is_damaged(version: int) -> None:
    data = FIRST.replace(b'"version": 1', b'"version": %d' % version, 1)
    with pytest.raises(CorruptionError, match=f"kerchunk version is {version}"):
        decode_manifest(data)


def test_an_operation_of_another_format_is_damaged_or_newer() -> None:
    data = encode_operation(OPERATION)
    with pytest.raises(CorruptionError, match="format is 0"):
        decode_operation(data.replace(b'"format": 2', b'"format": 0', 1))
    with pytest.raises(SchemaError, match="update dcpstore"):
        decode_operation(data.replace(b'"format": 2', b'"format": 3', 1))
