"""A local or shared folder as storage; what it reports as durable is fsynced, folders too.

Objects are written under a temporary name and renamed when complete, so that a reader meets whole
objects only. The temporary name is the key and a new uid, which contains the time when it was
made, so the age of a file that a crash left behind is known. Reads are views of the mapped file:
nothing is copied.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from typing_extensions import Buffer

from dcpstore.core.uids import new_uid
from dcpstore.errors import CorruptionError, DcpstoreError, NotFoundError
from dcpstore.storage.direct_io import BLOCK, StreamedFile
from dcpstore.storage.interface import Range, check_key

__all__ = ["LocalFolder"]

_MAKE = "make the data folder"
_LOOK = "look at the data folder"
_READ = "read"


class LocalFolder:
    """Storage in a folder of this machine or of a shared filesystem.

    Args:
        path: the folder.
        create: make it, and its parents, if it is missing. Only a new repository does: a missing
            folder of an old one is more likely a filesystem that is not mounted.
        block: bytes per write to a new file.

    Raises:
        NotFoundError: it is missing.
        DcpstoreError: it is not a folder, or cannot be made.
    """

    def __init__(self, path: Path, *, create: bool = False, block: int = BLOCK) -> None:
        self._block = block
        self._root = Path(os.path.realpath(path))
        if create:
            with _explained(_MAKE, self._root):
                # Sync every new folder on the way: a crash that loses one loses all below it.
                above = [folder for folder in self._root.parents if not folder.exists()]
                self._root.mkdir(parents=True, exist_ok=True)
                for folder in (self._root, *above):
                    _sync_folder(folder.parent)
        with _explained(_LOOK, self._root):
            is_there, is_folder = self._root.exists(), self._root.is_dir()
        if not is_there:
            raise NotFoundError(
                f"the data folder {str(path)!r} is missing; mount it, or move it back. If it stays "
                "in a new place, 'dcpstore rebuild' makes a new catalog from it there."
            )
        if not is_folder:
            raise DcpstoreError(f"{str(path)!r} is a file, not a data folder; choose another path.")

    @property
    def url(self) -> str:
        """The absolute path, links resolved."""
        return str(self._root)

    def create(self, key: str) -> FileSink:
        """Begin an object."""
        return FileSink(self._root, self._locate(key), block=self._block)

    def put(self, key: str, data: Buffer) -> None:
        """Write a whole object, durable on return."""
        sink = self.create(key)
        try:
            sink.write(data)
            sink.commit()
        finally:
            sink.discard()

    def get(self, key: str) -> bytes:
        """Return a whole object."""
        path = self._locate(key)
        with _explained(_READ, path), _open_file(path) as file:
            return file.read()

    def open(self, key: str) -> MappedFile:
        """Return a mapped object to read ranges of."""
        path = self._locate(key)
        with _explained(_READ, path):
            return MappedFile(path)

    def size(self, key: str) -> int:
        """Return the length of an object in bytes."""
        path = self._locate(key)
        with _explained(_READ, path):
            return path.stat().st_size

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield the sorted keys below the folder `prefix`, or all."""
        top = self._locate(prefix.rstrip("/")) if prefix.rstrip("/") else self._root
        found: list[str] = []
        for folder, _, names in os.walk(top, onerror=_refuse):
            found += (os.path.relpath(os.path.join(folder, name), self._root) for name in names)
        yield from sorted(found)

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the length in bytes of the files below the folder `prefix`, by key."""
        top = prefix.rstrip("/")
        self._locate(top)
        found: dict[str, int] = {}
        waiting = [top]
        while waiting:
            folder = waiting.pop()
            try:
                with os.scandir(self._root / folder) as items:
                    for item in items:
                        key = f"{folder}/{item.name}"
                        if item.is_dir(follow_symlinks=False):
                            waiting.append(key)
                        elif item.is_file(follow_symlinks=False):
                            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                                found[key] = item.stat(follow_symlinks=False).st_size
            except OSError as error:
                _refuse(error)
        return found

    def delete(self, key: str) -> None:
        """Delete an object, and the folder of its version once that is empty."""
        path = self._locate(key)
        with _explained("delete", path):
            path.unlink(missing_ok=True)
        if self._root not in (path.parent, path.parent.parent):
            with contextlib.suppress(OSError):  # it is not empty: that is not a failure
                path.parent.rmdir()

    def _locate(self, key: str) -> Path:
        path = self._root / check_key(key)
        if not Path(os.path.realpath(path)).is_relative_to(self._root):
            raise CorruptionError(
                f"{key!r} leads out of the data folder {str(self._root)!r} by a link; replace the "
                "link with what it points to."
            )
        return path


class FileSink:
    """A file being written under a temporary name."""

    def __init__(self, root: Path, path: Path, *, block: int) -> None:
        self._root, self._path = root, path
        self._temporary = path.with_name(f"{path.name}.{new_uid()}.tmp")
        with _explained("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = StreamedFile(self._temporary, block=block)

    def write(self, data: Buffer) -> None:
        """Append contiguous bytes."""
        try:  # a `with` would take longer than a small chunk does
            self._file.write(data)
        except OSError as error:
            raise _explain("write", self._path, error) from error

    def commit(self) -> None:
        """Make the file durable, then give it its name, and make that durable."""
        with _explained("write", self._path):
            self._file.sync()
            self._file.close()
            self._temporary.replace(self._path)
            # Another rank may have made these folders and not have synced them yet.
            for folder in self._path.parents:
                _sync_folder(folder)
                if folder == self._root:
                    break

    def discard(self) -> None:
        """Drop what was written; does nothing after `commit`."""
        with contextlib.suppress(OSError):  # the file is not needed any more
            self._file.close()
        with _explained("delete", self._temporary):
            self._temporary.unlink(missing_ok=True)


class MappedFile:
    """A file being read through a memory map."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _open_file(path) as file:
            self.size = os.fstat(file.fileno()).st_size
            self._view = memoryview(b"")
            self._map: mmap.mmap | None = None
            if self.size:  # an empty file cannot be mapped
                # Dropped, never closed: views handed out keep the map until they are gone.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._view = memoryview(self._map)

    def read(self, ranges: Sequence[Range]) -> list[memoryview]:
        """Return views of the ranges."""
        for offset, length in ranges:
            if offset < 0 or length < 0 or offset + length > self.size:
                raise CorruptionError(
                    f"{str(self._path)!r} has {self.size} bytes, too few for {length} at {offset}; "
                    "run 'dcpstore verify' to see which versions are damaged."
                )
        return [self._view[offset : offset + length] for offset, length in ranges]

    def release(self, offset: int, length: int) -> None:
        """Unmap the pages there; they stay in the page cache, and a view maps them again."""
        if self._map is not None and length and hasattr(self._map, "madvise"):
            start = offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, offset + length - start)


