"""Tensors that are made of tensors, as a version keeps them: a mark, and an entry for each part.

A composed tensor `f` is the value `f.$composed`, which says what it is, and its parts beside it:
`f.indices`, `f.values`. Here such entries are recognised, and shown
as the one tensor that they stand for. Nothing here needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from dcpstore.errors import CorruptionError, NotFoundError
from dcpstore.records import EntryRecord, ObjectPath

__all__ = [
    "MARK",
    "ComposedEntry",
    "Composition",
    "Entry",
    "composition_of",
    "compositions",
    "describe_entry",
    "fold_entries",
    "imported_value",
    "is_mark",
    "matching_entries",
    "matching_fqns",
    "outer_fqns",
    "shape_text",
    "stands_for",
]

MARK = "$composed"  # the key of the mark, and its tag in typed JSON
_SUFFIX = f".{MARK}"


@dataclass(frozen=True, slots=True)
class Composition:
    """What a composed tensor is, besides its parts.

    Attributes:
        kind: its name in the list of classes that dcpstore knows.
        shape: of the whole tensor; None where a dimension is ragged.
        dtype: torch's name without the module.
        parts: the names of the tensors that it is made of.
        context: all else that its class needs, as typed JSON.
    """

    kind: str
    shape: tuple[int | None, ...]
    dtype: str
    parts: tuple[str, ...]
    context: str

    def to_json(self) -> dict[str, object]:
        """Return what typed JSON keeps of it."""
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "parts": list(self.parts),
            "context": json.loads(self.context),
        }

    def to_text(self) -> str:
        """Return it as JSON in a text, as exports have it."""
        return json.dumps(self.to_json(), ensure_ascii=False)

    @classmethod
    def of_json(cls, payload: Any) -> Composition:
        """Return what `to_json` was made of.

        Raises:
            LookupError, TypeError, ValueError: it is not what `to_json` gives.
        """
        shape, parts = payload["shape"], payload["parts"]
        texts = (payload["kind"], payload["dtype"], *parts)
        sizes_are_right = all(n is None or (type(n) is int and 0 <= n < 2**63) for n in shape)
        if not (all(isinstance(text, str) for text in texts) and sizes_are_right):
            raise TypeError(f"{payload!r} does not describe a composed tensor")
        context = json.dumps(payload["context"], ensure_ascii=False, separators=(",", ":"))
        return cls(payload["kind"], tuple(shape), payload["dtype"], tuple(parts), context)


def imported_value(fqn: str, value: object) -> object:
    """Return an imported value; where it is the text that an export made of a mark, the mark."""
    if not (isinstance(value, str) and fqn.endswith(_SUFFIX)):
        return value
    try:
        return Composition.of_json(json.loads(value))
    except (LookupError, TypeError, ValueError):
        return value


@dataclass(frozen=True, slots=True)
class ComposedEntry:
    """A composed tensor of a version, with the entries that it is stored as."""

    fqn: str
    path: ObjectPath
    composition: Composition
    mark: EntryRecord
    parts: tuple[EntryRecord, ...]

    @property
    def kind(self) -> str:
        """The name of its kind."""
        return self.composition.kind

    @property
    def tensor(self) -> None:
        """None: it has no content of its own."""

    @property
    def value(self) -> None:
        """None: it is a tensor."""

    @property
    def nbytes(self) -> int:
        """Raw bytes of its parts."""
        return sum(part.tensor.nbytes for part in self.parts if part.tensor is not None)

    def part_name(self, part: EntryRecord) -> str:
        """Return the name of a part inside the tensor."""
        return part.fqn[len(self.fqn) + 1 :]


Entry = EntryRecord | ComposedEntry


def fold_entries(entries: Sequence[EntryRecord]) -> list[Entry]:
    """Return entries in their order, those of a composed tensor as one, in the place of its first.

    Where a part is missing, the mark and the other parts stay as they are.
    """
    marks = {entry.fqn.removesuffix(_SUFFIX): entry for entry in entries if is_mark(entry)}
    if not marks:
        return list(entries)
    by_fqn = {entry.fqn: entry for entry in entries}
    whole: dict[str, ComposedEntry] = {}  # by FQN of its entries
    for fqn, mark in marks.items():
        composition = composition_of(mark)
        parts = [by_fqn.get(f"{fqn}.{part}") for part in composition.parts]
        if all(part is not None and part.kind == "tensor" for part in parts):
            path = mark.path[:-1] if mark.path[-1] == MARK else (fqn,)
            found = tuple(part for part in parts if part is not None)
            one = ComposedEntry(fqn, path, composition, mark, found)
            whole.update((entry.fqn, one) for entry in (mark, *found))
    folded: dict[str, Entry] = {}
    for entry in entries:
        seen = whole.get(entry.fqn, entry)
        folded.setdefault(seen.fqn, seen)
    return list(folded.values())


def matching_entries(entries: Sequence[Entry], pattern: str, *, where: str) -> list[Entry]:
    """Return the entries that a text stands for, as `matching_fqns` says."""
    found = matching_fqns([one.fqn for one in entries], pattern, where=where)
    return [one for one in entries if one.fqn in found]


def stands_for(pattern: str, fqn: str) -> bool:
    """Tell whether a text stands for an FQN: it is its name, a name above it, or a glob."""
    return fqn == pattern or fqn.startswith(f"{pattern}.") or fnmatchcase(fqn, pattern)


def matching_fqns(fqns: Collection[str], pattern: str, *, where: str) -> set[str]:
    """Return the FQNs that a text stands for: by name, all below it, or by a glob.

    Raises:
        NotFoundError: none, with the nearest names; `where` is the version.
    """
    found = {fqn for fqn in fqns if stands_for(pattern, fqn)}
    if not found:
        raise NotFoundError.near(
            f"entry of {where} that matches",
            pattern,
            list(fqns),
            f"See 'dcpstore ls {where}' for all of them.",
        )
    return found


def outer_fqns(fqns: Iterable[str]) -> dict[str, str]:
    """Return the FQN of the outermost composed tensor, by FQN of its mark and of its parts."""
    listed = list(fqns)
    marked = {fqn.removesuffix(_SUFFIX) for fqn in listed if fqn.endswith(_SUFFIX)}
    if not marked:
        return {}
    found = {}
    for fqn in listed:
        at = fqn.find(".")
        while at >= 0 and fqn[:at] not in marked:
            at = fqn.find(".", at + 1)
        if at >= 0:
            found[fqn] = fqn[:at]
    return found


def is_mark(entry: EntryRecord) -> bool:
    """Tell whether an entry says what a composed tensor is."""
    return entry.fqn.endswith(_SUFFIX) and (entry.value or "").startswith(f'{{"{MARK}":')


def composition_of(mark: EntryRecord) -> Composition:
    """Return the composition that a mark describes.

    Raises:
        CorruptionError: it does not decode.
    """
    try:
        return Composition.of_json(json.loads(mark.value or "")[MARK])
    except (LookupError, TypeError, ValueError) as error:
        raise CorruptionError(
            f"{mark.fqn!r} does not decode ({error}); run 'dcpstore verify' to see which versions "
            "are damaged."
        ) from error


def compositions(entries: Iterable[EntryRecord]) -> Mapping[str, Composition]:
    """Return the composition of each composed tensor of a version, by FQN."""
    return {e.fqn.removesuffix(_SUFFIX): composition_of(e) for e in entries if is_mark(e)}


def describe_entry(entry: EntryRecord) -> str:
    """Return what an entry is in a few words: dtype and shape of a tensor, or its value."""
    if is_mark(entry):
        is_a = composition_of(entry)
        return f"{is_a.kind} {is_a.dtype} {shape_text(is_a.shape)}"
    if entry.tensor is None:
        return entry.value or ""
    return f"{entry.tensor.dtype} {shape_text(entry.tensor.shape)}"


def shape_text(shape: Sequence[int | None]) -> str:
    """Return a shape as in `512x1024`; `*` is a dimension that is ragged."""
    return "x".join("*" if size is None else str(size) for size in shape) or "scalar"
