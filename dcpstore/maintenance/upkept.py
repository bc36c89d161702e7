"""`Upkept`: the methods of a repository that keep it in order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from dcpstore.catalog import Catalog
from dcpstore.catalog.maintenance.journal_files import changing_repository, journaled
from dcpstore.catalog.maintenance.retention import Best, ExpireReport, Retention, expire
from dcpstore.catalog.write.operations import this_user
from dcpstore.core.durations import Duration
from dcpstore.errors import InvalidInputError
from dcpstore.records import ForgetReport, Version
from dcpstore.storage.interface import Storage

if TYPE_CHECKING:
    from dcpstore.maintenance.copy import CopyReport
    from dcpstore.maintenance.gc import GcReport
    from dcpstore.maintenance.verify import VerifyReport

__all__ = ["Upkept"]


class Upkept:
    """The part of `Repository` that forgets, collects, verifies and copies."""

    catalog: Catalog
    storage: Storage

    @journaled
    def expire(
        self,
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        keep_best: Best | None = None,
        keep_tagged: bool = False,
        keep_since: datetime | timedelta | str | None = None,
        branch: str | None = None,
        dry_run: bool = False,
    ) -> ExpireReport:
        """Forget the versions that no rule keeps; `gc` then frees their bytes.

        A branch tip, a tagged version and the newest version stay whatever the rules say. Of an
        expired version the row stays, so that parents and operations still resolve; its entries go.

        Args:
            keep_last: keep so many newest versions of each branch that versions were saved to.
            keep_every: keep versions whose step is a multiple of this.
            keep_best: `("val_loss", 3)` keeps the three with the smallest val_loss;
                `("accuracy", 3, "max")` those with the largest.
            keep_tagged: no rule but that tagged versions stay, as they always do.
            keep_since: keep versions made since a time, or within a span such as `"7d"`.
            branch: look only at versions that were saved to this branch.
            dry_run: change nothing, and tell what would expire.

        Raises:
            InvalidInputError: there is no rule, or one that cannot be meant.
            NotFoundError: no version has that metric, or was saved to that branch.
        """
        rules = Retention(keep_last, keep_every, keep_best, keep_tagged, keep_since)
        return expire(self.catalog, rules, author=this_user(), branch=branch, dry_run=dry_run)

    @journaled
    def forget(
        self,
        refs: str | int | Iterable[str | int],
        *,
        force: bool = False,
        dry_run: bool = False,
    ) -> ForgetReport:
        """Forget these versions, in one operation; `gc` then frees their bytes.

        Until that `gc`, `undo` brings them back. The versions that were saved after them stay, and
        keep their history. A branch whose tip is forgotten moves back to the nearest ancestor that
        stays; where there is none, the branch goes too.

        Args:
            refs: the versions, or one of them. If one of the refs names nothing, none is forgotten.
            force: forget tagged versions too, and delete their tags.
            dry_run: change nothing, and tell what would be forgotten.

        Raises:
            NotFoundError: a ref names nothing.
            InvalidInputError: a version is tagged, and `force` is not given.
        """
        if isinstance(refs, str | int | Version):
            refs = [refs]
        if not isinstance(refs, Iterable):
            raise InvalidInputError(
                f"refs={refs!r} are not refs; pass a list such as ['v1', 'v2']."
            )
        return self.catalog.upkeep().forget(
            list(refs), force=force, dry_run=dry_run, author=this_user()
        )

    @journaled
    def gc(
        self, *, grace: Duration = "24h", dry_run: bool = False, lease: Duration = "1h"
    ) -> GcReport:
        """Free the bytes that nothing reaches.

        Packs are condemned first, and deleted by the first gc after `grace`; until then loads that
        began earlier find them. Packs that are mostly dead are copied to smaller ones. What crashed
        saves left is cleared once they were silent for `lease`.

        Args:
            grace: a span of time, such as `"24h"` or a timedelta.
            dry_run: change nothing, and tell what would be freed.
            lease: a running save renews its lease every ten seconds.

        Raises:
            InvalidInputError: a save has been running for longer than `grace`.
        """
        from dcpstore.maintenance.gc import collect  # noqa: PLC0415 (what only looks need not load it)

        return collect(
            self.catalog,
            self.storage,
            grace=grace,
            lease=lease,
            author=this_user(),
            dry_run=dry_run,
        )

    def verify(
        self, *, deep: bool = False, resume: bool = False, limit: float | None = None
    ) -> VerifyReport:
        """Look for damage; the report's `.damaged` is empty where all is well.

        What is damaged is marked: no save reuses it, so saving the same content again heals it.

        Args:
            deep: read every chunk and check its digest; else only what needs no reading.
            resume: go on with a deep look that was broken off.
            limit: most bytes a second to read.

        Raises:
            InvalidInputError: `limit` is not positive, or `resume` is given without `deep`.
        """
        from dcpstore.maintenance.verify import verify  # noqa: PLC0415 (as for gc)

        if limit is not None and not (isinstance(limit, int | float) and limit > 0):
            raise InvalidInputError(f"limit is {limit!r}; give bytes a second, more than 0.")
        if resume and not deep:
            raise InvalidInputError("only a deep look is resumed; give deep=True (--deep) too.")
        with self.catalog.kept():
            return verify(self.catalog, self.storage, deep=deep, resume=resume, limit=limit)

    def copy_to(self, other: Upkept, refs: Sequence[str | int] | None = None) -> CopyReport:
        """Copy versions to another repository, without writing chunks that it holds.

        A version keeps its uid and gets a new number; one that is there already is left alone.

        Args:
            other: the repository to copy to.
            refs: the versions, each alone; those that are tags or branches are made there too.
                None is every version, tag and branch.

        Raises:
            NotFoundError: a ref names nothing.
            CorruptionError: a stored chunk is damaged.
        """
        from dcpstore.maintenance.copy import copy_versions  # noqa: PLC0415 (loads torch)

        if not isinstance(other, Upkept):
            raise InvalidInputError(f"other is {other!r}; open that repository, and pass it.")
        if isinstance(refs, str) or not isinstance(refs, Iterable | None):
            raise InvalidInputError(f"refs={refs!r} is no list of refs; pass one: [{refs!r}].")
        if other.catalog.repository.uid == self.catalog.repository.uid:
            raise InvalidInputError("source and target are the same repository.")
        with changing_repository(other.catalog), self.catalog.kept(), other.catalog.kept():
            return copy_versions(
                (self.catalog, self.storage),
                (other.catalog, other.storage),
                refs,
                author=this_user(),
            )
