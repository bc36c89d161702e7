"""The life of a version: begun as pending, then committed in one transaction, or aborted.

A pending version has no number and no ref, so nobody sees it (invariant 3). Its number, its parent,
the new tip of the branch and its tags are decided while every other mutation waits. A copy from
another repository keeps its uid, gets a new number, and moves no ref.

A thread of the coordinator renews the lease of a running save as a heartbeat. Garbage collection
treats a save as crashed if it was silent for the length of its lease, and deletes what it wrote.
Invariant: the progress of a save is deleted when it ends, whether it commits, aborts or crashes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from dcpstore.catalog.db.key_lists import wanted_names
from dcpstore.catalog.db.transactions import reads, writes
from dcpstore.catalog.read.ref_lookup import RefRow, find_refs
from dcpstore.catalog.read.versions import (
    INFO,
    STATS,
    id_of_number,
    is_ancestor,
    lineage_below,
    load_version,
)
from dcpstore.catalog.schema import tables
from dcpstore.catalog.validation import can_be_kept, check_draft
from dcpstore.catalog.write.annotations import insert_metrics
from dcpstore.catalog.write.contents import write_content, write_plan
from dcpstore.catalog.write.forget import loosen
from dcpstore.catalog.write.operations import Change, lock_repository, record, take_version
from dcpstore.catalog.write.pages import write_objects
from dcpstore.catalog.write.refs import taken_error
from dcpstore.errors import ConflictError, DcpstoreError, NotFoundError
from dcpstore.records import RankProgress, RunningSave, Version, VersionContent, VersionDraft

if TYPE_CHECKING:
    from dcpstore.catalog.catalog import Catalog

__all__ = [
    "abort_save",
    "advance_branch",
    "begin_copy",
    "begin_save",
    "commit_copy",
    "commit_save",
    "find_begun",
    "find_committed",
    "find_copied",
    "forget_progress",
    "insert_pending",
    "kept_lease",
    "known_uids",
    "list_running",
    "touch_save",
]

_log = logging.getLogger(__name__)
_FIRST_RENEWAL = 1.0  # seconds; a shorter save costs the database no renewal
_RENEW_EVERY = 10.0  # seconds; by default gc treats an hour of silence as a crash

_version = tables.version
_progress = tables.progress


@writes(idempotent=True)
def touch_save(connection: Connection, uid: str, progress: Sequence[RankProgress] = ()) -> None:
    """Renew the lease of a pending save, and store the progress of its ranks."""
    pending = connection.scalar(
        update(_version)
        .where(_version.c.uid == uid, _version.c.status == "pending")
        .values(touched_at=datetime.now(UTC))
        .returning(_version.c.id)
    )
    if pending is not None and progress:
        forget_progress(connection, pending)
        connection.execute(
            insert(_progress), [{"version": pending, **asdict(one)} for one in progress]
        )


def forget_progress(connection: Connection, version: int) -> None:
    """Delete the progress of a save that has ended."""
    connection.execute(delete(_progress).where(_progress.c.version == version))


@reads
def list_running(connection: Connection) -> list[RunningSave]:
    """Return the saves that have begun and not ended, the oldest first."""
    rows = connection.execute(
        select(_version).where(_version.c.status == "pending").order_by(_version.c.started_at)
    ).all()
    by_version: dict[int, list[RankProgress]] = {row.id: [] for row in rows}
    for row in connection.execute(select(_progress).order_by(_progress.c.rank)):
        if row.version in by_version:  # else the save crashed, and gc has aborted it
            by_version[row.version].append(
                RankProgress(row.rank, row.phase, row.nbytes, row.total, row.since)
            )
    return [
        RunningSave(
            uid=row.uid,
            branch=row.branch,
            step=row.step,
            author=row.author,
            host=row.host,
            ranks=row.ranks,
            started_at=row.started_at,
            touched_at=row.touched_at,
            progress=tuple(by_version[row.id]),
        )
        for row in rows
    ]


@contextmanager
def kept_lease(
    catalog: Catalog,
    uid: str,
    *,
    progress: Callable[[], Sequence[RankProgress]] = tuple,
    seconds: float = _RENEW_EVERY,
) -> Iterator[None]:
    """Renew the lease of the pending version `uid` until the block ends.

    Each renewal also writes the `progress` of the ranks. A connection to the catalog is kept for
    the queries of the save.
    """
    ended = threading.Event()

    def renew() -> None:
        pause = min(_FIRST_RENEWAL, seconds)
        while not ended.wait(pause):
            pause = seconds
            try:
                touch_save(catalog, uid, progress())
            except DcpstoreError as error:
                _log.warning("the lease of the save %s was not renewed: %s", uid, error)

    thread = threading.Thread(target=renew, name="dcpstore-lease", daemon=True)
    thread.start()
    try:
        with catalog.keep_connection():
            yield
    finally:
        ended.set()
        thread.join()


def find_begun(connection: Connection, draft: VersionDraft) -> bool | None:
    """Return True if the version of a draft is in the catalog, else None.

    `@writes` asks this if the answer to a commit was lost; after None it runs the function again.
    """
    known = connection.scalar(select(_version.c.id).where(_version.c.uid == draft.uid))
    return None if known is None else True


def find_committed(connection: Connection, uid: str) -> Version | None:
    """Return the version of `uid` if it was committed, else None.

    If an earlier attempt to commit it still runs, the lock on its row makes this wait for the end.
    """
    row = _lock_save(connection, uid)
    return None if row.number is None else load_version(connection, row.id)


@writes(find=find_begun)
def begin_save(connection: Connection, draft: VersionDraft) -> bool:
    """Insert a pending version; return True.

    Raises:
        InvalidInputError: a name, step, metric or text is one that some database cannot store.
        AlreadyExistsError: a tag is taken, or the branch's name is a tag.
        NotFoundError: there is no version `draft.parent`.
        ConflictError: the branch's tip is not `draft.expect_tip`, or not `draft.parent`.
    """
    check_draft(draft)
    parent = None if draft.parent is None else id_of_number(connection, draft.parent)
    refs = _check_refs(connection, draft.branch, draft.tags)
    _check_tip(refs, draft.branch, parent=parent, expect_tip=draft.expect_tip)
    insert_pending(connection, draft, parent=parent)
    return True


def insert_pending(connection: Connection, draft: VersionDraft, *, parent: int | None) -> None:
    """Insert a pending version whose draft was checked; `parent` is an id."""
    now = datetime.now(UTC)
    pending = connection.execute(
        insert(_version)
        .values(
            **{name: getattr(draft, name) for name in INFO},
            status="pending",
            parent=parent,
            wanted_tags=draft.tags,
            expect_tip=draft.expect_tip,
            started_at=now,
            touched_at=now,
        )
        .returning(_version.c.id)
    ).scalar_one()
    insert_metrics(connection, pending, draft.metrics)


@writes(find=lambda connection, uid, content: find_committed(connection, uid))
def commit_save(connection: Connection, uid: str, content: VersionContent) -> Version:
    """Make the version of `uid` visible with its entries, tensors and refs, in one transaction.

    Its packs and manifest must be durable already (invariant 2).

    Raises:
        ConflictError: the branch's tip is not the expected one, the save is not pending any more,
            or a chunk that it reuses is condemned or deleted.
        AlreadyExistsError: a tag was taken meanwhile.
        NotFoundError: no save of this uid was begun.
    """
    number = take_version(connection)
    pending = _lock_save(connection, uid)
    if pending.status != "pending":
        raise _ended_error(pending)
    tags: list[str] = pending.wanted_tags
    refs = _check_refs(connection, pending.branch, tags)
    _check_tip(refs, pending.branch, parent=pending.parent, expect_tip=pending.expect_tip)
    tip = refs.get(pending.branch)
    parent = pending.parent if tip is None else tip.id
    _make_visible(connection, pending.id, content, number=number, parent=parent)
    forget_progress(connection, pending.id)
    _name(connection, pending, tip, tags, at=content.created_at)
    return load_version(connection, pending.id)


def _make_visible(
    connection: Connection,
    version: int,
    content: VersionContent,
    *,
    number: int,
    parent: int | None,
    uid: str | None = None,
) -> None:
    """Write the content of the pending version of id `version`, and give it its number.

    Args:
        connection: in the transaction that commits the version.
        version: its id.
        content: what it holds.
        number: its number.
        parent: the id of its parent.
        uid: its new uid, if that changes.
    """
    root = write_content(connection, version, content)
    connection.execute(
        update(_version)
        .where(_version.c.id == version)
        .values(
            status="committed",
            root=root,
            number=number,
            parent=parent,
            **lineage_below(connection, parent),
            plan=write_plan(connection, content.plan),
            planner_data=content.planner_data,
            **{name: getattr(content, name) for name in STATS},
            touched_at=datetime.now(UTC),
            **({} if uid is None else {"uid": uid}),
        )
    )
    if content.objects is not None:
        write_objects(connection, version, content.objects)


@writes(idempotent=True)
def abort_save(connection: Connection, uid: str, error: str) -> None:
    """Abort a pending version and store the reason; it may be called again.

    Raises:
        NotFoundError: no save of this uid was begun.
        ConflictError: it is committed.
    """
    row = _lock_save(connection, uid)
    if row.status == "aborted":
        return
    if row.number is not None:
        raise _ended_error(row)
    connection.execute(
        update(_version)
        .where(_version.c.id == row.id)
        .values(
            status="aborted",
            error=error if can_be_kept(error) else ascii(error),
            touched_at=datetime.now(UTC),
        )
    )
    loosen(connection, select(_version.c.id).where(_version.c.id == row.id))
    forget_progress(connection, row.id)


def _name(
    connection: Connection, pending: Row[Any], tip: RefRow | None, tags: list[str], *, at: datetime
) -> None:
    """Move the branch to the version, tag the version, and record both."""
    ref = tables.ref
    rows = [{"name": tag, "kind": "tag", "version": pending.id} for tag in tags]
    if tip is None:
        rows.append({"name": pending.branch, "kind": "branch", "version": pending.id})
    else:
        connection.execute(
            update(ref).where(ref.c.name == pending.branch).values(version=pending.id)
        )
    if rows:
        connection.execute(insert(ref), rows)
    change = Change("save", pending.branch, None if tip is None else tip.id, pending.id)
    # Each tag operation stores the number of the save's operation, so that undoing the save also
    # removes the tag.
    detail = {"save": lock_repository(connection) + 1}
    tagged = [Change("tag", tag, None, pending.id, detail) for tag in tags]
    record(connection, change, *tagged, author=pending.author, at=at)


def _lock_save(connection: Connection, uid: str) -> Row[Any]:
    """Return the row of a save, locked until this transaction ends."""
    row = connection.execute(
        select(_version).where(_version.c.uid == uid).with_for_update()
    ).one_or_none()
    if row is None:
        raise NotFoundError(f"no save {uid!r} was begun in this repository. Begin it first.")
    return row


def _ended_error(row: Row[Any]) -> ConflictError:
    """Return the error for a save that is not pending any more."""
    what = "aborted" if row.number is None else f"committed as v{row.number}"
    why = f" ({row.error})" if row.error else ""
    return ConflictError(f"the save {row.uid!r} is {what} already{why}. Save again.")


def _check_refs(
    connection: Connection, branch: str, tags: list[str] | tuple[str, ...]
) -> dict[str, RefRow]:
    """Check that the tags are free; return {branch: its ref}, or {} if there is no branch yet.

    Raises:
        AlreadyExistsError: a tag is taken, or the name of the branch is a tag.
    """
    refs = find_refs(connection, [branch, *tags])
    for tag in tags:
        if tag in refs:
            raise taken_error(refs[tag], wanted="tag")
    if branch in refs and refs[branch].kind != "branch":
        raise taken_error(refs[branch], wanted="branch")
    return refs


def _check_tip(
    refs: dict[str, RefRow], branch: str, *, parent: int | None, expect_tip: int | None
) -> None:
    """Raise ConflictError if the tip is not `expect_tip` (a number), or not `parent` (an id)."""
    tip = refs.get(branch)
    now = "has no version yet" if tip is None else f"is at v{tip.number}"
    if expect_tip is not None and (tip is None or tip.number != expect_tip):
        raise ConflictError(
            f"the branch {branch!r} {now}, not at v{expect_tip} as expect_tip says. "
            "Look at what changed it, then save with the new tip."
        )
    if parent is not None and tip is not None and tip.id != parent:
        raise ConflictError(
            f"the branch {branch!r} {now}, which is not the parent that was given. Leave parent= "
            "out to follow the tip, or save to a new branch."
        )


@reads
def known_uids(connection: Connection, uids: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Return, by uid, the number and status of each of these versions that has a number."""
    rows = connection.execute(
        select(_version.c.uid, _version.c.number, _version.c.status).where(
            _version.c.uid.in_(wanted_names(connection, uids)), _version.c.number.is_not(None)
        )
    )
    return {row.uid: (row.number, row.status) for row in rows}


