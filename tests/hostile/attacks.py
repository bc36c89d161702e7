"""Attacks, each a function of an empty folder.

An attack tries what its name says, and asserts that it came to nothing: an error of ours, no code
run, no file touched outside of the repository. The tests and `make torture` try the same ones.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

import dcpstore

__all__ = ["NAMES", "Attack", "Touch", "entering", "rows", "saved"]

Attack = Callable[[Path], None]
NAMES = (
    "../../x",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a/../../b",
    "a\\..\\b",
    "zarr.json",
    "__0_0.distcp",
    ".metadata",
    "{{data}}",
    "%2e%2e%2fx",
    "a\x1b[2Jb",
    "a\nb",
    "'; DROP TABLE version; --",
    "file:///etc/passwd",
)


def entering(attacks: dict[str, Attack]) -> Callable[[Attack], Attack]:
    """Return a decorator that enters an attack by its name."""

    def enter(function: Attack) -> Attack:
        attacks[function.__name__.replace("_", " ")] = function
        return function

    return enter


class Touch:
    """What writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.path}'",)


def saved(folder: Path, state: dict[str, Any] | None = None) -> str:
    """Return the path of a repository with one version."""
    state = state or {"w": torch.arange(6.0), "lr": 0.1, "nested": {"a": [1, (2, 3)]}}
    dcpstore.save(state, folder / "repo", step=1, tags=["best"])
    return str(folder / "repo")


@contextmanager
def rows(repo: str) -> Iterator[sqlite3.Connection]:
    """Yield the catalog itself, past everything that dcpstore checks."""
    with closing(sqlite3.connect(f"{repo}/catalog.db")) as connection, connection:
        yield connection
