"""The life of a version: begun as pending, then committed in one transaction, or aborted.

A pending version has no number and no ref, so nobody sees it (invariant 3). The transaction that
commits it first writes its content, beside those of other saves. Only then does it lock the
repository, and while every other mutation waits it decides the number, the parent, the new tip of
the branch and the tags. So the time under the lock does not grow with the version. A copy from
another repository keeps its uid, gets a new number, and moves no ref.

Invariant 5 (nothing that a version needs is deleted) holds without the lock, for what the content
is written beside is checked under it:

- Rows that the transaction has written are seen by nobody until it commits. If it fails, they are
  gone, so gc has nothing to clear.
- A row to which they refer by a foreign key cannot be deleted until then, on a server by its row
  locks, in a file because there is one writer.
- Gc condemns packs and moves chunks in transactions that record an operation. If there is one
  between the begin of the content and the lock, the content is written again under the lock.
- If another save wrote the same content at the same moment, the database refuses the second row,
  and again it is written under the lock.

A thread of the coordinator renews the lease of a running save as a heartbeat. Garbage collection
treats a save as crashed if it was silent for the length of its lease, and deletes what it wrote.
Invariant: the progress of a save is deleted when it ends, whether it commits, aborts or crashes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from sqlalchemy import (
    Connection,
    Row,
    cast,
    delete,
    exists,
    insert,
    literal,
    select,
    union_all,
    update,
)
from sqlalchemy.exc import IntegrityError

from dcpstore.catalog.db.key_lists import wanted_names
from dcpstore.catalog.db.together import sent_together
from dcpstore.catalog.db.transactions import OpenCatalog, reads, reads_once, writes
from dcpstore.catalog.read.ref_lookup import RefRow, find_refs
from dcpstore.catalog.read.versions import (
    INFO,
    STATS,
    WITHOUT_PARENT,
    Lineage,
    id_of_number,
    is_ancestor,
    lineages,
    load_version,
)
from dcpstore.catalog.schema import tables
from dcpstore.catalog.validation import can_be_kept, check_draft
from dcpstore.catalog.write.annotations import insert_labels, insert_metrics
from dcpstore.catalog.write.contents import Written, write_content
from dcpstore.catalog.write.forget import loosen
from dcpstore.catalog.write.operations import (
    LOCK,
    Change,
    Names,
    Recorded,
    insert_operations,
    lock_repository,
    made_version,
    raise_counters,
    record,
)
from dcpstore.catalog.write.refs import taken_error
from dcpstore.errors import ConflictError, DcpstoreError, NotFoundError
from dcpstore.records import (
    RankProgress,
    RunningSave,
    Version,
    VersionContent,
    VersionDraft,
    VersionInfo,
    VersionStats,
)

if TYPE_CHECKING:
    from dcpstore.catalog.catalog import Catalog

__all__ = [
    "abort_save",
    "advance_branch",
    "begin_copy",
    "begin_save",
    "commit_copy",
    "commit_save",
    "find_committed",
    "forget_progress",
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
T = TypeVar("T")


class _RacedError(Exception):
    """Gc ran while the content of a version was written: write it again, under the lock."""


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


def find_committed(connection: Connection, uid: str) -> Version | None:
    """Return the version of `uid` if it was committed, else None.

    If an earlier attempt to commit it still runs, the lock on its row makes this wait for the end.
    """
    row = _lock_save(connection, uid)
    return None if row.number is None else load_version(connection, row.id)


def begin_save(on: Connection | OpenCatalog, draft: VersionDraft) -> int:
    """Insert a pending version; return the number of its parent as of now, or 0 without one.

    The refs are checked so that a save which cannot be committed fails early; the commit checks
    them again.

    Raises:
        InvalidInputError: a name, step, metric or text is one that some database cannot store.
        AlreadyExistsError: a tag is taken, or the branch's name is a tag.
        NotFoundError: there is no version `draft.parent`.
        ConflictError: the branch's tip is not `draft.expect_tip`, or not `draft.parent`.
    """
    check_draft(draft)
    parent = None if draft.parent is None else id_of_number(on, draft.parent)
    refs = find_refs(on, [draft.branch, *draft.tags])
    _check_refs(refs, draft.branch, draft.tags)
    tip = refs.get(draft.branch)
    _check_tip(tip, draft.branch, parent=parent, expect_tip=draft.expect_tip)
    _insert_pending(on, draft, parent)
    return (draft.parent or 0) if tip is None else tip.number


def _insert_pending(on: Connection | OpenCatalog, draft: VersionDraft, parent: int | None) -> None:
    insert_pending = _insert_annotated if draft.metrics or draft.labels else _insert_plain
    insert_pending(on, draft, parent)


def find_begun(connection: Connection, draft: VersionDraft, parent: int | None) -> bool | None:
    """Return True if the version of a draft is in the catalog, else None.

    `@writes` asks this if the answer to a commit was lost; after None it runs the function again.
    """
    known = connection.scalar(select(_version.c.id).where(_version.c.uid == draft.uid))
    return None if known is None else True


@writes(find=find_begun, once=True)
def _insert_plain(connection: Connection, draft: VersionDraft, parent: int | None) -> bool:
    """Insert a pending version whose draft was checked; `parent` is an id."""
    now = datetime.now(UTC)
    connection.execute(
        insert(_version).values(
            **{name: getattr(draft, name) for name in INFO},
            status="pending",
            parent=parent,
            wanted_tags=draft.tags,
            expect_tip=draft.expect_tip,
            started_at=now,
            touched_at=now,
        )
    )
    return True


@writes(find=find_begun)
def _insert_annotated(connection: Connection, draft: VersionDraft, parent: int | None) -> bool:
    """Insert a pending version with its metrics and labels."""
    _insert_plain(connection, draft, parent)
    pending = connection.scalars(select(_version.c.id).where(_version.c.uid == draft.uid)).one()
    insert_metrics(connection, pending, draft.metrics)
    insert_labels(connection, {pending: draft.labels})
    return True


def commit_save(
    on: Connection | OpenCatalog, uid: str, content: VersionContent
) -> Recorded[Version]:
    """Make the version of `uid` visible with its entries, tensors and refs, in one transaction.

    Its packs and manifest must be durable already (invariant 2).

    Raises:
        ConflictError: the branch's tip is not the expected one, the save is not pending any more,
            or a chunk that it reuses is condemned or deleted.
        AlreadyExistsError: a tag was taken meanwhile.
        NotFoundError: no save of this uid was begun.
    """
    return _content_first(lambda lock_first: _commit_save(on, uid, content, lock_first))


def _content_first(commit: Callable[[bool], T]) -> T:
    """Commit with the content before the lock, and if that was raced, in the other order."""
    try:
        return commit(False)
    except _RacedError:
        pass
    except ConflictError as error:
        if not isinstance(error.__cause__, IntegrityError):  # else the database refused a row
            raise
    return commit(True)


def _find_saved(
    connection: Connection, uid: str, content: VersionContent, lock_first: bool
) -> Recorded[Version] | None:
    found = find_committed(connection, uid)
    return None if found is None else Recorded(found, are_next=False)


@writes(find=_find_saved)
def _commit_save(
    connection: Connection, uid: str, content: VersionContent, lock_first: bool
) -> Recorded[Version]:
    pending = _begin_content(connection, uid, lock_first=lock_first)
    written = write_content(connection, pending.id, content)
    changes = 1 + len(pending.wanted_tags)
    counters = raise_counters(connection, versions=1, operations=changes)
    _check_unraced(connection, pending, counters.last_operation - changes)
    refs, lines = _look_up_line(connection, pending)
    branch, tags = pending.info.branch, pending.wanted_tags
    _check_refs(refs, branch, tags)
    tip = refs.get(branch)
    _check_tip(tip, branch, parent=pending.parent, expect_tip=pending.expect_tip)
    parent = lines.get(pending.parent if tip is None else tip.id)
    stats = _stats_of(content)
    version = Version(
        number=counters.last_version,
        parent=None if parent is None else parent.number,
        **_facts(pending.info) | {"tags": tuple(sorted(tags))},
        **_facts(stats),
    )
    save = Change("save", branch, None if tip is None else tip.id, pending.id)
    # Each tag operation stores the number of the save's operation, so that undoing the save also
    # removes the tag.
    detail = {"save": counters.last_operation - len(tags)}
    tagged = [Change("tag", tag, None, pending.id, detail) for tag in tags]
    names: dict[int | None, Any] = {
        line.id: {"uid": line.uid, "version": line.number} for line in lines.values()
    }
    names[pending.id] = {"uid": uid, "version": version.number}
    with sent_together(connection):
        _make_visible(
            connection, pending.id, content, written, number=version.number, parent=parent
        )
        _move_refs(connection, pending, is_new_branch=tip is None)
        made = insert_operations(
            connection,
            counters,
            [save, *tagged],
            names,
            author=pending.info.author,
            at=stats.created_at,
            value=version,
        )
    made.entries[0]["version"] = made_version(
        pending.info,
        stats,
        number=version.number,
        parent=None if parent is None else parent.uid,
        started_at=pending.started_at,
        packs=[(pack.key, pack.nbytes) for pack in content.packs],
    )
    return made


class _Pending(NamedTuple):
    """A pending version, as the transaction that commits it found it at its begin.

    `parent` is an id, and `operation` the number of the last operation at that moment.
    """

    id: int
    info: VersionInfo
    wanted_tags: list[str]
    parent: int | None
    expect_tip: int | None
    started_at: datetime
    operation: int


def _begin_content(connection: Connection, uid: str, *, lock_first: bool) -> _Pending:
    """Return a save that is pending; nothing is locked, unless it shall be locked first.

    Raises:
        NotFoundError: no save of this uid was begun.
        ConflictError: it has ended.
    """
    if lock_first:
        lock_repository(connection)
    metric = tables.metric
    last_operation = select(tables.repository.c.last_operation).scalar_subquery()
    rows = connection.execute(
        select(_version, last_operation.label("operation"), metric.c.name, metric.c.value)
        .outerjoin(metric, metric.c.version == _version.c.id)
        .where(_version.c.uid == uid)
        .order_by(metric.c.name)
    ).all()
    if not rows:
        raise _not_begun(uid)
    row = rows[0]
    if row.status != "pending":
        raise _ended_error(row)
    metrics = {one.name: one.value for one in rows if one.name is not None}
    info = VersionInfo(**{name: getattr(row, name) for name in INFO}, metrics=metrics)
    return _Pending(
        row.id, info, row.wanted_tags, row.parent, row.expect_tip, row.started_at, row.operation
    )


def _check_unraced(connection: Connection, pending: _Pending, last_operation: int) -> None:
    """Check, under the lock, that gc did nothing since the content was begun.

    Raises:
        _RacedError: it did.
    """
    if last_operation == pending.operation:
        return
    operation = tables.operation
    since = operation.c.number.between(pending.operation + 1, last_operation)
    if connection.scalar(select(exists().where(since, operation.c.kind == "gc"))):
        raise _RacedError("gc ran at the same time")


def _look_up_line(
    connection: Connection, pending: _Pending
) -> tuple[dict[str, RefRow], dict[int | None, Lineage]]:
    """Return the refs of a save's names as they are now, and the lineages of their versions.

    The lineage of the parent that the save asked for is among them.

    Raises:
        ConflictError: the save is not pending any more.
    """
    ref = tables.ref
    names = wanted_names(connection, [pending.info.branch, *pending.wanted_tags])
    named = union_all(
        select(ref.c.name, ref.c.kind, ref.c.version.label("held")).where(ref.c.name.in_(names)),
        *(
            select(literal("", tables.Words), literal(kind, tables.Words), cast(held, tables.Key))
            for kind, held in (("pending", pending.id), ("parent", pending.parent))
            if held is not None
        ),
    ).subquery("named")
    rows = connection.execute(
        lineages()
        .add_columns(named.c.name, named.c.kind, _version.c.status)
        .join(named, named.c.held == _version.c.id)
    ).all()
    lines: dict[int | None, Lineage] = {}
    refs = {}
    for *facts, name, kind, status in rows:
        line = Lineage(*facts)
        if kind == "pending":
            if status != "pending":
                raise _ended_error(_lock_save(connection, pending.info.uid))
            continue
        lines[line.id] = line
        if name:
            assert line.number is not None, "refs name committed versions"
            refs[name] = RefRow(name, kind, line.id, line.number)
    return refs, lines


def _stats_of(content: VersionContent) -> VersionStats:
    stats = VersionStats(**{name: getattr(content, name) for name in STATS})
    return replace(stats, created_at=stats.created_at.astimezone(UTC))  # as a database returns it


def _facts(of: VersionInfo | VersionStats) -> dict[str, Any]:
    return {fact.name: getattr(of, fact.name) for fact in fields(of)}


def _make_visible(
    connection: Connection,
    version: int,
    content: VersionContent,
    written: Written,
    *,
    number: int,
    parent: Lineage | None,
    uid: str | None = None,
) -> None:
    """Give the pending version of id `version` its number, and what it refers to.

    Args:
        connection: in the transaction that commits the version.
        version: its id.
        content: what it holds.
        written: the rows of the content.
        number: its number.
        parent: its parent.
        uid: its new uid, if that changes.
    """
    connection.execute(
        update(_version)
        .where(_version.c.id == version)
        .values(
            status="committed",
            number=number,
            parent=None if parent is None else parent.id,
            **(WITHOUT_PARENT if parent is None else parent.below),
            **written._asdict(),
            planner_data=content.planner_data,
            **_facts(_stats_of(content)),
            touched_at=datetime.now(UTC),
            **({} if uid is None else {"uid": uid}),
        )
    )
    forget_progress(connection, version)


def _move_refs(connection: Connection, pending: _Pending, *, is_new_branch: bool) -> None:
    """Move the branch to the version, and tag the version."""
    ref = tables.ref
    rows = [{"name": tag, "kind": "tag", "version": pending.id} for tag in pending.wanted_tags]
    branch = pending.info.branch
    if is_new_branch:
        rows.append({"name": branch, "kind": "branch", "version": pending.id})
    else:
        connection.execute(update(ref).where(ref.c.name == branch).values(version=pending.id))
    if rows:
        connection.execute(insert(ref).values(rows))


@writes(idempotent=True, lock=LOCK)
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


def _lock_save(connection: Connection, uid: str) -> Row[Any]:
    """Return the row of a save, locked until this transaction ends."""
    row = connection.execute(
        select(_version).where(_version.c.uid == uid).with_for_update()
    ).one_or_none()
    if row is None:
        raise _not_begun(uid)
    return row


def _not_begun(uid: str) -> NotFoundError:
    return NotFoundError(f"no save {uid!r} was begun in this repository. Begin it first.")


def _ended_error(row: Row[Any]) -> ConflictError:
    """Return the error for a save that is not pending any more."""
    what = "aborted" if row.number is None else f"committed as v{row.number}"
    why = f" ({row.error})" if row.error else ""
    return ConflictError(f"the save {row.uid!r} is {what} already{why}. Save again.")


def _check_refs(refs: Mapping[str, RefRow], branch: str, tags: Sequence[str]) -> None:
    """Check that the tags are free, and that the name of the branch is not a tag.

    Raises:
        AlreadyExistsError: they are not.
    """
    for tag in tags:
        if tag in refs:
            raise taken_error(refs[tag], wanted="tag")
    if branch in refs and refs[branch].kind != "branch":
        raise taken_error(refs[branch], wanted="branch")


def _check_tip(
    tip: RefRow | None, branch: str, *, parent: int | None, expect_tip: int | None
) -> None:
    """Raise ConflictError if the tip is not `expect_tip` (a number), or not `parent` (an id)."""
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


@reads_once
def known_uids(connection: Connection, uids: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Return, by uid, the number and status of each of these versions that has a number."""
    rows = connection.execute(
        select(_version.c.uid, _version.c.number, _version.c.status).where(
            _version.c.uid.in_(wanted_names(connection, uids)), _version.c.number.is_not(None)
        )
    )
    return {row.uid: (row.number, row.status) for row in rows}


