"""An object store as storage: S3, Google Cloud Storage or Azure, through obstore (extra "s3").

An object appears when its upload completes, which is as durable as the provider says; an upload
that is abandoned never appears. Ranges near one another are fetched as one request, several at
once. Credentials and endpoints are those that obstore finds, such as AWS_* in the environment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import from_url
from typing_extensions import Buffer

from dcpstore.errors import CorruptionError, DcpstoreError, InvalidInputError, NotFoundError
from dcpstore.storage.interface import Range, check_key

if TYPE_CHECKING:
    from obstore import WritableFile
    from obstore.store import ObjectStore as Backend

__all__ = ["ObjectStore", "open_object_store"]

# Where obstore asks for credentials when the environment has none: the metadata service of a cloud.
_METADATA = ("169.254.169.254", "metadata.google.internal")
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, the path of a key file",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_PART = 16 << 20  # bytes of one part of an upload; 10,000 are allowed


def open_object_store(url: str) -> ObjectStore:
    """Return the storage at "s3://bucket/prefix", "gs://..." or "az://account/container/...".

    Raises:
        InvalidInputError: obstore does not take the URL.
    """
    try:
        return ObjectStore(url.rstrip("/"), from_url(url))
    except (BaseError, ValueError) as error:
        raise InvalidInputError(
            f"{url!r} is not the URL of an object store ({_first_line(error)}); write it as s3://bucket/prefix."
        ) from error


class ObjectStore:
    """Storage in a bucket.

    Args:
        url: of the folder in the bucket.
        backend: the obstore store whose root is that folder.
    """

    def __init__(self, url: str, backend: Backend) -> None:
        self._url, self._backend = url, backend

    @property
    def url(self) -> str:
        """As `open_storage` takes it."""
        return self._url

    def create(self, key: str) -> UploadSink:
        """Begin an object, uploaded in parts as it grows."""
        with self._explained("write", check_key(key)):
            file = obstore.open_writer(self._backend, key, buffer_size=_PART)
        return UploadSink(self, key, file)

    def put(self, key: str, data: Buffer) -> None:
        """Write a whole object."""
        with self._explained("write", check_key(key)):
            obstore.put(self._backend, key, _plain(data))

    def get(self, key: str) -> bytes:
        """Return a whole object."""
        with self._explained("read", check_key(key)):
            return obstore.get(self._backend, key).bytes().to_bytes()

    def open(self, key: str) -> FetchedObject:
        """Return an object to fetch ranges of; nothing is asked for yet."""
        return FetchedObject(self, check_key(key))

    def size(self, key: str) -> int:
        """Return the length of an object in bytes."""
        with self._explained("read", check_key(key)):
            return obstore.head(self._backend, key)["size"]

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield the sorted keys below the folder `prefix`, or all."""
        folder = check_key(prefix.rstrip("/")) if prefix.rstrip("/") else None
        with self._explained("list", prefix):
            batches = [*obstore.list(self._backend, folder)]
        yield from sorted(item["path"] for batch in batches for item in batch)

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the length in bytes of the objects below the folder `prefix`, by key."""
        with self._explained("list", prefix):
            batches = [*obstore.list(self._backend, check_key(prefix.rstrip("/")))]
        return {item["path"]: item["size"] for batch in batches for item in batch}

    def delete(self, key: str) -> None:
        """Delete an object."""
        with self._explained("delete", check_key(key)), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._backend, key)

    def fetch(self, key: str, ranges: Sequence[Range]) -> Sequence[Buffer]:
        """Return the bytes of ranges, none of them empty, that lie inside the object."""
        with self._explained("read", key):
            return obstore.get_ranges(
                self._backend,
                key,
                starts=[offset for offset, _ in ranges],
                lengths=[length for _, length in ranges],
            )

    @contextlib.contextmanager
    def _explained(self, action: str, key: str) -> Iterator[None]:
        """Turn obstore's errors into ours, with the URL and a next step."""
        where = f"{self._url}/{key}"
        try:
            yield
        except FileNotFoundError as error:
            raise NotFoundError(
                f"cannot {action} {where!r}: it does not exist; run 'dcpstore verify', or restore "
                "it from a copy."
            ) from error
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise DcpstoreError(
                f"cannot {action} {where!r}: {_first_line(error)}; check the credentials, and what "
                "they may do in this bucket."
            ) from error
        except (BaseError, OSError) as error:
            if any(address in str(error) for address in _METADATA):
                needed = _CREDENTIALS.get(self._url.partition("://")[0], "credentials")
                raise DcpstoreError(
                    f"cannot {action} {where!r}: no credentials were found; set {needed} in the "
                    "environment. (On a machine of that cloud: its metadata service gave none.)"
                ) from error
            raise DcpstoreError(
                f"cannot {action} {where!r}: {_first_line(error)}; check the network and the "
                "endpoint, then try again."
            ) from error


class UploadSink:
    """An object being uploaded; it does not exist before `commit`."""

    def __init__(self, store: ObjectStore, key: str, file: WritableFile) -> None:
        self._store, self._key = store, key
        self._file: WritableFile | None = file

    def write(self, data: Buffer) -> None:
        """Append contiguous bytes."""
        assert self._file is not None, f"{self._key} is complete"
        with self._store._explained("write", self._key):
            self._file.write(_plain(data))

    def commit(self) -> None:
        """Complete the upload."""
        assert self._file is not None, f"{self._key} is complete"
        with self._store._explained("write", self._key):
            self._file.close()
        self._file = None

    def discard(self) -> None:
        """Abandon the upload; parts that were sent go by the bucket's rule for such uploads."""
        self._file = None


class FetchedObject:
    """An object being read by requests for ranges."""

    def __init__(self, store: ObjectStore, key: str) -> None:
        self._store, self._key = store, key
        self._size: int | None = None

    @property
    def size(self) -> int:
        """Its length in bytes, asked for once."""
        if self._size is None:
            self._size = self._store.size(self._key)
        return self._size

    def read(self, ranges: Sequence[Range]) -> list[memoryview]:
        """Fetch the ranges."""
        # Checked before: obstore panics where coalesced ranges reach past the end.
        for offset, length in ranges:
            if offset < 0 or length < 0 or offset + length > self.size:
                raise CorruptionError(
                    f"'{self._store.url}/{self._key}' has {self.size} bytes, too few for {length} "
                    f"at {offset}; run 'dcpstore verify' to see which versions are damaged."
                )
        asked = [
            (offset, length) for offset, length in ranges if length
        ]  # the store refuses empty ones
        fetched = iter(self._store.fetch(self._key, asked) if asked else ())
        return [memoryview(next(fetched) if length else b"") for _, length in ranges]

    def release(self, offset: int, length: int) -> None:
        """Do nothing: what was fetched is freed with its last view."""


def _plain(data: Buffer) -> memoryview:
    """Return a view of bytes: obstore takes no other element type."""
    return np.frombuffer(memoryview(data), np.uint8).data


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0]
