"""Two versions compared by digest: what was added, removed and changed, and how much they share.

Only the catalog is read: equal tensors are one row there, whatever their chunk grids were. How the
elements of a tensor changed (`TensorStats`, computed by `measure`) is stored as sums, so that the
numbers of tensors add up to those of modules.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.read.entries import SharedChunk, load_both, shared_chunks
from dcpstore.core.display import html_table, human_bytes
from dcpstore.formats.composition import (
    MARK,
    ComposedEntry,
    composition_of,
    describe_entry,
    fold_entries,
)
from dcpstore.records import EntryRecord, TensorRecord, Version

__all__ = [
    "Change",
    "Diff",
    "EntryDiff",
    "ModuleDiff",
    "TensorStats",
    "diff_versions",
    "fold_diff",
]


@dataclass(frozen=True, slots=True)
class TensorStats:
    """How the elements of a tensor changed, over the chunks that differ.

    Equal chunks are not read: they add nothing to a difference, and do not count in `relative`,
    `cosine`, and the NaN and Inf counts. Norms are over elements that are finite in both versions.
    `changed` counts elements whose bits differ.
    """

    elements: int = 0
    compared: int = 0
    changed: int = 0
    squared_difference: float = 0.0
    squared_old: float = 0.0
    squared_new: float = 0.0
    product: float = 0.0
    max_abs: float = 0.0
    nan_old: int = 0
    nan_new: int = 0
    inf_old: int = 0
    inf_new: int = 0

    @property
    def l2(self) -> float:
        """The L2 norm of the difference."""
        return math.sqrt(self.squared_difference)

    @property
    def relative(self) -> float:
        """The L2 norm of the difference, divided by that of the old values."""
        if not self.squared_difference:
            return 0.0
        return math.inf if not self.squared_old else self.l2 / math.sqrt(self.squared_old)

    @property
    def cosine(self) -> float:
        """The cosine of the angle between old and new; NaN where either is zero."""
        if not self.squared_old or not self.squared_new:
            return math.nan
        lengths = math.sqrt(self.squared_old) * math.sqrt(self.squared_new)
        return max(-1.0, min(1.0, self.product / lengths))

    @property
    def share_changed(self) -> float:
        """The share of all elements of the tensor whose bits differ."""
        return self.changed / self.elements if self.elements else 0.0

    def __add__(self, other: TensorStats) -> TensorStats:
        """Return the numbers of both together."""
        return TensorStats(
            elements=self.elements + other.elements,
            compared=self.compared + other.compared,
            changed=self.changed + other.changed,
            squared_difference=self.squared_difference + other.squared_difference,
            squared_old=self.squared_old + other.squared_old,
            squared_new=self.squared_new + other.squared_new,
            product=self.product + other.product,
            max_abs=max(self.max_abs, other.max_abs),
            nan_old=self.nan_old + other.nan_old,
            nan_new=self.nan_new + other.nan_new,
            inf_old=self.inf_old + other.inf_old,
            inf_new=self.inf_new + other.inf_new,
        )


_SHOWN = 30  # entries that a notebook lists

Change = Literal["added", "removed", "changed", "retyped", "reshaped", "unchanged"]


@dataclass(frozen=True, slots=True)
class EntryDiff:
    """One FQN in two versions; `old` or `new` is None if that version lacks it.

    `nbytes_shared` are the raw bytes of the new tensor that the old one holds too. `stats`, if
    requested, describe tensors of one shape whose content or dtype changed. For a tensor that is
    made of tensors, `old` and `new` are its mark, and `parts` are its parts, by name.
    """

    fqn: str
    change: Change
    old: EntryRecord | None
    new: EntryRecord | None
    nbytes_shared: int = 0
    stats: TensorStats | None = None
    parts: tuple[EntryDiff, ...] = ()

    @property
    def nbytes(self) -> int:
        """Raw bytes of the new tensor, or of the old one if it was removed."""
        if self.parts:
            return sum(part.nbytes for part in self.parts)
        entry = self.new or self.old
        return 0 if entry is None or entry.tensor is None else entry.tensor.nbytes


@dataclass(frozen=True, slots=True)
class ModuleDiff:
    """The entries below one module, by how they changed; `stats` are those of all of them."""

    name: str
    added: int
    removed: int
    changed: int
    retyped: int
    reshaped: int
    unchanged: int
    nbytes: int
    nbytes_shared: int
    stats: TensorStats | None


@dataclass(frozen=True, slots=True)
class Diff:
    """What changed from version `old` to version `new`; entries sorted by FQN.

    `nbytes` are the raw bytes of the tensors of `new`, and `nbytes_shared` the bytes of these that
    `old` holds too; each tensor counts once. A diff is true if anything differs.
    """

    old: Version
    new: Version
    entries: tuple[EntryDiff, ...]
    nbytes: int
    nbytes_shared: int

    @property
    def added(self) -> tuple[EntryDiff, ...]:
        """Entries that only `new` has."""
        return self._all("added")

    @property
    def removed(self) -> tuple[EntryDiff, ...]:
        """Entries that only `old` has."""
        return self._all("removed")

    @property
    def changed(self) -> tuple[EntryDiff, ...]:
        """Entries whose content differs, among them tensors of equal dtype and shape."""
        return self._all("changed")

    @property
    def retyped(self) -> tuple[EntryDiff, ...]:
        """Entries of another dtype, or that turned from tensor to value or back."""
        return self._all("retyped")

    @property
    def reshaped(self) -> tuple[EntryDiff, ...]:
        """Tensors of another shape and the same dtype."""
        return self._all("reshaped")

    @property
    def unchanged(self) -> tuple[EntryDiff, ...]:
        """Entries that are equal."""
        return self._all("unchanged")

    def by_module(self, depth: int) -> tuple[ModuleDiff, ...]:
        """Return the entries rolled up by the first `depth` names of their FQN."""
        modules: dict[str, list[EntryDiff]] = {}
        for entry in self.entries:
            modules.setdefault(".".join(entry.fqn.split(".")[:depth]), []).append(entry)
        return tuple(_roll_up(name, entries) for name, entries in modules.items())

    def __bool__(self) -> bool:
        return any(entry.change != "unchanged" for entry in self.entries)

    def summary(self) -> str:
        """Return in one line how many entries changed in which way, and how many bytes did not."""
        counts = Counter(entry.change for entry in self.entries)
        shown = ", ".join(f"{counts[name]} {name}" for name in get_args(Change) if counts[name])
        shared = f"{human_bytes(self.nbytes_shared)} of {human_bytes(self.nbytes)} shared"
        return f"{self.old} -> {self.new}: {shown}; {shared}"

    def __repr__(self) -> str:
        return f"<Diff {self.summary()}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the entries that changed, the first of them."""
        changed = [entry for entry in self.entries if entry.change != "unchanged"]
        rows = [
            (
                entry.change,
                entry.fqn,
                *("-" if side is None else describe_entry(side) for side in (entry.old, entry.new)),
                human_bytes(entry.nbytes),
                human_bytes(entry.nbytes_shared),
            )
            for entry in changed[:_SHOWN]
        ]
        more = len(changed) - len(rows)
        columns = ("CHANGE", "FQN", "OLD", "NEW", "BYTES", "SHARED")
        below = f"and {more} more that changed" if more else ""
        return html_table(self.summary(), columns if rows else (), rows, below=below)

    def _all(self, change: Change) -> tuple[EntryDiff, ...]:
        return tuple(entry for entry in self.entries if entry.change == change)


