"""The paths of a bridge: those it may read, and targets that appear whole or not at all.

A checkpoint may be from anyone, and contain symbolic links. A link out of its folder would copy
other files of this machine into a version. So only files that are inside the folder, links
followed, are read; a file that the caller names is trusted.

An export is written under an unguessable temporary name beside its target, made durable, then
renamed; an existing target is never touched (invariant of every export). While it runs it holds a
lock on that name. What a killed export left has no lock, and the next export to the same target
removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dcpstore.errors import (
    AlreadyExistsError,
    CorruptionError,
    DcpstoreError,
    NotFoundError,
    UnsafeDataError,
)

__all__ = ["inside", "new_file", "new_folder"]

_FRESH_SECONDS = 60  # how old a temporary name without a lock is: one that is begun has none yet


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file that a checkpoint's folder holds; it need not be there.

    Raises:
        UnsafeDataError: it is outside of the folder, by its name or by a link.
        CorruptionError: no file can have this name.
    """
    path = folder / name
    try:
        is_outside = not path.resolve().is_relative_to(folder.resolve())
        path.is_file()  # raises for a name that no file can have
    except (OSError, ValueError, RuntimeError) as error:  # too long, with a NUL, a loop of links
        raise CorruptionError(
            f"{str(folder)!r} names the file {name[:200]!r}, which is not a valid name ({error}); "
            "copy the checkpoint again from its source."
        ) from error
    if is_outside:
        raise UnsafeDataError(
            f"{name[:200]!r} is outside of {str(folder)!r}, by its name or by a link; do not "
            "trust this checkpoint, or import its files by their own names."
        )
    return path


@contextmanager
def new_file(target: Path) -> Iterator[IO[bytes]]:
    """Yield a file to write; it gets its name when the block ends without an error.

    Raises:
        AlreadyExistsError: the target exists.
        NotFoundError: the folder of the target is missing.
        DcpstoreError: the system refuses.
    """
    temporary = _begin(target)
    try:
        with temporary.open("xb") as file, _locked(temporary):
            yield file
            file.flush()
            os.fsync(file.fileno())
            _name_file(temporary, target)  # before the lock ends, or another could remove it
        _sync(target.parent)
    except OSError as error:
        raise _refused(target, error) from error
    finally:
        with contextlib.suppress(OSError):  # the first error is the one to report
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to fill; it gets its name when the block ends without an error.

    Raises:
        AlreadyExistsError: the target exists.
        NotFoundError: the folder of the target is missing.
        DcpstoreError: the system refuses.
    """
    temporary = _begin(target)
    try:
        temporary.mkdir()
        with _locked(temporary):
            yield temporary
            for folder, _, names in os.walk(temporary, topdown=False):
                for name in names:
                    _sync(Path(folder, name))
                _sync(Path(folder))
            _refuse_existing(target)  # a rename would replace an empty folder created meanwhile
            temporary.rename(target)
        _sync(target.parent)
    except OSError as error:
        raise _refused(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _begin(target: Path) -> Path:
    """Return the temporary name for a target that can be made."""
    _refuse_existing(target)
    if not target.parent.is_dir():
        raise NotFoundError(
            f"the folder {str(target.parent)!r} for the export is missing; make it first."
        )
    _remove_abandoned(target)
    return target.with_name(f"{target.name}.{secrets.token_hex(8)}.tmp")


@contextmanager
def _locked(temporary: Path) -> Iterator[None]:
    """Hold a lock on what is being written, where the filesystem has locks."""
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(target: Path) -> None:
    """Remove what killed exports to this target left under their temporary names."""
    name = re.compile(re.escape(target.name) + r"\.[0-9a-f]{16}\.tmp")
    for path in filter(lambda path: name.fullmatch(path.name), target.parent.iterdir()):
        with contextlib.suppress(
            OSError
        ):  # it is locked, or cannot be removed: it only takes space
            if time.time() - path.lstat().st_mtime < _FRESH_SECONDS:
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            finally:
                os.close(descriptor)


def _name_file(temporary: Path, target: Path) -> None:
    try:
        os.link(temporary, target)  # a rename would replace a file created meanwhile
    except FileExistsError:
        _refuse_existing(target)
        raise
    except OSError:  # a filesystem without hard links
        _refuse_existing(target)
        temporary.rename(target)


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise AlreadyExistsError(
            f"{str(target)!r} exists, and an export replaces nothing; give another place, or "
            "remove it first."
        )


def _refused(target: Path, error: OSError) -> DcpstoreError:
    return DcpstoreError(
        f"cannot write {str(target)!r}: {error.strerror or error}; check that this user may write "
        "there and that there is space, then export again."
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
