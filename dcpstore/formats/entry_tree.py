"""The entries of a version as a tree of immutable nodes, each addressed by its content.

Entries, sorted by FQN, are cut into entry sets of about 64 neighbours; the sets into groups; the
groups hang below one root. So every tree has three levels. A version names a root, and versions
share the nodes in which nothing changed: one changed tensor is one new node on each level.

Where a set begins follows from FQNs only, and only from near ones: a set begins where the hash of
the FQN is the smallest among those of its 32 neighbours on each side. So a changed value moves no
boundary, and a layer that is added moves only the boundaries beside it. Groups are cut in the same
way, by the first FQN of each set.

The digests of nodes are by the first algorithm, whatever new tensors use: another one moves the
boundaries and parts old trees from new ones, so it takes a new format of pages.
Source of cutting at local minima: Bjørner, Blass, Gurevich, "Content-dependent chunking for
differential compression, the local maximum approach", J. Comput. Syst. Sci. 76 (2010).
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

from dcpstore.core.digests import FIRST_ALGORITHM, hasher
from dcpstore.formats import json_fields
from dcpstore.records import Child, EntrySet, EntryTree, Group, NewEntry

__all__ = [
    "LEVELS",
    "Child",
    "EntrySet",
    "EntryTree",
    "Group",
    "cut",
    "entry_set",
    "group",
    "grow",
    "regrow",
]

T = TypeVar("T")

LEVELS = 3  # of every tree: entry sets (level 0), groups (1), the root (2)
_NEAR = 32  # neighbours on each side that a boundary depends on


def grow(entries: Iterable[NewEntry]) -> EntryTree:
    """Return the tree of some entries, each of another FQN; without entries it has an empty set."""
    listed = sorted(entries, key=lambda entry: entry.fqn)
    sets = [entry_set(some) for some in _pieces(listed, [entry.fqn for entry in listed])]
    below = [one.child for one in sets]
    groups = [group(some) for some in _pieces(below, [child.first for child in below])]
    return EntryTree(sets, groups, group([one.child for one in groups]))


def regrow(tree: EntryTree, changed: Mapping[str, NewEntry]) -> EntryTree:
    """Return the tree in which these entries, by FQN, replace those of the same FQNs.

    It equals the one that grows from all entries, and only nodes above a changed entry are made.
    """
    sets = list(tree.sets)
    firsts = [one.child.first for one in sets]
    places: dict[int, set[str]] = {}
    for fqn in changed:
        places.setdefault(bisect_right(firsts, fqn) - 1, set()).add(fqn)
    for place, fqns in places.items():
        entries = [changed[e.fqn] if e.fqn in fqns else e for e in sets[place].entries]
        sets[place] = entry_set(entries)
    below = iter([one.child for one in sets])
    groups = []
    for one in tree.groups:
        children = list(itertools.islice(below, len(one.children)))
        groups.append(one if children == one.children else group(children))
    return EntryTree(sets, groups, group([one.child for one in groups]))


def entry_set(entries: Sequence[NewEntry]) -> EntrySet:
    """Return the set of these entries, which are sorted by FQN."""
    digest = hasher(b"dcpstore entry set\n", algorithm=FIRST_ALGORITHM)
    digest.update(",".join(map(_as_json, entries)).encode())
    return EntrySet(digest.digest(), entries)


def group(children: Sequence[Child]) -> Group:
    """Return the node above these, which are of one level and sorted by their first FQN."""
    digest = hasher(b"dcpstore entry group\n", algorithm=FIRST_ALGORITHM)
    digest.update(b"".join(child.digest for child in children))
    return Group(digest.digest(), children)


def cut(fqns: Sequence[str]) -> list[int]:
    """Return where the sets of sorted FQNs begin, the first at 0."""
    count = len(fqns)
    if count <= 2 * _NEAR:
        return [0]
    import numpy as np  # noqa: PLC0415 (slow to load, and what only reads needs none)

    hashes = np.fromiter(map(_hash, fqns), np.uint64, count)
    is_least = np.ones(count, bool)
    is_least[:_NEAR] = is_least[count - _NEAR :] = False  # these have fewer neighbours
    for near in range(1, _NEAR + 1):
        # Of equal hashes, the first counts as the smaller.
        is_least[near:] &= hashes[near:] < hashes[:-near]
        is_least[:-near] &= hashes[:-near] <= hashes[near:]
    return [0, *np.flatnonzero(is_least).tolist()]


def _pieces(items: Sequence[T], fqns: Sequence[str]) -> Iterator[Sequence[T]]:
    for begin, end in itertools.pairwise([*cut(fqns), len(items)]):
        yield items[begin:end]


def _as_json(entry: NewEntry) -> str:
    """Return an entry as its digest covers it."""
    fqn, path = json_fields.quoted(entry.fqn), json_fields.path(entry.path)
    tensor = "null" if entry.tensor_digest is None else f'"{entry.tensor_digest}"'
    value = "null" if entry.value is None else json_fields.quoted(entry.value)
    return f'[{fqn},{path},"{entry.kind}",{tensor},{value}]'


@lru_cache(1 << 16)
def _hash(fqn: str) -> int:
    return int.from_bytes(hasher(fqn.encode(), algorithm=FIRST_ALGORITHM).digest()[:8], "little")
