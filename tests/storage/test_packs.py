"""Packs: places that read back, rolling, nothing left of a failed save, damage named."""

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpstore.core.checksums import PIECE, joined_checksum, piece_checksums
from dcpstore.errors import CorruptionError
from dcpstore.records import PackRecord
from dcpstore.storage.local import LocalFolder
from dcpstore.storage.packs import PackReader, PackWriter


@pytest.fixture
def folder(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path)


@settings(deadline=None)
@given(chunks=st.lists(st.binary(min_size=1, max_size=60)), limit=st.integers(1, 100))
def test_every_chunk_reads_back_from_its_place(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[bytes], limit: int
) -> None:
    folder = LocalFolder(tmp_path_factory.mktemp("data"))
    writer = PackWriter(folder, "ab12", 3, limit=limit)
    places = [writer.append(chunk) for chunk in chunks]
    packs = writer.finish()
    reader = PackReader(folder, most_open=2)
    assert [bytes(reader.read(*place[:3])) for place in places] == chunks
    assert [pack.key for pack in packs] == [f"packs/ab12/3-{n}.pack" for n in range(len(packs))]
    assert sum(pack.nbytes for pack in packs) == sum(map(len, chunks))
    assert all(folder.size(pack.key) == pack.nbytes for pack in packs)
    for pack in packs:  # only a chunk larger than the limit makes a pack larger
        held = [place for place in places if place.pack == pack.key]
        assert pack.nbytes <= limit or len(held) == 1


@pytest.mark.parametrize("nbytes", [0, 5, PIECE, PIECE + 1, 2 * PIECE, 40 * PIECE + 3])
def test_checksums_lie_behind_a_chunk_of_more_than_one_piece(
    folder: LocalFolder, nbytes: int
) -> None:
    data = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    writer = PackWriter(folder, "ab12", 0)
    before, place, after = (writer.append(chunk) for chunk in (b"before", data, b"after"))
    (pack,) = writer.finish()
    count = -(-nbytes // PIECE)
    trailer = 16 * count if count > 1 else 0
    assert (before.offset, place.offset, place.length) == (0, 6, nbytes)
    assert after.offset == 6 + nbytes + trailer
    assert pack.nbytes == folder.size(pack.key) == after.offset + 5
    reader = PackReader(folder)
    assert place.checksum is not None
    encoded, pieces = reader.read_with_checksums(*place[:3], place.checksum)
    assert bytes(encoded) == data.tobytes()
    assert pieces == piece_checksums(data)
    stored = bytes(reader.read(pack.key, 6 + nbytes, trailer))
    assert stored == (pieces if trailer else b"")
    assert joined_checksum(pieces) == place.checksum


def test_checksums_count_for_the_limit_of_a_pack(folder: LocalFolder) -> None:
    writer = PackWriter(folder, "ab12", 0, limit=2 * PIECE + 32)
    places = [writer.append(bytes(n)) for n in (PIECE, PIECE + 1, PIECE - 1, 1)]
    assert [place.pack[-6] for place in places] == ["0", "1", "1", "2"]
    assert [pack.nbytes for pack in writer.finish()] == [PIECE, 2 * PIECE + 32, 1]


@pytest.mark.parametrize("at", [0, 16, 47])
def test_damaged_checksums_are_not_believed(folder: LocalFolder, at: int) -> None:
    writer = PackWriter(folder, "ab12", 0)
    place = writer.append(bytes(3 * PIECE))
    (pack,) = writer.finish()
    data = bytearray(folder.get(pack.key))
    data[place.length + at] ^= 1
    folder.put(pack.key, data)
    assert place.checksum is not None
    with pytest.raises(CorruptionError, match="checksums behind it are damaged"):
        PackReader(folder).read_with_checksums(*place[:3], place.checksum)
    folder.put(pack.key, data[:-1])
    with pytest.raises(CorruptionError, match="too short"):
        PackReader(folder).read_with_checksums(*place[:3], place.checksum)


def test_nothing_appended_is_no_pack(folder: LocalFolder) -> None:
    assert PackWriter(folder, "ab12", 0).finish() == []
    assert list(folder.list()) == []


def test_arrays_are_appended_as_their_bytes(folder: LocalFolder) -> None:
    writer = PackWriter(folder, "ab12", 0)
    place = writer.append(np.arange(3, dtype="<c8").reshape(3, 1))
    assert place[:3] == ("packs/ab12/0-0.pack", 0, 24)
    assert writer.finish() == [PackRecord("packs/ab12/0-0.pack", 24)]


def test_a_discarded_writer_leaves_no_pack(folder: LocalFolder) -> None:
    writer = PackWriter(folder, "ab12", 0, limit=4)
    for _ in range(3):
        writer.append(b"abc")
    writer.discard()
    writer.discard()
    assert list(folder.list()) == []


def test_reads_are_views_and_outlive_the_reader(folder: LocalFolder) -> None:
    folder.put("packs/ab12/0-0.pack", bytes(range(50)))
    reader = PackReader(folder)
    view = reader.read("packs/ab12/0-0.pack", 10, 5)
    again = reader.read("packs/ab12/0-0.pack", 10, 5)
    reader.close()
    assert bytes(view) == bytes(range(10, 15))
    first, second = np.frombuffer(view, np.uint8), np.frombuffer(again, np.uint8)
    assert np.shares_memory(first, second)
    assert bytes(reader.read("packs/ab12/0-0.pack", 0, 1)) == b"\0"  # it opens again


def test_a_missing_or_short_pack_is_named(folder: LocalFolder) -> None:
    reader = PackReader(folder)
    with pytest.raises(CorruptionError, match=r"'packs/ab12/0-0.pack' is missing.*7 bytes.* 5\)"):
        reader.read("packs/ab12/0-0.pack", 5, 7)
    folder.put("packs/ab12/0-0.pack", bytes(11))
    with pytest.raises(CorruptionError, match=r"'packs/ab12/0-0.pack' is too short for 7 .* 5:"):
        reader.read("packs/ab12/0-0.pack", 5, 7)


def test_many_threads_read_more_packs_than_stay_open(folder: LocalFolder) -> None:
    for n in range(8):
        folder.put(f"packs/ab12/{n}-0.pack", bytes([n]) * 1000)
    reader = PackReader(folder, most_open=3)
    wrong: list[int] = []

    def work(start: int) -> None:
        for i in range(200):
            n = (start + i * 5) % 8
            if bytes(reader.read(f"packs/ab12/{n}-0.pack", i, 10)) != bytes([n]) * 10:
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
