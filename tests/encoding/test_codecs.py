"""Codecs: exact round trips, the same bytes as Zarr's own codecs, and no trust in broken bytes."""

import contextlib
import json
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpstore.encoding.codecs import CODECS, choose_codec, decode, encode, unencoded, zarr_codecs
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
    """A digest shows damage; the codec must only stay inside the buffer, and name a wrong size."""
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


def bits(nbytes: int) -> npt.NDArray[np.uint8]:
    return np.frombuffer(np.random.default_rng(nbytes).bytes(nbytes), np.uint8)


def mixed(nbytes: int, *, zeros_from: float) -> npt.NDArray[np.uint8]:
    raw = bits(nbytes).copy()
    raw[int(zeros_from * nbytes) :] = 0
    return raw


@pytest.mark.parametrize("nbytes", [64, 100_000, 300_000, (4 << 20) + 6])
def test_a_chunk_that_does_not_shrink_is_stored_as_it_is_behind_a_header(nbytes: int) -> None:
    raw = bits(nbytes)
    encoded = memoryview(encode("blosc", raw.data, 2))
    assert encoded.nbytes == nbytes + 16
    found = unencoded("blosc", encoded, nbytes)
    assert found is not None
    assert found == raw.tobytes()
    assert np.shares_memory(np.frombuffer(found, np.uint8), np.frombuffer(encoded, np.uint8))
    out = bytearray(nbytes)
    decode("blosc", encoded, out)
    assert out == raw.tobytes()


@pytest.mark.parametrize("zeros_from", [0.0, 0.3, 0.7])
def test_a_sample_finds_what_shrinks_in_a_part_of_a_chunk(zeros_from: float) -> None:
    raw = mixed(1 << 20, zeros_from=zeros_from)
    encoded = memoryview(encode("blosc", raw.data, 2))
    assert encoded.nbytes < 1.01 * zeros_from * raw.nbytes + 20_000


def test_numbers_as_training_leaves_them_are_stored_in_four_fifths() -> None:
    weights = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype("<f4")
    half = (weights.view("<u4") >> 16).astype("<u2")  # as bfloat16
    assert memoryview(encode("blosc", half.data, 2)).nbytes < 0.8 * half.nbytes


def test_only_a_whole_frame_is_taken_as_it_lies() -> None:
    raw = bits(1000)
    encoded = bytearray(memoryview(encode("blosc", raw.data, 2)))
    for wrong in (999, 1001):
        assert unencoded("blosc", memoryview(encoded), wrong) is None
    assert unencoded("blosc", memoryview(encoded)[:-1], 999) is None
    assert unencoded("blosc", memoryview(b""), 0) is None
    assert unencoded("zstd", memoryview(encode("zstd", raw.data, 2)), 1000) is None
    with pytest.raises(CorruptionError, match="999 bytes are stored and 1000 are needed"):
        unencoded("none", memoryview(raw.tobytes())[1:], 1000)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", ["shrinks", "does not"])
def test_zarr_reads_what_is_encoded(tmp_path: Path, codec: str, kind: str) -> None:
    raw = bits(600_000) if kind == "does not" else mixed(600_000, zeros_from=0.2)
    array = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [300_000],
        "data_type": "uint16",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [300_000]}},
        "chunk_key_encoding": {"name": "default"},
        "fill_value": 0,
        "codecs": zarr_codecs(codec, "bfloat16"),
        "attributes": {},
    }
    (tmp_path / "zarr.json").write_text(json.dumps(array))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "0").write_bytes(encode(codec, raw.data, 2))
    assert zarr.open_array(tmp_path, mode="r")[:].tobytes() == raw.tobytes()
