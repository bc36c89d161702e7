"""Folders and files that may not be written: the kernel refuses, by their modes.

What may not be written is the whole repository, the folders of its data, or its SQLite file; who
works is a user whom modes bind, for root they do not. The operation says so in our words and
changes nothing; a load from a folder that may only be read succeeds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from tests.proxy import proxied
from tests.torture.children import start
from tests.torture.faults_disk import told, verdict_of
from tests.torture.faults_read import LOAD
from tests.torture.kinds import DATABASES, Dialect, Ground, Outcome, Verdict
from tests.torture.operations import OPERATIONS, Operation
from tests.torture.sites import Mould, Site

__all__ = ["ReadOnly", "kinds"]

What = Literal["all", "folders", "file"]
WHATS: dict[Dialect, Sequence[What]] = {
    "sqlite": ("all", "folders", "file"),
    "postgres": ("all", "folders"),
}
NOBODY = 65534  # a user whom modes bind
SHORT = ("save",)


class ReadOnly:
    """What may not be written under one operation."""

    def __init__(self, ground: Ground, operation: Operation, dialect: Dialect) -> None:
        self._ground, self._operation = ground, operation
        self._dialect: Dialect = dialect
        self.name = f"read-only: {operation.name}, {dialect}"

    @cached_property
    def _mould(self) -> Mould:
        return Mould(self._ground, self._dialect, self._operation.prepare)

    def points(self) -> Sequence[What]:
        """Return what may not be written."""
        return self._ground.pick(WHATS[self._dialect], 1)

    def try_point(self, point: What) -> Outcome:
        """Work there as a user who may not write it, and look once that may be done again."""
        site = self._mould.copy()
        with ExitStack() as stack:
            url = site.target
            if site.on_postgres:  # whose socket is private to its user
                url = stack.enter_context(proxied(url)).url
            stack.enter_context(_unwritable(site, point))
            ended = start(_work, self._operation, replace(site, target=url)).end()
        if self._operation is LOAD and ended.value and (site.on_postgres or point == "folders"):
            return Outcome(Verdict.LOST, f"what may be read was not: {ended.value}")
        return verdict_of(ended, self._operation, site, self._mould)


def kinds(ground: Ground) -> Iterator[ReadOnly]:
    """Yield what may not be written, under every operation of one rank; in the short form, some."""
    for operation in (LOAD, *OPERATIONS):
        for dialect in DATABASES:
            chosen = dialect == "sqlite" and operation.name in SHORT
            if operation.ranks == 1 and (ground.long or chosen):
                yield ReadOnly(ground, operation, dialect)


def _work(operation: Operation, site: Site) -> str | None:
    """Do an operation as a user whom modes bind."""
    torch.set_num_threads(1)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    return told(operation, site)


@contextmanager
def _unwritable(site: Site, what: What) -> Iterator[None]:
    """Give a site to the user who works on it, who may not write a part of it for a while."""
    everything = [site.root, *site.root.rglob("*")]
    if os.geteuid() == 0:
        for path in everything:
            os.chown(path, NOBODY, NOBODY)
        for folder in list(site.root.parents)[:2]:
            folder.chmod(0o711)  # it is private to who made it
    modes = {path: path.stat().st_mode for path in everything if _is_part(site, path, what)}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    try:
        yield
    finally:
        for path, mode in modes.items():
            if path.exists():
                path.chmod(mode)


def _is_part(site: Site, path: Path, what: What) -> bool:
    if what == "all":
        return True
    is_file = path.name.startswith("catalog.db")
    if what == "file":
        return is_file
    return path != site.data and not is_file and path.is_relative_to(site.data)
