"""Fast checksums: known values, the borders of pieces, and damage that is named by its place."""

import numpy as np
import pytest
import xxhash

from dcpstore.core.checksums import (
    CHECKSUM,
    PIECE,
    check_pieces,
    checksum,
    joined_checksum,
    piece_checksums,
)
from dcpstore.errors import CorruptionError

DATA = np.random.default_rng(0).integers(0, 256, 3 * PIECE + 5, np.uint8)


@pytest.mark.parametrize(
    ("data", "known"),
    [
        # the first two of the algorithm's own tests, and what its command line prints of a file
        (b"", "99aa06d3014798d86001c324468d497f"),
        (b"\0", "a6cd5e9392000f6ac44bdff4074eecdb"),
        (b"abc", "06b05ab6733a618578af5f94892f3950"),
    ],
)
def test_known_checksums(data: bytes, known: str) -> None:
    assert checksum(data).hex() == known
    assert piece_checksums(data).hex() == known
    assert joined_checksum(bytes.fromhex(known)).hex() == known


@pytest.mark.parametrize("nbytes", [1, 65_535, 65_536, 65_537, PIECE, PIECE + 1, len(DATA)])
def test_many_short_steps_give_the_checksum_of_the_whole(nbytes: int) -> None:
    assert checksum(DATA[:nbytes]) == xxhash.xxh3_128_digest(DATA[:nbytes].tobytes())


@pytest.mark.parametrize(
    ("nbytes", "count"),
    [
        (0, 1),
        (PIECE - 1, 1),
        (PIECE, 1),
        (PIECE + 1, 2),
        (2 * PIECE, 2),
        (2 * PIECE + 1, 3),
    ],
)
def test_a_piece_is_256_kib_and_the_last_one_what_is_left(nbytes: int, count: int) -> None:
    data = DATA[:nbytes]
    pieces = piece_checksums(data)
    split = [data[at : at + PIECE] for at in range(0, nbytes, PIECE)] or [data]
    assert len(split) == count
    assert pieces == b"".join(map(checksum, split))
    assert joined_checksum(pieces) == (pieces if count == 1 else checksum(pieces))
    check_pieces(data, pieces)


@pytest.mark.parametrize("dtype", ["complex64", "bool", "float16"])
def test_arrays_are_taken_by_their_bytes(dtype: str) -> None:
    array = np.arange(12).astype(dtype).reshape(3, 4)
    assert piece_checksums(array) == checksum(array.tobytes())
    assert piece_checksums(array[:0]) == checksum(b"")


@pytest.mark.parametrize(
    ("at", "piece"), [(0, 0), (PIECE - 1, 0), (PIECE, PIECE), (len(DATA) - 1, 3 * PIECE)]
)
def test_a_flipped_bit_is_found_in_its_piece(at: int, piece: int) -> None:
    pieces = piece_checksums(DATA)
    damaged = DATA.copy()
    damaged[at] ^= 4
    with pytest.raises(CorruptionError, match=rf"piece at byte {piece} does not match"):
        check_pieces(damaged, pieces)


@pytest.mark.parametrize("length", [0, CHECKSUM - 1, CHECKSUM + 1])
def test_a_record_of_another_length_matches_nothing(length: int) -> None:
    record = (checksum(b"abc") + b"\0")[:length]
    with pytest.raises(CorruptionError, match="does not match"):
        check_pieces(b"abc", record)
