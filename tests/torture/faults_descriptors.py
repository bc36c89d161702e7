"""A process that has no file descriptor left: the kernel refuses to open another file.

The operation succeeds with the descriptors that are left, or says in our words that it could not.
"""

from __future__ import annotations

import importlib
import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property

import torch

from tests.torture.children import start
from tests.torture.faults_disk import told, verdict_of
from tests.torture.kinds import DATABASES, Dialect, Ground, Outcome
from tests.torture.operations import OPERATIONS, Operation
from tests.torture.sites import Mould, Site

__all__ = ["Descriptors", "kinds"]

EXCEPT = ("upgrade",)  # whose newer schema the child makes itself, of files that it copies
MOST = 256  # descriptors of a process
# An import opens a file as well; its error comes from Python, before any code of ours runs.
LOADED_WHEN_CALLED = ("dcpstore.maintenance.gc", "dcpstore.maintenance.rewrite")
LEFT = (0, 1, 2, 3, 5, 8, 13, 21)  # descriptors that the process may still open


class Descriptors:
    """Too few descriptors for one operation, on one kind of database."""

    def __init__(self, ground: Ground, operation: Operation, dialect: Dialect) -> None:
        self._ground, self._operation = ground, operation
        self._dialect: Dialect = dialect
        self.name = f"descriptors: {operation.name}, {dialect}"

    @cached_property
    def _mould(self) -> Mould:
        return Mould(self._ground, self._dialect, self._operation.prepare)

    def points(self) -> Sequence[int]:
        """Return how many descriptors are left."""
        return self._ground.pick(LEFT, 2)

    def try_point(self, point: int) -> Outcome:
        """Work with that many, and look."""
        site = self._mould.copy()
        ended = start(_work, self._operation, site, point).end()
        return verdict_of(ended, self._operation, site, self._mould)


def kinds(ground: Ground) -> Iterator[Descriptors]:
    """Yield the operations of one rank on both databases; in the short form, a save on SQLite."""
    for operation in OPERATIONS:
        for dialect in DATABASES:
            chosen = (operation.name, dialect) == ("save", "sqlite")
            wanted = ground.long and operation.name not in EXCEPT
            if operation.ranks == 1 and (wanted or chosen):
                yield Descriptors(ground, operation, dialect)


def _work(operation: Operation, site: Site, left: int) -> str | None:
    """Do the operation with so many descriptors left; return the error of ours, if any."""
    torch.set_num_threads(1)
    for module in LOADED_WHEN_CALLED:
        importlib.import_module(module)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, MOST), hard))
    held = []
    with suppress(OSError):
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    for descriptor in held[:left]:
        os.close(descriptor)
    said = told(operation, site)
    for descriptor in held[left:]:
        os.close(descriptor)
    return said
