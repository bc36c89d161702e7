"""What a loss of power leaves of a folder, by the log of the steps before it.

A file's bytes are durable as they were at its last sync, the names in a folder as they were at the
last sync of the folder; of everything since, any part may be there or not. SQLite's files are left
as they are: what it says is committed it has synced itself (WAL with synchronous=FULL, see
sqlite.org/pragma.html), and a torn tail of its log it throws away (sqlite.org/fileformat2.html).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.torture.steps import Step

__all__ = ["Disk"]

IS_SQLITE = ("catalog.db", "catalog.db-wal", "catalog.db-shm", "catalog.db-journal")


@dataclass(eq=False)
class File:
    """A file, whatever it is called: its bytes at the last sync, and whether that is all."""

    synced: bytes = b""
    dirty: bool = True


@dataclass(eq=False)
class Folder:
    """A folder: what it holds, and what it held at its last sync."""

    now: dict[str, File | Folder] = field(default_factory=dict)
    synced: dict[str, File | Folder] = field(default_factory=dict)


class Disk:
    """What is durable of a folder, and what is not yet.

    Args:
        root: the folder.
        before: it, or a copy of it, from before the steps; all of that is durable.
    """

    def __init__(self, root: Path, before: Path) -> None:
        self._root = root
        self._tree = _durable(before)

    def take(self, step: Step) -> None:
        """Note a step that was done."""
        if step.path:
            _replay(self._tree, self._root, step)

    @property
    def is_synced(self) -> bool:
        """Whether a loss of power would change nothing."""
        return _is_synced(self._tree)

    def lose_power(self, survives: Callable[[], bool]) -> None:
        """Leave of the folder what a loss of power may leave.

        `survives` is asked for every change that was not synced.
        """
        left = self._root.with_name(self._root.name + ".left")
        _write(self._tree, self._root, left, survives)
        shutil.rmtree(self._root)
        left.rename(self._root)


def _durable(path: Path) -> Folder:
    entries: dict[str, File | Folder] = {
        inside.name: _durable(inside) if inside.is_dir() else File(inside.read_bytes(), False)
        for inside in path.iterdir()
        if inside.name not in IS_SQLITE
    }
    return Folder(entries, dict(entries))


def _is_synced(folder: Folder) -> bool:
    return folder.now == folder.synced and all(
        _is_synced(found) if isinstance(found, Folder) else not found.dirty
        for found in folder.now.values()
    )


def _replay(tree: Folder, root: Path, step: Step) -> None:
    folder, name = _find(tree, root, step.path)
    match step.what:
        case "create":
            found = folder.now.setdefault(name, File())
            assert isinstance(found, File)
            found.dirty = True  # it may have been cut to nothing
        case "mkdir":
            folder.now[name] = Folder()
        case "rename" | "replace":
            target, new_name = _find(tree, root, step.target)
            target.now[new_name] = folder.now.pop(name)
        case "link":
            target, new_name = _find(tree, root, step.target)
            target.now[new_name] = folder.now[name]
        case "unlink" | "remove" | "rmdir":
            del folder.now[name]
        case "fsync" | "fdatasync":
            found = folder.now[name] if name else folder
            if isinstance(found, Folder):
                found.synced = dict(found.now)
            else:
                found.synced, found.dirty = Path(step.saved).read_bytes(), False
        case _:
            found = folder.now[name]
            assert isinstance(found, File)
            found.dirty = True


def _find(tree: Folder, root: Path, path: str) -> tuple[Folder, str]:
    """Return the folder that a path is in, and its name there; the root itself has none."""
    *above, name = Path(os.path.relpath(path, root)).parts or ("",)
    for part in above:
        inside = tree.now[part]
        assert isinstance(inside, Folder)
        tree = inside
    return tree, name


def _write(tree: Folder, was: Path, left: Path, survives: Callable[[], bool]) -> None:
    """Write to `left` what is left of a folder that is at `was`."""
    left.mkdir()
    for name in IS_SQLITE:
        if (was / name).exists():
            shutil.copyfile(was / name, left / name)
    for name in sorted({*tree.now, *tree.synced}):
        now, synced = tree.now.get(name), tree.synced.get(name)
        found = now if now is synced or survives() else synced
        if isinstance(found, Folder):
            _write(found, was / name, left / name, survives)
        elif found is not None:
            whole = (was / name).read_bytes() if found is now else found.synced
            (left / name).write_bytes(_torn(found, whole, survives))


def _torn(file: File, whole: bytes, survives: Callable[[], bool]) -> bytes:
    """Return what is left of a file's bytes; of those that were not synced, a part."""
    if not file.dirty or file.synced == whole:
        return whole
    if survives():  # the length came to the disk, of the bytes only some
        kept = max(len(file.synced), len(whole) // 2)
        return whole[:kept] + bytes(len(whole) - kept)
    return file.synced