def diff_versions(catalog: Catalog, old: Version, new: Version) -> Diff:
    """Return what changed between two versions; the number of queries is constant."""
    before, after = load_both(catalog, old.number, new.number)
    pairs = list(_paired(before, after))
    shared = _shared_bytes(catalog, pairs)
    entries = tuple(EntryDiff(fqn, _change(a, b), a, b, _kept(a, b, shared)) for fqn, a, b in pairs)
    held = {entry.tensor.id for entry in before if entry.tensor is not None}
    total = common = 0
    counted: set[int] = set()  # several entries may share a tensor
    for entry in entries:
        tensor = None if entry.new is None else entry.new.tensor
        if tensor is not None and tensor.id not in counted:
            counted.add(tensor.id)
            total += tensor.nbytes
            common += tensor.nbytes if tensor.id in held else entry.nbytes_shared
    return Diff(old, new, entries, total, common)


def fold_diff(diff: Diff) -> Diff:
    """Return a diff with each tensor that is made of tensors as one entry."""
    sides = [[e for one in diff.entries if (e := getattr(one, side))] for side in ("old", "new")]
    outer: dict[str, str] = {}
    for side in sides:
        for one in fold_entries(side):
            if isinstance(one, ComposedEntry):
                outer.update((part.fqn, one.fqn) for part in (one.mark, *one.parts))
    if not outer:
        return diff
    grouped: dict[str, list[EntryDiff]] = {}
    single: list[EntryDiff] = []
    for entry in diff.entries:
        if entry.fqn in outer:
            grouped.setdefault(outer[entry.fqn], []).append(entry)
        else:
            single.append(entry)
    wholes = {fqn: _whole(fqn, entries) for fqn, entries in grouped.items()}
    kept: list[EntryDiff] = []
    for entry in single:
        whole = wholes.get(entry.fqn)
        if whole is None:
            kept.append(entry)
        else:  # in the other version this is a plain tensor or a value
            old, new = entry.old or whole.old, entry.new or whole.new
            wholes[entry.fqn] = dataclasses.replace(whole, change="retyped", old=old, new=new)
    merged = sorted([*kept, *wholes.values()], key=lambda entry: entry.fqn)
    return dataclasses.replace(diff, entries=tuple(merged))


