"""What every storage must do, as tests: a subclass runs them on one kind of storage."""

import numpy as np
import pytest

from dcpstore.errors import CorruptionError, InvalidInputError, NotFoundError
from dcpstore.storage.interface import Storage

__all__ = ["StorageContract"]

_KEY = "packs/ab12/0-0.pack"


class StorageContract:
    """The tests of a storage. A subclass gives the fixture `storage`, an empty one for each test.

    They use keys below "packs/" and "manifests/" alone, and some megabytes.
    """

    def test_put_and_get_and_size(self, storage: Storage) -> None:
        storage.put(_KEY, b"abc")
        storage.put("manifests/ab12.json", memoryview(b"{}"))
        assert storage.get(_KEY) == b"abc"
        assert storage.size(_KEY) == 3
        storage.put(_KEY, b"")
        assert (storage.get(_KEY), storage.size(_KEY)) == (b"", 0)

    def test_an_object_is_unseen_until_it_is_committed(self, storage: Storage) -> None:
        sink = storage.create(_KEY)
        sink.write(b"abc")
        with pytest.raises(NotFoundError):
            storage.get(_KEY)
        sink.write(np.arange(3, dtype="<u2").data)
        sink.commit()
        sink.discard()
        assert storage.get(_KEY) == b"abc\0\0\1\0\2\0"

    def test_a_discarded_object_leaves_nothing(self, storage: Storage) -> None:
        sink = storage.create(_KEY)
        sink.write(b"abc")
        sink.discard()
        sink.discard()
        assert list(storage.list()) == []

    def test_many_small_and_large_writes_keep_their_order(self, storage: Storage) -> None:
        pieces = [bytes([i % 256]) * (i * 7919 % 3_000_000) for i in range(20)]
        sink = storage.create(_KEY)
        for piece in pieces:
            sink.write(piece)
        sink.commit()
        assert storage.get(_KEY) == b"".join(pieces)

    def test_ranges_are_read_in_the_order_asked(self, storage: Storage) -> None:
        storage.put(_KEY, bytes(range(100)))
        source = storage.open(_KEY)
        assert source.size == 100
        found = source.read([(90, 10), (0, 2), (50, 0), (1, 2)])
        assert [bytes(view) for view in found] == [
            bytes(range(90, 100)),
            b"\0\1",
            b"",
            b"\1\2",
        ]
        assert source.read([]) == []

    def test_views_stay_good_when_their_memory_was_given_back(self, storage: Storage) -> None:
        content = np.random.default_rng(0).bytes(300_000)
        storage.put(_KEY, content)
        source = storage.open(_KEY)
        for offset, length in ((0, 300_000), (5, 1), (4096, 4096), (299_999, 1), (10, 0)):
            (view,) = source.read([(offset, length)])
            source.release(offset, length)
            assert bytes(view) == content[offset : offset + length]

    @pytest.mark.parametrize("wanted", [(0, 101), (100, 1), (99, 2), (-1, 2), (5, -1), (1000, 1)])
    def test_a_range_past_the_end_is_corruption(
        self, storage: Storage, wanted: tuple[int, int]
    ) -> None:
        storage.put(_KEY, bytes(100))
        with pytest.raises(CorruptionError, match="100 bytes"):
            storage.open(_KEY).read([(0, 1), wanted])

    def test_an_empty_object_has_no_ranges(self, storage: Storage) -> None:
        storage.put(_KEY, b"")
        assert [bytes(view) for view in storage.open(_KEY).read([(0, 0)])] == [b""]

    def test_list_is_sorted_and_by_folder(self, storage: Storage) -> None:
        for key in ("packs/b/0-0.pack", "packs/a/1-0.pack", "packs/a/0-0.pack", "manifests/a.json"):
            storage.put(key, b"x")
        assert list(storage.list("packs/a/")) == ["packs/a/0-0.pack", "packs/a/1-0.pack"]
        assert list(storage.list("packs")) == [
            "packs/a/0-0.pack",
            "packs/a/1-0.pack",
            "packs/b/0-0.pack",
        ]
        assert len(list(storage.list())) == 4
        assert list(storage.list("pac")) == []

    def test_sizes_are_those_of_one_folder(self, storage: Storage) -> None:
        storage.put("packs/b/0-0.pack", b"abc")
        storage.put("packs/a/1-0.pack", b"")
        storage.put("manifests/a.json", b"x")
        assert storage.sizes("packs") == {"packs/b/0-0.pack": 3, "packs/a/1-0.pack": 0}
        assert storage.sizes("packs/b/") == {"packs/b/0-0.pack": 3}
        assert storage.sizes("pages") == {}

    def test_delete_is_done_once_and_may_be_repeated(self, storage: Storage) -> None:
        storage.put(_KEY, b"x")
        storage.put("packs/ab12/1-0.pack", b"y")
        storage.delete(_KEY)
        storage.delete(_KEY)
        assert list(storage.list()) == ["packs/ab12/1-0.pack"]
        storage.delete("packs/ab12/1-0.pack")
        storage.put(_KEY, b"again")
        assert storage.get(_KEY) == b"again"

    def test_what_is_missing_is_not_found(self, storage: Storage) -> None:
        for call in (storage.get, storage.size):
            with pytest.raises(NotFoundError, match=_KEY):
                call(_KEY)
        with pytest.raises(NotFoundError, match=_KEY):
            storage.open(_KEY).read([(0, 1)])

    @pytest.mark.parametrize(
        "key",
        ["", "/etc/passwd", "../x", "a/../b", "a/./b", "a//b", "a/", "ä", "a b", "a\n", "a\0"],
    )
    def test_odd_keys_are_refused(self, storage: Storage, key: str) -> None:
        calls = (storage.get, storage.size, storage.delete, storage.open, storage.create)
        for call in calls:
            with pytest.raises(InvalidInputError, match="cannot name a stored object"):
                call(key)
        with pytest.raises(InvalidInputError):
            storage.put(key, b"")
