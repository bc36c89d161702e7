"""Digests: known values, refused layouts, and a content digest that covers all of a content."""

import numpy as np
import pytest
from blake3 import blake3

from dcpstore.core.digests import chunk_digest, content_digest, run_digest
from dcpstore.geometry.grids import Grid

ONE = Grid((0,), (4,), (4,))


def test_known_digest_of_nothing() -> None:
    """The first test vector of the BLAKE3 specification."""
    empty = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert chunk_digest(b"").hex() == empty


@pytest.mark.parametrize("dtype", ["float16", "complex64", "bool", "int64"])
def test_arrays_are_hashed_by_their_bytes(dtype: str) -> None:
    array = np.arange(12).astype(dtype).reshape(3, 4)
    assert chunk_digest(array.view(np.uint8)) == blake3(array.tobytes()).digest()
    assert chunk_digest(array[0, :1].view(np.uint8)) == blake3(array[0, 0].tobytes()).digest()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.uint8).reshape(3, 4).T,
        np.arange(12, dtype=np.uint8)[::2],
        np.arange(12.0),
    ],
    ids=["transposed", "strided", "not bytes"],
)
def test_what_is_not_a_run_of_bytes_is_refused_and_not_hashed_wrong(array: np.ndarray) -> None:
    with pytest.raises(BufferError):
        chunk_digest(array)


def test_content_is_dtype_shape_parts_and_chunks() -> None:
    digests = [bytes([i]) * 32 for i in range(2)]
    halves = [Grid((0,), (2,), (2,)), Grid((2,), (2,), (2,))]
    contents = {
        content_digest("float32", (4,), [ONE], digests[:1]),
        content_digest("int32", (4,), [ONE], digests[:1]),
        content_digest("float32", (4, 1), [ONE], digests[:1]),
        content_digest("float32", (4,), [ONE], digests[1:]),
        content_digest("float32", (4,), halves, digests),
        content_digest("float32", (4,), halves, digests[::-1]),
    }
    assert len(contents) == 6
    assert content_digest("float32", [4], (ONE,), iter(digests[:1])) in contents


def test_a_run_is_named_by_its_codec_and_its_chunks_in_order() -> None:
    digests = [chunk_digest(b"1"), chunk_digest(b"2")]
    runs = [("none", digests), ("zstd", digests), ("none", digests[::-1]), ("none", digests[:1])]
    assert len({run_digest(codec, chunks) for codec, chunks in runs}) == 4
    assert run_digest("none", iter(digests)) == run_digest("none", digests)
