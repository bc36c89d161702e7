"""Reads what versions hold from the pages in the data folder alone, without the catalog.

Invariant: what is returned has the digests by which it was looked for, on the level where it was
looked for. Damaged, missing and misplaced nodes are a CorruptionError that names their page.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple, TypeVar

from dcpstore.core.lru import LruCache
from dcpstore.errors import CorruptionError, InvalidInputError, NotFoundError
from dcpstore.formats.entry_tree import EntrySet, EntryTree, Group
from dcpstore.formats.page import Page, Run, RunPlace, decode_page, whole_tensor
from dcpstore.records import NewTensor
from dcpstore.storage.interface import Storage

__all__ = ["PageReader", "StoredTree"]

T = TypeVar("T")

_KEPT = 32  # pages: a version reads its own, and few of those before it


class StoredTree(NamedTuple):
    """Nodes of a version as its pages hold them.

    Attributes:
        tree: all nodes that were read.
        tensors: those of its sets, each with all its chunks.
        nodes: the page of each node that was read or named, by digest.
        runs: the page of each run of these tensors.
    """

    tree: EntryTree
    tensors: list[NewTensor]
    nodes: dict[bytes, str]
    runs: dict[bytes, str]


class PageReader:
    """Reads pages, and keeps the last ones."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._pages: LruCache[str, tuple[Page, int]] = LruCache(_KEPT)

    def page(self, key: str) -> Page:
        """Return a page.

        Raises:
            CorruptionError: it is missing or damaged.
        """
        return self._read(key)[0]

    def size(self, key: str) -> int:
        """Return the length of a page in bytes."""
        return self._read(key)[1]

    def tree(self, root: bytes, key: str, known: Collection[bytes] = ()) -> StoredTree:
        """Return the nodes below a root, which lies in the page `key`, without `known` ones.

        Raises:
            CorruptionError: some of it is missing or damaged.
        """
        top, nodes = self._group(root, key, 2), {root: key}
        groups: list[Group] = []
        sets: dict[bytes, EntrySet] = {}
        tensors: dict[str, NewTensor] = {}
        runs: dict[bytes, str] = {}
        before = None  # the last FQN
        for child, group_page in zip(top.children, self._pages_below(root, key), strict=True):
            nodes[child.digest] = group_page
            if child.digest in known:
                continue
            group = self._group(child.digest, group_page, 1)
            groups.append(group)
            below = self._pages_below(child.digest, group_page)
            for one, set_page in zip(group.children, below, strict=True):
                nodes[one.digest] = set_page
                if one.digest in known:
                    continue
                held = self._set(one.digest, set_page)
                first = held.child.first
                is_later = before is None or not held.entries or before < first
                if first != one.first or not is_later or group.child.first != child.first:
                    raise CorruptionError(
                        f"{set_page}: the set of {one.first!r} begins at {first!r}, after "
                        f"{before!r}; restore the page from a copy."
                    )
                before = held.entries[-1].fqn if held.entries else before
                sets[one.digest] = held
                self._add_tensors(held, set_page, tensors, runs)
        tree = EntryTree(list(sets.values()), groups, top)
        return StoredTree(tree, list(tensors.values()), nodes, runs)

    def _add_tensors(
        self, held: EntrySet, key: str, tensors: dict[str, NewTensor], runs: dict[bytes, str]
    ) -> None:
        page = self.page(key)
        for digest in {e.tensor_digest for e in held.entries if e.tensor_digest is not None}:
            if digest not in tensors:
                paged = page.tensors[digest]
                runs.update(paged.runs)
                tensors[digest] = whole_tensor(paged, self._run)

    def _read(self, key: str) -> tuple[Page, int]:
        found = self._pages.get(key)
        if found is None:
            try:
                data = self._storage.get(key)
                found = decode_page(data, key), len(data)
            except NotFoundError as error:
                raise CorruptionError(f"{key}: it is missing") from error
            except (CorruptionError, InvalidInputError) as error:
                raise CorruptionError(f"{key}: {error}") from error
            self._pages.put(key, found)
        return found

    def _group(self, digest: bytes, key: str, level: int) -> Group:
        found = _held(self.page(key).groups, digest, key)
        if found.level != level:
            raise CorruptionError(f"{key}: {digest.hex()} is of level {found.level}, not {level}")
        return found.group

    def _pages_below(self, digest: bytes, key: str) -> Iterable[str]:
        return self.page(key).groups[digest].pages

    def _set(self, digest: bytes, key: str) -> EntrySet:
        return _held(self.page(key).sets, digest, key)

    def _run(self, place: RunPlace) -> Run:
        return _held(self.page(place.page).runs, place.digest, place.page)


def _held(held: Mapping[bytes, T], digest: bytes, key: str) -> T:
    found = held.get(digest)
    if found is None:
        raise CorruptionError(
            f"{key}: it lacks {digest.hex()}, which another object looks for there; restore it "
            "from a copy."
        )
    return found
