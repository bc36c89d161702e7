"""What a check of a repository finds damaged, and which versions that touches."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "QUICK",
    "ChunkDamage",
    "Damage",
    "DamagedVersion",
    "VerifyReport",
    "found_by_quick_check",
]

QUICK = ("missing: ", "size: ")  # how damage begins that a look without reading finds


@dataclass(frozen=True, slots=True)
class ChunkDamage:
    """One chunk that is not what its digest says; `fqns` are of any version that has it."""

    pack: str
    offset: int
    length: int
    part: int
    ordinal: int
    reason: str
    fqns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is damaged: a "pack", "manifest" or "operation" by its key, or the "catalog".

    `versions` and `fqns` are those that it touches.
    """

    kind: str
    key: str
    reason: str
    versions: tuple[int, ...] = ()
    fqns: tuple[str, ...] = ()
    chunks: tuple[ChunkDamage, ...] = ()


@dataclass(frozen=True, slots=True)
class DamagedVersion:
    """A version that does not load whole, and the nearest one that does: an ancestor, if any."""

    version: int
    nearest_intact: int | None


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was looked at, and everything that was found damaged."""

    damaged: tuple[Damage, ...]
    versions: tuple[DamagedVersion, ...]
    packs: int
    manifests: int
    chunks: int
    nbytes_read: int
    deep: bool


def found_by_quick_check(damage: str | None) -> bool:
    """Tell whether damage is of a pack as a whole: no digest that is right makes up for it."""
    return damage is not None and damage.startswith(QUICK)
