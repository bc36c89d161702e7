"""Object stores: what differs from a folder, and errors that say what to do."""

import sys
from pathlib import Path

import pytest
from obstore.exceptions import GenericError, UnauthenticatedError
from obstore.store import MemoryStore

from dcpstore.errors import DcpstoreError, InvalidInputError
from dcpstore.storage import object_store as objects
from dcpstore.storage.object_store import ObjectStore
from dcpstore.storage.packs import PackReader, PackWriter
from dcpstore.storage.urls import open_storage

KEY = "packs/ab12/0-0.pack"


def test_packs_are_written_and_read_in_ranges() -> None:
    storage = ObjectStore("memory://", MemoryStore())
    writer = PackWriter(storage, "ab12", 0)
    chunks = [bytes([i]) * 9_000_000 for i in range(4)]  # more than one part of an upload
    places = [writer.append(chunk) for chunk in chunks]
    assert list(storage.list()) == []
    writer.finish()
    reader = PackReader(storage)
    found = reader.read_many(KEY, [place[1:3] for place in reversed(places)])
    assert [bytes(view) for view in found] == chunks[::-1]


def test_the_size_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = ObjectStore("memory://", MemoryStore())
    storage.put(KEY, b"abc")
    asked = []
    head = objects.obstore.head
    monkeypatch.setattr(objects.obstore, "head", lambda *a: asked.append(a) or head(*a))
    source = storage.open(KEY)
    assert asked == []
    source.read([(0, 1)])
    source.read([(1, 1)])
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("error", "step"),
    [
        (UnauthenticatedError("no key\nand so on"), "no key; check the credentials"),
        (GenericError("timed out"), "timed out; check the network"),
        (OSError("pipe"), "pipe; check the network"),
        (
            GenericError("Error performing PUT http://169.254.169.254/latest/api/token: 403"),
            "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        ),
    ],
)
def test_failures_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception, step: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    storage = ObjectStore("s3://bucket/ckpts", MemoryStore())
    monkeypatch.setattr(objects.obstore, "put", fail)
    with pytest.raises(DcpstoreError, match=f"cannot write 's3://bucket/ckpts/{KEY}': {step}"):
        storage.put(KEY, b"x")


def test_urls_of_object_stores(tmp_path: Path) -> None:
    assert open_storage("s3://bucket/ckpts/", base=tmp_path).url == "s3://bucket/ckpts"
    assert open_storage("gs://bucket/ckpts").url == "gs://bucket/ckpts"
    with pytest.raises(InvalidInputError, match="s3://bucket/prefix"):
        open_storage("s3://")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "dcpstore.storage.object_store")
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(DcpstoreError, match="pip install obstore"):
        open_storage("s3://bucket/ckpts")
