"""The files of a foreign checkpoint: only those inside its own folder, links followed.

A checkpoint comes from anywhere, by archive or clone, with its links: one that leads out of the
folder would bring files of this machine into a version. A file that the caller names is trusted.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO

from typing_extensions import Buffer

from dcpstore.errors import CorruptionError, UnsafeDataError

__all__ = ["FileView", "inside"]


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file that a checkpoint's folder holds; it need not be there.

    Raises:
        UnsafeDataError: it lies outside, by its name or by a link.
        CorruptionError: no file can be called so.
    """
    path = folder / name
    try:
        is_outside = not path.resolve().is_relative_to(folder.resolve())
        path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, with a NUL, links in a circle
        raise CorruptionError(
            f"{str(folder)!r} names the file {name[:200]!r}, which cannot be one ({error}); copy "
            "the checkpoint again from its source."
        ) from error
    if is_outside:
        raise UnsafeDataError(
            f"{name[:200]!r} lies outside of {str(folder)!r}, by its name or by a link; do not "
            "trust this checkpoint, or import its files by their own names."
        )
    return path


class FileView(io.RawIOBase):
    """Some bytes of an open file, as a file of their own.

    Torch's own view seeks to the wrong side of the end, where zip archives are looked at first.
    """

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        super().__init__()
        self._file, self._offset, self._length = file, offset, length
        self._at = 0

    def readable(self) -> bool:
        """Say yes."""
        return True

    def seekable(self) -> bool:
        """Say yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Go to a place; one before the beginning is an OSError, as in a file."""
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if at < 0:
            raise OSError(f"no place {at}")
        self._at = at
        return at

    def tell(self) -> int:
        """Return the place from which the next byte is read."""
        return self._at

    def readinto(self, buffer: Buffer, /) -> int:
        """Read up to the end of the view."""
        target = memoryview(buffer).cast("B")
        self._file.seek(self._offset + self._at)
        data = self._file.read(min(len(target), max(self._length - self._at, 0)))
        target[: len(data)] = data
        self._at += len(data)
        return len(data)