def _open_file(path: Path) -> BinaryIO:
    """Open a file to read; refuse a pipe or a device, which could block for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CorruptionError(
            f"{str(path)!r} is not a regular file; remove it, and restore the file from a copy."
        )
    return os.fdopen(descriptor, "rb")


@contextlib.contextmanager
def _explained(action: str, path: Path) -> Iterator[None]:
    """Turn the operating system's errors into ours, with the path and a next step."""
    try:
        yield
    except OSError as error:
        raise _explain(action, path, error) from error


def _explain(action: str, path: Path, error: OSError) -> DcpstoreError:
    if isinstance(error, FileNotFoundError) and action != _MAKE:
        return NotFoundError(
            f"cannot {action} {str(path)!r}: it does not exist; run 'dcpstore verify', or restore "
            "it from a copy."
        )
    if action in (_LOOK, _READ) and error.errno in (errno.EACCES, errno.EPERM):
        step = "let this user read it"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        step = "let this user write there, or choose another folder"
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        step = "free space, with 'dcpstore expire' and 'dcpstore gc' for example, and save again"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        step = "raise the limit of open files ('ulimit -n'), then try again"
    elif action == _MAKE and isinstance(
        error, FileNotFoundError | FileExistsError | NotADirectoryError
    ):
        step = "no folder can be made there: choose another path"
    else:
        step = "repair the filesystem, then try again"
    return DcpstoreError(f"cannot {action} {str(path)!r}: {error.strerror}; {step}.")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse(error: OSError) -> None:
    """Raise for a folder that cannot be listed; one that does not exist has no objects."""
    if not isinstance(error, FileNotFoundError):
        raise DcpstoreError(
            f"cannot list {error.filename!r}: {error.strerror}; let this user read it."
        ) from error
