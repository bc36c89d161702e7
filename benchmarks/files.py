"""Folders that a run writes: made durable, warmed, weighed and removed, none of it while timed.

Making durable is the exception: it is part of every peer's save.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

__all__ = ["make_durable", "nbytes_below", "remove", "sync", "warm"]

_BLOCK = 16 << 20


def sync(path: Path) -> None:
    """Fsync one file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_durable(place: Path) -> None:
    """Fsync every file and folder below a folder, and itself."""
    for folder, _, names in os.walk(place, topdown=False):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))


def warm(place: Path) -> None:
    """Read every file once, so that all contenders load from the page cache."""
    block = bytearray(_BLOCK)
    for path in _files(place):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def nbytes_below(place: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in _files(place))


def remove(place: Path) -> None:
    """Remove a folder now, so that the disk does not do it while another contender is timed."""
    shutil.rmtree(place)
    sync(place.parent)


def _files(place: Path) -> Iterator[Path]:
    return (path for path in sorted(place.rglob("*")) if path.is_file())
