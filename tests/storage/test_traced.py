"""Each request to a storage is reported, with its key and its bytes, once it has succeeded."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcpstore.errors import NotFoundError
from dcpstore.records import StorageRequest
from dcpstore.storage.local import LocalFolder
from dcpstore.storage.traced import TracedStorage


def test_each_request_is_reported(tmp_path: Path) -> None:
    seen: list[StorageRequest] = []
    storage = TracedStorage(LocalFolder(tmp_path, create=True), seen.append)
    sink = storage.create("packs/a")
    sink.write(b"12345")
    sink.write(memoryview(b"678"))
    assert seen == []
    sink.commit()
    storage.put("note", b"four")
    assert storage.get("note") == b"four"
    source = storage.open("packs/a")
    assert [bytes(view) for view in source.read([(0, 2), (5, 3)])] == [b"12", b"678"]
    assert storage.size("packs/a") == source.size == 8
    assert list(storage.list("packs")) == ["packs/a"]
    storage.delete("note")
    with pytest.raises(NotFoundError):
        storage.get("note")
    storage.create("given-up").discard()
    assert seen == [
        StorageRequest("write", "packs/a", 8),
        StorageRequest("put", "note", 4),
        StorageRequest("get", "note", 4),
        StorageRequest("read", "packs/a", 5),
        StorageRequest("size", "packs/a", 0),
        StorageRequest("list", "packs", 0),
        StorageRequest("delete", "note", 0),
    ]
