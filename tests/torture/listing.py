"""Every kind of fault that there is."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from tests.torture.kinds import Ground, Kind

__all__ = ["MODULES", "listed"]

MODULES = [
    "kills",
    "rivals",
    "hostile",
    "faults_disk",
    "faults_descriptors",
    "faults_read",
    "faults_readonly",
    "faults_database",
    "faults_server",
    "faults_clock",
    "faults_damage",
]


def listed(ground: Ground, *, module: str = "", only: str = "") -> Iterator[Kind]:
    """Yield the kinds of a module, or of all; only those whose name holds `only`."""
    for name in [module] if module else MODULES:
        for kind in import_module(f"tests.torture.{name}").kinds(ground):
            if only in kind.name:
                yield kind
