"""`Recorded`: the methods of a repository that look back, and those that take back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Literal, SupportsFloat

from dcpstore.catalog import Catalog
from dcpstore.catalog.maintenance.journal_files import journaled
from dcpstore.catalog.read.log_filter import LogFilter
from dcpstore.catalog.validation import as_labels, as_metrics
from dcpstore.catalog.write.operations import this_user
from dcpstore.errors import InvalidInputError
from dcpstore.history.diff import Diff, diff_versions, fold_diff
from dcpstore.records import Operation, RefRecord, Version
from dcpstore.storage.interface import Storage

__all__ = ["Recorded"]


class Recorded:
    """The part of `Repository` that tells its history, and moves refs about in it."""

    catalog: Catalog
    storage: Storage

    def log(
        self,
        ref: str | int | None = None,
        *,
        limit: int | None = None,
        where: str | Iterable[str] = (),
        steps: tuple[int | None, int | None] = (None, None),
        since: datetime | None = None,
        until: datetime | None = None,
        labels: Mapping[str, object] | None = None,
        tag: str | None = None,
        branch: str | None = None,
    ) -> list[Version]:
        """Return versions, newest first: all of them, or `ref` and its ancestors.

        Args:
            ref: where to begin.
            limit: return so many at most.
            where: comparisons of metrics that must hold, such as "val_loss<2.5".
            steps: the first and the last step, both included; None for no end.
            since, until: when it was saved; a time without zone is of the clock here.
            labels: what its labels must say.
            tag: the name of a tag that it must have; * and ? are wild.
            branch: the branch on which it was saved.

        Raises:
            InvalidInputError: a comparison or pattern that cannot be meant.
            NotFoundError: no version has such a metric, or was saved on such a branch.
        """
        start = None if ref is None else self.catalog.resolve(ref).number
        if not isinstance(where, Iterable):
            raise InvalidInputError(f"where is {where!r}; give comparisons such as 'val_loss<2.5'.")
        wanted = LogFilter(
            where=(where,) if isinstance(where, str) else tuple(where),
            steps=steps,
            since=since,
            until=until,
            labels=as_labels(labels),
            tag=tag,
            branch=branch,
        )
        if wanted == LogFilter():
            return self.catalog.log(start, limit=limit)
        return self.catalog.history().log(start, limit=limit, wanted=wanted)

    def best(
        self, metric: str, *, mode: Literal["min", "max"] = "min", branch: str | None = None
    ) -> Version:
        """Return the version with the least ("min") or greatest ("max") value of a metric.

        Of equals it is the earliest; NaN is no value. `branch` asks those only that were saved on
        it.

        Raises:
            NotFoundError: no such version has the metric.
        """
        return self.catalog.history().best(metric, mode=mode, branch=branch)

    @journaled
    def delete_tag(self, name: str, *, expect: str | int | None = None) -> RefRecord:
        """Remove a tag; return what it was. `undo` brings it back.

        Raises:
            ConflictError: it does not name the version `expect`.
        """
        return self._delete(name, "tag", expect)

    @journaled
    def delete_branch(self, name: str, *, expect: str | int | None = None) -> RefRecord:
        """Remove a branch, and none of its versions; return what it was. `undo` brings it back.

        Raises:
            ConflictError: its tip is not the version `expect`.
        """
        return self._delete(name, "branch", expect)

    @journaled
    def rollback(
        self,
        ref: str | int,
        *,
        branch: str = "main",
        force: bool = False,
        expect_tip: str | int | None = None,
    ) -> RefRecord:
        """Move a branch to an earlier version, so that the next save goes on from there.

        No version is deleted: `undo` moves the branch back.

        Args:
            ref: where to; an ancestor of the branch's tip, or any version with `force`.
            branch: what is moved.
            force: move it to a version that is no ancestor, such as one of another branch.
            expect_tip: the ref that the branch must still name.

        Raises:
            InvalidInputError: the version is no ancestor, and `force` is not given.
            ConflictError: the branch is not at `expect_tip`.
        """
        expected = None if expect_tip is None else self.catalog.resolve(expect_tip).number
        return self.catalog.history().roll_back(
            branch, ref, force=force, expect_tip=expected, author=this_user()
        )

    @journaled
    def undo(self, *, expect: int | None = None) -> Operation:
        """Take back the last operation on refs, metrics or labels that is not undone yet.

        Deleted tags and branches come back, moved branches go back. After a save the branch goes
        back and the tags go; the version stays. Called again, it goes further back.

        Args:
            expect: the number of the operation that is to be undone.

        Returns:
            The operation that this is.

        Raises:
            InvalidInputError: nothing is left to undo.
            NotFoundError: a ref would go back to a version that was expired.
            ConflictError: another operation came in; it is not number `expect`.
        """
        return self.catalog.history().undo(expect=expect, author=this_user())

    @journaled
    def add_metrics(self, ref: str | int | None, metrics: Mapping[str, SupportsFloat]) -> Version:
        """Add metrics to a version, such as those of a later evaluation.

        Raises:
            InvalidInputError: a name or value that cannot be kept.
            AlreadyExistsError: a metric is there with another value.
        """
        return self.catalog.history().add_metrics(ref, as_metrics(metrics), author=this_user())

    @journaled
    def add_labels(self, ref: str | int | None, labels: Mapping[str, object]) -> Version:
        """Add labels to a version.

        Raises:
            InvalidInputError: a name or text that cannot be kept.
            AlreadyExistsError: a label is there with another text.
        """
        return self.catalog.history().add_labels(ref, as_labels(labels), author=this_user())

    def diff(self, old: str | int, new: str | int | None = None, *, stats: bool = False) -> Diff:
        """Return what changed from one version to another.

        Without `stats` it reads the catalog alone: contents are compared by digest. With it, each
        changed tensor is told in numbers, out of the chunks that differ. A tensor that is made of
        tensors is one entry, with those as its parts.

        Raises:
            CorruptionError: with `stats`, stored bytes are damaged.
        """
        diff = diff_versions(self.catalog, self.catalog.resolve(old), self.catalog.resolve(new))
        if not stats:
            return fold_diff(diff)
        from dcpstore.history.measure import with_stats  # noqa: PLC0415 (loads torch)

        return fold_diff(with_stats(diff, self.catalog, self.storage))

    def operations(self, *, limit: int | None = None) -> list[Operation]:
        """Return what was done to the repository, newest first."""
        return self.catalog.operations(limit=limit)

    def _delete(
        self, name: str, kind: Literal["tag", "branch"], expect: str | int | None
    ) -> RefRecord:
        expected = None if expect is None else self.catalog.resolve(expect).number
        return self.catalog.history().delete_ref(name, kind, expect=expected, author=this_user())