def begin_copy(on: OpenCatalog, draft: VersionDraft) -> None:
    """Insert a pending version that will become a copy.

    `draft.branch` is only text from the source repository: a copy moves no ref. A tag here may have
    that name.

    Raises:
        InvalidInputError: a name, step, metric or text is one that some database cannot store.
    """
    check_draft(draft)
    _insert_pending(on, draft, None)


def commit_copy(
    on: OpenCatalog,
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
    return _content_first(
        lambda lock_first: _commit_copy(
            on, uid, draft, content, parent=parent, lock_first=lock_first
        )
    )


def _find_copied(
    connection: Connection,
    uid: str,
    draft: VersionDraft,
    content: VersionContent,
    *,
    parent: str | None,
    lock_first: bool,
) -> Version | None:
    """Return the copy if it was committed, now under `draft.uid`; else None.

    A commit that still runs has locked the row, which it finds by the temporary `uid`, so the first
    query waits until that commit ends.
    """
    connection.execute(select(_version.c.id).where(_version.c.uid == uid).with_for_update())
    known = connection.scalar(select(_version.c.id).where(_version.c.uid == draft.uid))
    return None if known is None else find_committed(connection, draft.uid)


@writes(find=_find_copied)
def _commit_copy(
    connection: Connection,
    uid: str,
    draft: VersionDraft,
    content: VersionContent,
    *,
    parent: str | None,
    lock_first: bool,
) -> Version:
    pending = _begin_content(connection, uid, lock_first=lock_first)
    _check_uncopied(connection, draft.uid)  # else its content would be in the way of this one
    written = write_content(connection, pending.id, content)
    counters = raise_counters(connection, versions=1, operations=1)
    _check_unraced(connection, pending, counters.last_operation - 1)
    _check_uncopied(connection, draft.uid)
    row = _lock_save(connection, uid)
    if row.status != "pending":
        raise _ended_error(row)
    above = connection.execute(
        lineages().where(_version.c.uid == parent, _version.c.number.is_not(None))
    ).one_or_none()
    _make_visible(
        connection,
        pending.id,
        content,
        written,
        number=counters.last_version,
        parent=None if above is None else Lineage(*above),
        uid=draft.uid,
    )
    names: Names = {pending.id: {"uid": draft.uid, "version": counters.last_version}}
    change = Change("copy", new=pending.id)
    insert_operations(connection, counters, [change], names, author=draft.author, value=None)
    return load_version(connection, pending.id)


def _check_uncopied(connection: Connection, uid: str) -> None:
    if known_uids(connection, [uid]):
        raise ConflictError(f"another process copied the version {uid} meanwhile.")


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