@writes(find=find_begun)
def begin_copy(connection: Connection, draft: VersionDraft) -> bool:
    """Insert a pending version that will become a copy; return True.

    `draft.branch` is only text from the source repository: a copy moves no ref. A tag here may have
    that name.

    Raises:
        InvalidInputError: a name, step, metric or text is one that some database cannot store.
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
    """Return the copy if it was committed, now under `draft.uid`; else None.

    A commit that still runs has locked the row, which it finds by the temporary `uid`, so the first
    query waits until that commit ends.
    """
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

    `parent` is a uid; if this repository does not hold that version, the copy has no parent.

    Raises:
        ConflictError: another process copied the version meanwhile, or gc aborted the copy.
    """
    number = take_version(connection)
    if known_uids(connection, [draft.uid]):
        raise ConflictError(f"another process copied the version {draft.uid} meanwhile.")
    pending = connection.scalar(
        select(_version.c.id).where(_version.c.uid == uid, _version.c.status == "pending")
    )
    if pending is None:
        raise ConflictError(f"the copy {uid} is not pending any more; copy again.")
    parent_id = connection.scalar(
        select(_version.c.id).where(_version.c.uid == parent, _version.c.number.is_not(None))
    )
    _make_visible(connection, pending, content, number=number, parent=parent_id, uid=draft.uid)
    record(connection, Change("copy", new=pending), author=draft.author)
    return load_version(connection, pending)


@writes()
def advance_branch(connection: Connection, name: str, number: int, *, author: str) -> bool:
    """Move a branch forward to a descendant of its tip; return whether it is there now.

    False means that there is no such branch, or that the version does not descend from its tip.
    """
    lock_repository(connection)
    tip = find_refs(connection, [name]).get(name)
    if tip is None or tip.kind != "branch":
        return False
    target = id_of_number(connection, number)
    if tip.id == target or not is_ancestor(connection, tip.id, of=target):
        return tip.id == target
    connection.execute(update(tables.ref).where(tables.ref.c.name == name).values(version=target))
    record(connection, Change("copy", name, tip.id, target), author=author)
    return True
