"""`Upkeep`: the catalog's side of expire, gc, verify and copy; each method is one transaction."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from dcpstore.catalog.db.database import Database
from dcpstore.catalog.maintenance import condemn as garbage
from dcpstore.catalog.maintenance import expire as retention
from dcpstore.catalog.maintenance import export as exporting
from dcpstore.catalog.maintenance import fsck as checking
from dcpstore.catalog.maintenance import journal
from dcpstore.catalog.maintenance.condemn import Condemned
from dcpstore.catalog.maintenance.expire import Choose
from dcpstore.catalog.maintenance.fsck import Fault, PackedChunk, PackState, Reached
from dcpstore.catalog.write import copied as copying
from dcpstore.catalog.write import saves
from dcpstore.records import ForgetReport, PackRecord, Version, VersionContent, VersionDraft

__all__ = ["Upkeep"]


class Upkeep:
    """Made by `Catalog.upkeep`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # Expire

    def expire(self, choose: Choose, *, author: str, rules: Mapping[str, Any]) -> None:
        """Expire the versions that `choose` chooses among all."""
        self._database.change(retention.expire_versions, choose, author=author, rules=rules)

    def forget(
        self, refs: Iterable[str | int], *, force: bool, dry_run: bool, author: str
    ) -> ForgetReport:
        """Forget the versions that refs name; with `force`, tagged ones too."""
        return self._database.change(
            retention.forget_versions, refs, force=force, dry_run=dry_run, author=author
        )

    # Gc

    def condemn(
        self,
        *,
        now: datetime,
        grace: timedelta,
        lease: timedelta,
        live_share: float,
        author: str,
        dry_run: bool,
    ) -> Condemned:
        """Condemn what nothing reaches, or tell with `dry_run` what would be.

        Raises:
            InvalidInputError: a save is running that is older than `grace`.
        """
        with self._database.write() as connection, connection.begin_nested() as step:
            found = garbage.condemn(
                connection,
                now=now,
                grace=grace,
                lease=lease,
                live_share=live_share,
                author=author,
            )
            if dry_run:
                step.rollback()
            return found

    def plan_pack(self, old: str, new: str, *, now: datetime) -> bool:
        """Announce a pack that takes over the live chunks of another; False: that one is gone."""
        return self._database.change(garbage.plan_pack, old, new, now=now)

    def unplan_pack(self, key: str) -> None:
        """Take back the announcement of a pack that was not written."""
        self._database.change_again(garbage.unplan_pack, key)

    def switch_pack(
        self, old: str, new: PackRecord, moves: Mapping[int, int], *, now: datetime, author: str
    ) -> bool:
        """Let the chunks of `old` lie in `new`, by offsets old to new; False: nothing changed."""
        return self._database.change(garbage.switch_pack, old, new, moves, now=now, author=author)

    def find_doomed(self, *, before: datetime) -> list[PackRecord]:
        """Return packs condemned before a time, whose bytes may go."""
        return self._database.ask(garbage.find_doomed, before=before)

    def forget_packs(self, keys: Sequence[str], *, now: datetime, author: str) -> None:
        """Remove the rows of condemned packs whose bytes are gone."""
        self._database.change(garbage.forget_packs, keys, now=now, author=author)

    def find_leftovers(
        self,
        keys: Iterable[tuple[str, str]],
        *,
        crashed: Collection[str],
        dropped: Collection[str],
        expired_before: datetime,
    ) -> tuple[list[str], list[str]]:
        """Sort stored objects, each with the uid in its name: may go, and unknown."""
        return self._database.ask(
            garbage.find_leftovers,
            list(keys),
            crashed=crashed,
            dropped=dropped,
            expired_before=expired_before,
        )

    # Manifests written anew

    def content(self, number: int) -> tuple[VersionDraft, VersionContent]:
        """Return a version whole, as its chunks lie now."""
        return self._database.ask(exporting.load_content, number)

    def stale_versions(self) -> dict[int, str]:
        """Return the versions whose manifest names places of the past, each with a mark."""
        return self._database.ask(exporting.stale_versions)

    def clear_stale(self, number: int, mark: str) -> bool:
        """Note that a manifest was written anew; False if chunks moved since `mark` was read."""
        return self._database.change(exporting.clear_stale, number, mark)

    def mark_stale(self, number: int) -> None:
        """Note that the manifest of a version is to be written anew."""
        self._database.change_again(exporting.mark_version_stale, number)

    def lineage(self, number: int) -> list[str]:
        """Return the uids of the ancestors of a version, the parent first."""
        return self._database.ask(exporting.lineage, number)

    # Verify

    def inspect(self) -> list[Fault]:
        """Return what breaks the catalog's own rules."""
        return self._database.ask(checking.inspect)

    def packs(self) -> list[PackState]:
        """Return every pack that chunks of committed versions lie in."""
        return self._database.ask(checking.list_packs)

    def packed_chunks(self, key: str) -> list[PackedChunk]:
        """Return the chunks that lie in a pack, each place once, by offset."""
        return self._database.ask(checking.packed_chunks, key)

    def reached(self, key: str, offsets: Sequence[int] | None) -> list[Reached]:
        """Return the entries whose chunks lie in a pack, at `offsets` or anywhere."""
        return self._database.ask(checking.reached, key, offsets)

    def reached_by_tensor(self, tensor: int) -> list[Reached]:
        """Return the entries that have a tensor."""
        return self._database.ask(checking.reached_by_tensor, tensor)

    def mark_pack(self, key: str, *, damage: str | None, verified_at: datetime | None) -> None:
        """Note what a look at a pack found; `verified_at` after every digest was looked at."""
        self._database.change_again(checking.mark_pack, key, damage=damage, verified_at=verified_at)

    def begin_verify(self, *, resume: bool, now: datetime) -> datetime:
        """Return when the deep verify began that is running, or that `resume` goes on with."""
        return self._database.change_again(checking.begin_verify, resume=resume, now=now)

    def end_verify(self) -> None:
        """Note that a deep verify came to its end."""
        self._database.change_again(checking.end_verify)

    def last_journaled(self) -> int:
        """Return the last operation that is known to be in the data folder."""
        return self._database.ask(journal.last_journaled)

    def journal_again(self, number: int) -> None:
        """Have the next change write the operations from `number` on once more."""
        self._database.change_again(journal.journal_again, number)

    # Copy

    def known_uids(self, uids: Iterable[str]) -> dict[str, tuple[int, str]]:
        """Return the number and status of numbered versions by uid."""
        return self._database.ask(copying.known_uids, list(uids))

    def begin_copy(self, draft: VersionDraft) -> None:
        """Store a version as pending that is to be a copy; its branch is no ref here."""
        self._database.change_once(
            lambda connection: copying.begin_copy(connection, draft),
            lambda connection: saves.find_begun(connection, draft.uid),
        )

    def commit_copy(
        self, uid: str, draft: VersionDraft, content: VersionContent, *, parent: str | None
    ) -> Version:
        """Make the pending version `uid` visible as a copy of the one that `draft` describes."""
        return self._database.change_once(
            lambda connection: copying.commit_copy(connection, uid, draft, content, parent=parent),
            lambda connection: copying.find_copied(connection, uid, draft.uid),
        )

    def advance_branch(self, name: str, number: int, *, author: str) -> bool:
        """Move a branch on to a version below its tip; False where it does not lie below it."""
        return self._database.change(copying.advance_branch, name, number, author=author)
