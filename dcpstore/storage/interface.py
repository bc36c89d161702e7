"""The interface of the place where bytes are stored, and the grammar of keys.

A key names an object below the data folder, as in "packs/<uid>/0-0.pack". Objects are written
once, read in ranges and never changed, so a mapped file and fetched ranges work alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Protocol

from typing_extensions import Buffer

from dcpstore.errors import InvalidInputError

__all__ = ["Range", "Sink", "Source", "Storage", "check_key"]

Range = tuple[int, int]  # offset and length, in bytes

_LONGEST_PART, _MOST_PARTS = 200, 8  # with room for a temporary name, in any file system
_KEY = re.compile(r"[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)*")


class Sink(Protocol):
    """An object being written, append-only; used by one thread at a time.

    Nobody sees it under its key before `commit`, which returns when it is durable.
    """

    def write(self, data: Buffer) -> None:
        """Append contiguous bytes."""

    def commit(self) -> None:
        """Make the object durable, then visible."""

    def discard(self) -> None:
        """Drop what was written; does nothing after `commit`."""


class Source(Protocol):
    """An object being read; safe to share between threads."""

    @property
    def size(self) -> int:
        """Its length in bytes."""

    def read(self, ranges: Sequence[Range]) -> list[memoryview]:
        """Return the bytes of each range; they stay valid for as long as they are held.

        Raises:
            CorruptionError: the object ends before a range does.
        """

    def release(self, offset: int, length: int) -> None:
        """Give back the memory of what was read there; views of it stay valid."""


class Storage(Protocol):
    """A folder or bucket that holds the packs and manifests of one repository.

    Every method raises `InvalidInputError` for what is not a key, and `DcpstoreError` where the
    storage itself fails.
    """

    @property
    def url(self) -> str:
        """Where this is, as `open_storage` takes it."""

    def create(self, key: str) -> Sink:
        """Begin an object."""

    def put(self, key: str, data: Buffer) -> None:
        """Write a whole object, durable on return; a reader sees the old one or the new one."""

    def get(self, key: str) -> bytes:
        """Return a whole object.

        Raises:
            NotFoundError: there is none.
        """

    def open(self, key: str) -> Source:
        """Return an object to read ranges of.

        Raises:
            NotFoundError: there is none; an object store may say so at the first read only.
        """

    def size(self, key: str) -> int:
        """Return the length of an object in bytes.

        Raises:
            NotFoundError: there is none.
        """

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield the sorted keys below the folder `prefix`, or all.

        What a killed writer left behind is among them, under a key that ends in a uid, which shows
        its age, and ".tmp".
        """

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the length in bytes of the objects below the folder `prefix`, by key.

        It is one listing. What a link in a folder leads to is left out, though `size` may find it.
        """

    def delete(self, key: str) -> None:
        """Delete an object; one that does not exist is not an error."""


def check_key(key: str) -> str:
    """Return `key` if it can name an object in any storage.

    Raises:
        InvalidInputError: it is absolute, climbs with "..", or holds other than [A-Za-z0-9._/-],
            or is longer than any of ours.
    """
    parts = key.split("/")
    if (
        not _KEY.fullmatch(key)
        or any(set(part) == {"."} or len(part) > _LONGEST_PART for part in parts)
        or len(parts) > _MOST_PARTS
    ):
        raise InvalidInputError(
            f"{key[:_LONGEST_PART]!r} cannot name a stored object; keys are relative, of letters, "
            "digits and '._-/', without '.' and '..' as a part. If a catalog or manifest holds it, "
            "run 'dcpstore verify'."
        )
    return key
