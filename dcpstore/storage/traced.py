"""A storage that reports each request that was carried out; used only inside a trace.

One request is one call of the storage's interface: the folder or bucket may do more (an
object store may send an upload in parts, and fetch near ranges together).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from typing_extensions import Buffer

from dcpstore.records import StorageRequest
from dcpstore.storage.interface import Range, Sink, Source, Storage

__all__ = ["TracedStorage"]

Report = Callable[[StorageRequest], None]


class TracedStorage:
    """A storage whose requests are reported.

    Args:
        storage: what carries them out.
        report: called with each request that succeeded, in the thread that made it.
    """

    def __init__(self, storage: Storage, report: Report) -> None:
        self._storage, self._report = storage, report

    @property
    def url(self) -> str:
        """Where this is, as `open_storage` takes it."""
        return self._storage.url

    def create(self, key: str) -> TracedSink:
        """Begin an object; its commit is reported as one request, "write"."""
        return TracedSink(self._storage.create(key), key, self._report)

    def put(self, key: str, data: Buffer) -> None:
        """Write a whole object."""
        self._storage.put(key, data)
        self._report(StorageRequest("put", key, memoryview(data).nbytes))

    def get(self, key: str) -> bytes:
        """Return a whole object."""
        data = self._storage.get(key)
        self._report(StorageRequest("get", key, len(data)))
        return data

    def open(self, key: str) -> TracedSource:
        """Return an object to read ranges of; each read is reported, the opening is not."""
        return TracedSource(self._storage.open(key), key, self._report)

    def size(self, key: str) -> int:
        """Return the length of an object in bytes."""
        size = self._storage.size(key)
        self._report(StorageRequest("size", key, 0))
        return size

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield the sorted keys below the folder `prefix`, or all."""
        yield from self._storage.list(prefix)
        self._report(StorageRequest("list", prefix, 0))

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the length in bytes of the objects below the folder `prefix`, by key."""
        found = self._storage.sizes(prefix)
        self._report(StorageRequest("list", prefix, 0))
        return found

    def delete(self, key: str) -> None:
        """Delete an object."""
        self._storage.delete(key)
        self._report(StorageRequest("delete", key, 0))


class TracedSink:
    """An object being written, whose commit is reported."""

    def __init__(self, sink: Sink, key: str, report: Report) -> None:
        self._sink, self._key, self._report = sink, key, report
        self._nbytes = 0

    def write(self, data: Buffer) -> None:
        """Append contiguous bytes."""
        self._sink.write(data)
        self._nbytes += memoryview(data).nbytes

    def commit(self) -> None:
        """Make the object durable, then visible."""
        self._sink.commit()
        self._report(StorageRequest("write", self._key, self._nbytes))

    def discard(self) -> None:
        """Drop what was written; does nothing after `commit`."""
        self._sink.discard()


class TracedSource:
    """An object being read, whose reads are reported."""

    def __init__(self, source: Source, key: str, report: Report) -> None:
        self._source, self._key, self._report = source, key, report

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return self._source.size

    def read(self, ranges: Sequence[Range]) -> list[memoryview]:
        """Return the bytes of each range; together they are one request."""
        found = self._source.read(ranges)
        self._report(StorageRequest("read", self._key, sum(length for _, length in ranges)))
        return found

    def release(self, offset: int, length: int) -> None:
        """Give back the memory of what was read there."""
        self._source.release(offset, length)