def _whole(fqn: str, entries: list[EntryDiff]) -> EntryDiff:
    mark = next(entry for entry in entries if entry.fqn == f"{fqn}.{MARK}")
    parts = [entry for entry in entries if entry is not mark]
    change = mark.change
    if change == "changed":  # another class, shape or context
        old, new = (None if side is None else composition_of(side) for side in (mark.old, mark.new))
        assert old is not None
        assert new is not None
        is_same = (old.kind, old.dtype) == (new.kind, new.dtype)
        change = "retyped" if not is_same else "reshaped" if old.shape != new.shape else "changed"
    elif change == "unchanged" and any(part.change != "unchanged" for part in parts):
        change = "changed"
    return EntryDiff(
        fqn,
        change,
        mark.old,
        mark.new,
        sum(part.nbytes_shared for part in parts),
        parts=tuple(
            dataclasses.replace(part, fqn=part.fqn.removeprefix(f"{fqn}.")) for part in parts
        ),
    )


def same_grids(old: TensorRecord, new: TensorRecord) -> bool:
    """Tell whether two tensors have equal grids, so that their chunks compare one by one."""
    return (old.dtype, old.shape, old.parts) == (new.dtype, new.shape, new.parts)


Pairing = tuple[str, EntryRecord | None, EntryRecord | None]


def _paired(before: list[EntryRecord], after: list[EntryRecord]) -> Iterator[Pairing]:
    old = {entry.fqn: entry for entry in before}
    new = {entry.fqn: entry for entry in after}
    for fqn in sorted(old.keys() | new.keys()):
        yield fqn, old.get(fqn), new.get(fqn)


def _change(old: EntryRecord | None, new: EntryRecord | None) -> Change:
    if old is None:
        return "added"
    if new is None:
        return "removed"
    a, b = old.tensor, new.tensor
    if old.kind == new.kind == "tensor":
        assert a is not None
        assert b is not None
        return _tensor_change(a, b)
    if "tensor" in (old.kind, new.kind):
        return "retyped"
    same = (old.kind, old.value, a and a.id) == (new.kind, new.value, b and b.id)
    return "unchanged" if same else "changed"


def _tensor_change(old: TensorRecord, new: TensorRecord) -> Change:
    if old.dtype != new.dtype:
        return "retyped"
    if old.shape != new.shape:
        return "reshaped"
    return "unchanged" if old.id == new.id else "changed"


def _shared_bytes(catalog: Catalog, pairs: list[Pairing]) -> dict[tuple[int, int], int]:
    """Return the raw bytes that changed tensors share with their old ones, by both ids."""
    tensors: dict[tuple[int, int], TensorRecord] = {}
    for _, old, new in pairs:
        if old is None or new is None or old.tensor is None or new.tensor is None:
            continue
        if old.tensor.id != new.tensor.id and same_grids(old.tensor, new.tensor):
            tensors[old.tensor.id, new.tensor.id] = new.tensor
    shared: dict[tuple[int, int], int] = {}
    for chunk in shared_chunks(catalog, list(tensors)):
        tensor = tensors[chunk.old, chunk.new]
        nbytes = _cell_bytes(tensor, chunk)
        shared[chunk.old, chunk.new] = shared.get((chunk.old, chunk.new), 0) + nbytes
    return shared


def _cell_bytes(tensor: TensorRecord, chunk: SharedChunk) -> int:
    elements = math.prod(tensor.shape)
    cell = tensor.parts[chunk.part].cell(chunk.ordinal)
    return cell.volume * tensor.nbytes // elements if elements else 0


def _kept(
    old: EntryRecord | None, new: EntryRecord | None, shared: dict[tuple[int, int], int]
) -> int:
    if old is None or new is None or old.tensor is None or new.tensor is None:
        return 0
    if old.tensor.id == new.tensor.id:
        return new.tensor.nbytes
    return shared.get((old.tensor.id, new.tensor.id), 0)


def _roll_up(name: str, entries: list[EntryDiff]) -> ModuleDiff:
    counts: dict[Change, int] = {}
    for entry in entries:
        counts[entry.change] = counts.get(entry.change, 0) + 1
    known = [entry.stats for entry in entries if entry.stats is not None]
    return ModuleDiff(
        name=name,
        added=counts.get("added", 0),
        removed=counts.get("removed", 0),
        changed=counts.get("changed", 0),
        retyped=counts.get("retyped", 0),
        reshaped=counts.get("reshaped", 0),
        unchanged=counts.get("unchanged", 0),
        nbytes=sum(entry.nbytes for entry in entries),
        nbytes_shared=sum(entry.nbytes_shared for entry in entries),
        stats=sum(known, TensorStats()) if known else None,
    )
