"""A version from its begin, as pending, to the one transaction that makes it visible.

Invariant: plan, page and manifest are durable before that transaction (design, invariants 2 and 3).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.maintenance.journal import write_journal
from dcpstore.catalog.maintenance.retention import retain
from dcpstore.catalog.read.entries import load_entries
from dcpstore.catalog.read.ref_lookup import resolve
from dcpstore.catalog.write.operations import Recorded
from dcpstore.catalog.write.saves import abort_save, begin_save, commit_save
from dcpstore.core.uids import new_uid
from dcpstore.core.user import this_user
from dcpstore.encoding.values import encode_value
from dcpstore.errors import ConflictError, DcpstoreError, NotFoundError
from dcpstore.records import EntryRecord, ObjectPath, PackRecord, SentRef, Version
from dcpstore.saving.plan_exchange import PlanMemory
from dcpstore.saving.request import SaveRequest, draft_of
from dcpstore.saving.save_state import SaveState
from dcpstore.storage.interface import Storage
from dcpstore.zarr.stored_references import keep_reference
from dcpstore.zarr.version_objects import write_objects

__all__ = [
    "BegunVersion",
    "SaveTarget",
    "checked_planner_data",
    "entries_of_parent",
]


_ATTEMPTS = 4  # to commit what other saves and gc may change at the same time


@dataclass(frozen=True, slots=True)
class SaveTarget:
    """The parts of a repository that a save writes to, and what this process has cached of it.

    `location` is what torch's planners get as `checkpoint_id`.
    """

    catalog: Catalog
    storage: Storage
    memory: PlanMemory
    location: str | Path


def entries_of_parent(target: SaveTarget, number: int) -> tuple[int, Mapping[str, EntryRecord]]:
    """Return the number of the parent, and its entries by FQN, whose grids are kept.

    Without a parent they are 0 and no entries. The entries of a version that this process saved
    lately come from its cache, in which tensors have no ids.
    """
    if not number:
        return 0, {}
    try:
        entries = target.memory.entries.get(number)
        if entries is None:
            entries = {entry.fqn: entry for entry in load_entries(target.catalog, number)}
        return number, entries
    except NotFoundError:
        # Forgotten or expired meanwhile. Only grids are lost; the commit checks the parent again.
        return 0, {}


def checked_planner_data(
    given: object, recorded: Mapping[str, ObjectPath] = MappingProxyType({})
) -> tuple[Mapping[str, ObjectPath], str | None]:
    """Return what a planner gives as `planner_data`: as object paths, or else as typed JSON.

    If its paths are those that our planner has `recorded`, these are returned: they also say what
    kinds of containers they lead through.

    Raises:
        UnsafeDataError: storing it would need pickle.
    """
    if given is None:
        return {}, None
    if given == recorded:  # a path with marks equals the plain tuple that torch sends
        return recorded, None
    if isinstance(given, Mapping) and all(map(_is_path, given.values())):
        return given, None
    # Never as a pickle: every load through torch decodes it, even one that allows none.
    encoded = encode_value(given, allow_pickle=False)
    return {}, encoded.text if encoded.data is None else encoded.data.decode()


def _is_path(given: object) -> bool:
    return isinstance(given, tuple) and all(type(key) in (str, int) for key in given)


class BegunVersion:
    """A version from its begin until it is committed or aborted; only the coordinator has one.

    It holds no open catalog, so that torch's writer can keep it from one call to the next.

    Attributes:
        draft: as it was begun.
        parent: the number of the version that would be its parent as of the begin; 0 for none.
        is_pending: whether it is neither committed nor aborted.
    """

    def __init__(
        self, target: SaveTarget, request: SaveRequest, *, ranks: int, uid: str | None = None
    ) -> None:
        """Begin a version, as pending.

        Raises:
            NotFoundError: `parent` or `expect_tip` names nothing.
            ConflictError, AlreadyExistsError: as the catalog finds the refs.
        """
        self.draft = replace(
            draft_of(request, author=request.author or this_user()),
            uid=uid or new_uid(),
            host=socket.gethostname(),
            ranks=ranks,
            parent=_number_of(target.catalog, request.parent),
            expect_tip=_number_of(target.catalog, request.expect_tip),
        )
        self._retention = request.retention
        self.parent = begin_save(target.catalog, self.draft)
        self.is_pending = True

    def commit(
        self,
        target: SaveTarget,
        state: SaveState,
        *,
        packs: Sequence[PackRecord],
        seconds: dict[str, float],
        planner_data: str | None,
    ) -> Version:
        """Write page and manifest and commit, then apply retention; the packs are durable already.

        Raises:
            ConflictError: the branch moved, or gc deleted what the save reuses; save again.
            AlreadyExistsError: a tag was taken meanwhile.
        """

        def publish() -> Recorded[Version]:
            began = time.perf_counter()
            content = state.content(packs=packs, seconds=seconds, planner_data=planner_data)
            content = write_objects(target.catalog, target.storage, self.draft, content)
            seconds["manifest"] = time.perf_counter() - began
            made = commit_save(target.catalog, self.draft.uid, content)
            # The next save keeps the grids of these entries.
            target.memory.entries.put(made.value.number, state.records())
            assert content.tree is not None
            target.memory.trees.put(made.value.number, content.tree)
            return made

        for attempt in range(_ATTEMPTS):
            try:
                made = publish()
                break
            except ConflictError:
                # gc may have moved chunks that the save reuses, or other saves may have committed
                # the same entries meanwhile. Another page and manifest name what is there now; any
                # other conflict is raised again.
                if attempt == _ATTEMPTS - 1:
                    raise
        version = made.value
        # If this process ends here, the next change of the repository writes the journal entry.
        write_journal(target.catalog, target.storage, made)
        self.is_pending = False
        if version.tags:
            keep_reference(target.storage, version.uid)
        if self._retention is not None:
            retain(target.catalog, self._retention, branch=version.branch, author=version.author)
            write_journal(target.catalog, target.storage)
        return version

    def abort(self, catalog: Catalog, reason: str) -> None:
        """Mark a pending version as aborted, with the reason; do nothing if it has ended already.

        Raises:
            DcpstoreError: the catalog could not record it.
        """
        if self.is_pending:
            self.is_pending = False  # even if the catalog fails now: gc clears it then
            abort_save(catalog, self.draft.uid, reason)

    def abort_for(self, catalog: Catalog, error: BaseException) -> None:
        """Abort because of `error`; if the catalog cannot record it, add a note to `error`."""
        try:
            self.abort(catalog, f"{type(error).__name__}: {error}")
        except DcpstoreError as second:
            error.add_note(f"the catalog could not record that the save failed: {second}")


def _number_of(catalog: Catalog, ref: SentRef | None) -> int | None:
    return None if ref is None else resolve(catalog, ref).number
