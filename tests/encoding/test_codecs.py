"""Codecs: exact round trips, the same bytes as Zarr's own codecs, and no trust in broken bytes."""

import contextlib
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpstore.encoding.codecs import CODECS, choose_codec, decode, encode, zarr_codecs
from dcpstore.errors import CorruptionError, InvalidInputError


@settings(deadline=None)
@given(st.sampled_from(CODECS), st.binary(min_size=1, max_size=4000), st.sampled_from([1, 2, 4, 8]))
def test_decoding_gives_back_the_raw_bytes(codec: str, raw: bytes, itemsize: int) -> None:
    raw = raw * itemsize
    out = bytearray(len(raw))
    decode(codec, encode(codec, raw, itemsize), out)
    assert out == raw


def test_none_copies_nothing() -> None:
    raw = np.arange(8, dtype=np.uint8)
    assert encode("none", raw, 1) is raw


@settings(deadline=None)
@given(
    st.sampled_from(CODECS),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, 400),
)
def test_broken_bytes_fail_or_fill_but_never_pass_the_buffer(
    codec: str, edits: list[tuple[int, int]], cut: int
) -> None:
    """A digest tells damage; the codec must only stay inside the buffer, and name a wrong size."""
    raw = np.arange(300, dtype=np.uint16) // 7
    encoded = bytearray(memoryview(encode(codec, raw, 2)).cast("B"))
    for at, value in edits:
        encoded[at % len(encoded)] = value
    del encoded[max(len(encoded) - cut, 0) :]
    guarded = bytearray(b"\xaa" * (raw.nbytes + 64))
    with contextlib.suppress(CorruptionError):
        decode(codec, encoded, memoryview(guarded)[32:-32])
    assert guarded[:32] == guarded[-32:] == b"\xaa" * 32


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("wrong", [-1, 1, 1000])
def test_a_wrong_raw_size_is_corruption(codec: str, wrong: int) -> None:
    raw = bytes(range(200)) * 20
    with pytest.raises(CorruptionError, match=f"{len(raw)} raw bytes"):
        decode(codec, encode(codec, raw, 1), bytearray(len(raw) + wrong))


@pytest.mark.parametrize("codec", ["blosc", "zstd"])
def test_a_header_that_claims_gigabytes_allocates_nothing(codec: str) -> None:
    encoded = bytearray(memoryview(encode(codec, bytes(100_000), 1)))
    if codec == "blosc":
        encoded[4:8] = b"\xff\xff\xff\x7f"
    else:
        encoded[5:9] = b"\xff\xff\xff\x7f"
    with pytest.raises(CorruptionError):
        decode(codec, encoded, bytearray(100_000))


@pytest.mark.parametrize(
    ("dtype", "codec"),
    [
        ("bfloat16", "blosc"),
        ("float16", "blosc"),
        ("float8_e5m2", "blosc"),
        ("int64", "blosc"),
        ("bool", "blosc"),
        ("float32", "none"),
        ("float64", "none"),
        ("complex32", "none"),
        ("complex64", "none"),
    ],
)
def test_auto_encodes_what_pays(dtype: str, codec: str) -> None:
    assert choose_codec("auto", dtype) == codec
    assert choose_codec("zstd", dtype) == "zstd"


def test_unknown_codecs_are_refused_everywhere() -> None:
    with pytest.raises(InvalidInputError, match="no codec 'gzip'; there are 'auto', none, blosc"):
        choose_codec("gzip", "float32")
    for call in (
        lambda: encode("gzip", b"x", 1),
        lambda: decode("gzip", b"x", bytearray(1)),
        lambda: zarr_codecs("gzip", "int8"),
    ):
        with pytest.raises(InvalidInputError, match="gzip"):
            call()


def test_threads_encode_and_decode_at_the_same_time() -> None:
    raws = [np.full(200_000, i, np.uint16) for i in range(8)]
    wrong: list[int] = []

    def work(i: int) -> None:
        out = np.empty_like(raws[i])
        for codec in ("blosc", "zstd"):
            for _ in range(5):
                decode(codec, encode(codec, raws[i], 2), out)
                if not (out == raws[i]).all():
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(raws))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
