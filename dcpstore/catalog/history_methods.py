"""`History`: the catalog's side of diff, rollback and undo; each method is one transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from dcpstore.catalog.db.database import Database
from dcpstore.catalog.read import entries as differences
from dcpstore.catalog.read import entries as queries
from dcpstore.catalog.read import log_filter as filters
from dcpstore.catalog.read.entries import Pair, SharedChunk
from dcpstore.catalog.read.log_filter import LogFilter
from dcpstore.catalog.write import annotations as additions
from dcpstore.catalog.write import refs as moves
from dcpstore.catalog.write import undo as undoing
from dcpstore.catalog.write.refs import RefKind
from dcpstore.records import EntryRecord, Operation, RefRecord, Version

__all__ = ["History"]


class History:
    """Made by `Catalog.history`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # Log

    def log(self, start: int | None, *, limit: int | None, wanted: LogFilter) -> list[Version]:
        """Return the versions that are `wanted`, newest first: of all, or of `start` and above."""
        return self._database.ask(queries.list_log, start, limit=limit, wanted=wanted)

    def best(self, metric: str, *, mode: Literal["min", "max"], branch: str | None) -> Version:
        """Return the version with the least or the greatest value of a metric."""
        return self._database.ask(filters.best_version, metric, mode=mode, branch=branch)

    # Diff

    def both(self, old: int, new: int) -> tuple[list[EntryRecord], list[EntryRecord]]:
        """Return the entries of two versions."""
        return self._database.ask(differences.load_both, old, new)

    def shared_chunks(self, pairs: Sequence[Pair]) -> list[SharedChunk]:
        """Return the chunks that pairs of tensors of the same grids have in common."""
        return self._database.ask(differences.shared_chunks, pairs)

    # Refs

    def delete_ref(self, name: str, kind: RefKind, *, expect: int | None, author: str) -> RefRecord:
        """Remove a tag or branch; return what it was."""
        return self._database.change(moves.delete_ref, name, kind, expect=expect, author=author)

    def roll_back(
        self, branch: str, ref: str | int, *, force: bool, expect_tip: int | None, author: str
    ) -> RefRecord:
        """Move a branch to an earlier version, or to any with `force`."""
        return self._database.change(
            moves.roll_back, branch, ref, force=force, expect_tip=expect_tip, author=author
        )

    def undo(self, *, expect: int | None, author: str) -> Operation:
        """Take back the last operation that is not undone."""
        return self._database.change(undoing.undo_last, expect=expect, author=author)

    # Additions

    def add_metrics(
        self, ref: str | int | None, metrics: Mapping[str, float], *, author: str
    ) -> Version:
        """Add metrics to a version."""
        return self._database.change(additions.add_metrics, ref, metrics, author=author)

    def add_labels(
        self, ref: str | int | None, labels: Mapping[str, str], *, author: str
    ) -> Version:
        """Add labels to a version."""
        return self._database.change(additions.add_labels, ref, labels, author=author)
