"""Versions that come from another repository: the uid stays, the number is new."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from sqlalchemy import Connection, select, update

from dcpstore.catalog.db.key_lists import wanted_names
from dcpstore.catalog.db.transactions import reads, writes
from dcpstore.catalog.read.ancestors import is_ancestor, lineage_below
from dcpstore.catalog.read.ref_lookup import find_refs
from dcpstore.catalog.read.versions import id_of_number, load_versions
from dcpstore.catalog.schema import tables
from dcpstore.catalog.validation import check_draft
from dcpstore.catalog.write.contents import write_content, write_plan
from dcpstore.catalog.write.operations import (
    Change,
    append_operations,
    take_operations,
    take_version,
)
from dcpstore.catalog.write.saves import find_begun, find_committed, insert_pending
from dcpstore.errors import ConflictError
from dcpstore.records import Version, VersionContent, VersionDraft

__all__ = ["advance_branch", "begin_copy", "commit_copy", "find_copied", "known_uids"]

_version = tables.version


@reads
def known_uids(connection: Connection, uids: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Return the number and the status of versions that have a number, by uid."""
    rows = connection.execute(
        select(_version.c.uid, _version.c.number, _version.c.status).where(
            _version.c.uid.in_(wanted_names(connection, uids)), _version.c.number.is_not(None)
        )
    )
    return {row.uid: (row.number, row.status) for row in rows}


@writes(find=find_begun)
def begin_copy(connection: Connection, draft: VersionDraft) -> bool:
    """Insert a pending version that is to be a copy; return True.

    Its branch says where it was saved in its own repository, and may be the name of a tag in this
    one: a copy moves no ref.

    Raises:
        InvalidInputError: a name, step, metric or text cannot be kept.
    """
    check_draft(draft)
    insert_pending(connection, draft, parent=None)
    return True


def find_copied(
    connection: Connection,
    uid: str,
    draft: VersionDraft,
    content: VersionContent,
    *,
    parent: str | None,
) -> Version | None:
    """Return the copy that `commit_copy` was to make of `uid`, once its transaction has ended."""
    connection.execute(select(_version.c.id).where(_version.c.uid == uid).with_for_update())
    known = connection.scalar(select(_version.c.id).where(_version.c.uid == draft.uid))
    return None if known is None else find_committed(connection, draft.uid)


@writes(find=find_copied)
def commit_copy(
    connection: Connection,
    uid: str,
    draft: VersionDraft,
    content: VersionContent,
    *,
    parent: str | None,
) -> Version:
    """Make the pending version `uid` visible under the uid of `draft`; no ref moves.

    `parent` is a uid; where this repository does not hold it, the copy has no parent.

    Raises:
        ConflictError: the version came in meanwhile, or the copy was given up as crashed.
    """
    number = take_version(connection)
    if known_uids(connection, [draft.uid]):
        raise ConflictError(f"the version {draft.uid} was copied by someone else meanwhile.")
    pending = connection.scalar(
        select(_version.c.id).where(_version.c.uid == uid, _version.c.status == "pending")
    )
    if pending is None:
        raise ConflictError(f"the copy {uid} is not pending any more; copy again.")
    parent_id = connection.scalar(
        select(_version.c.id).where(_version.c.uid == parent, _version.c.number.is_not(None))
    )
    connection.execute(
        update(_version)
        .where(_version.c.id == pending)
        .values(
            uid=draft.uid,
            status="committed",
            number=number,
            parent=parent_id,
            **lineage_below(connection, parent_id),
            plan=write_plan(connection, content.plan),
            planner_data=content.planner_data,
            nbytes=content.nbytes,
            nbytes_written=content.nbytes_written,
            nbytes_reused=content.nbytes_reused,
            seconds=content.seconds,
            touched_at=datetime.now(UTC),
            created_at=content.created_at,
        )
    )
    write_content(connection, pending, content)
    change = Change("copy", "", None, pending)
    append_operations(
        connection,
        take_operations(connection),
        [change],
        author=draft.author,
        at=datetime.now(UTC),
    )
    (version,) = load_versions(
        connection, select(_version.c.id).where(_version.c.id == pending), limit=1
    )
    return version


@writes()
def advance_branch(connection: Connection, name: str, number: int, *, author: str) -> bool:
    """Move a branch on to a version below its tip; False where that is none, or no branch is."""
    first = take_operations(connection, 0)
    tip = find_refs(connection, [name]).get(name)
    if tip is None or tip.kind != "branch":
        return False
    target = id_of_number(connection, number)
    if tip.id == target or not is_ancestor(connection, tip.id, of=target):
        return tip.id == target
    connection.execute(update(tables.ref).where(tables.ref.c.name == name).values(version=target))
    assert take_operations(connection) == first
    change = Change("copy", name, tip.id, target)
    append_operations(connection, first, [change], author=author, at=datetime.now(UTC))
    return True
