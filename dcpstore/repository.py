"""`Repository`: one catalog and one chunk storage, as users hold them.

Importing this module leaves torch and zarr unloaded; only what reads tensors loads them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import datetime, timedelta
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.db.sqlite_file import CATALOG_FILE
from dcpstore.catalog.location import absolute_data, absolute_target, check_path, locate
from dcpstore.catalog.maintenance.journal import (
    changing_repository,
    journaled,
    recorded,
    write_journal,
)
from dcpstore.catalog.read.entries import load_chunks, load_entries
from dcpstore.catalog.read.log_filter import LogFilter, best_version, list_log
from dcpstore.catalog.read.ref_lookup import list_refs, resolve
from dcpstore.catalog.read.user_sql import query_rows
from dcpstore.catalog.validation import as_labels, as_metrics, check_chunk
from dcpstore.catalog.write.annotations import add_labels, add_metrics
from dcpstore.catalog.write.operations import Recorded, list_operations
from dcpstore.catalog.write.refs import delete_ref, make_ref, roll_back
from dcpstore.catalog.write.saves import list_running
from dcpstore.catalog.write.undo import undo_last
from dcpstore.core.display import html_pairs, some_of
from dcpstore.core.durations import Duration
from dcpstore.core.user import this_user
from dcpstore.errors import AlreadyExistsError, DcpstoreError, InvalidInputError, NotFoundError
from dcpstore.formats.composition import (
    ComposedEntry,
    fold_entries,
    matching_entries,
    outer_fqns,
)
from dcpstore.records import (
    ChunkDefaults,
    EntryRecord,
    ForgetReport,
    Operation,
    RefLike,
    RefRecord,
    RepositoryRecord,
    Row,
    RunningSave,
    StorageRequest,
    Trace,
    Version,
    versions_as_html,
)
from dcpstore.storage.interface import Storage
from dcpstore.storage.local import LocalFolder
from dcpstore.storage.packs import PackReader
from dcpstore.storage.traced import TracedStorage
from dcpstore.storage.urls import open_storage
from dcpstore.zarr.stored_references import keep_reference, version_reference

if TYPE_CHECKING:
    from dcpstore.catalog.maintenance.retention import Best, ExpireReport
    from dcpstore.history.diff import Diff
    from dcpstore.maintenance.copy import CopyReport
    from dcpstore.maintenance.gc import GcReport
    from dcpstore.maintenance.verify import VerifyReport
    from dcpstore.reading.selection import Index
    from dcpstore.saving.plan_exchange import PlanMemory
    from dcpstore.zarr.store import VersionStore

__all__ = ["Repository", "advise", "make", "open", "opened"]

_NEWEST = 10  # versions that a notebook lists
_GLOB_CHARACTERS = frozenset("*?[")


class Repository:
    """A repository, opened; `dcpstore.open` makes one. Threads may share it.

    A `ref` is a version number (`12`, `"v12"`), a tag, a branch, `"main~3"`, `"main@step=1000"`, or
    None for the tip of `main`. Every method that takes one raises `NotFoundError` with the nearest
    names for an unknown ref.
    """

    def __init__(self, target: str, catalog: Catalog, storage: Storage) -> None:
        self._target = target
        self.catalog = catalog
        self._storage = storage
        self._traces: list[Trace] = []
        self._finish: Callable[[], None] = lambda: None

    @property
    def storage(self) -> Storage:
        """Where the packs and manifests lie."""
        return TracedStorage(self._storage, self._report) if self._traces else self._storage

    @contextmanager
    def trace(self) -> Iterator[Trace]:
        """Record the SQL statements and storage requests of this repository inside the block.

        All that is asked through this object is recorded, in whatever thread; other processes and
        other objects for the same repository are not. Calls that began before the block are
        recorded in part.
        """
        trace = Trace()
        with self.catalog.database.traced(trace.statements.append):
            self._traces.append(trace)
            try:
                yield trace
            finally:
                self._traces.remove(trace)

    def _report(self, request: StorageRequest) -> None:
        for trace in tuple(self._traces):
            trace.requests.append(request)

    @cached_property
    def memory(self) -> PlanMemory:
        """What this process remembers of its saves here, so that the next one exchanges less."""
        from dcpstore.saving.plan_exchange import PlanMemory  # noqa: PLC0415 (loads torch)

        return PlanMemory()

    @property
    def location(self) -> str | Path:
        """The folder, or the database URL without its password: what torch's planners are given
        as `checkpoint_id`.
        """
        return self.catalog.shown if "://" in self._target else Path(self._target)

    @property
    def about(self) -> RepositoryRecord:
        """What was decided when the repository was created."""
        return self.catalog.repository

    def show(self, ref: RefLike | None = None) -> Version:
        """Return the version that `ref` names."""
        return resolve(self.catalog, ref)

    def log(
        self,
        ref: RefLike | None = None,
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
            where: comparisons of metrics that must all hold, such as "val_loss<2.5".
            steps: the first and the last step, both included; None for no limit.
            since, until: when it was saved; a time without zone is local time.
            labels: labels that it must have, with these texts.
            tag: the name of a tag that it must have; * and ? are wildcards.
            branch: the branch that it was saved to.

        Raises:
            InvalidInputError: a comparison or pattern is invalid.
            NotFoundError: no version has such a metric, or was saved on such a branch.
        """
        start = None if ref is None else resolve(self.catalog, ref).number
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
            return list_log(self.catalog, start, limit=limit)
        return list_log(self.catalog, start, limit=limit, wanted=wanted)

    def best(
        self, metric: str, *, mode: Literal["min", "max"] = "min", branch: str | None = None
    ) -> Version:
        """Return the version with the least ("min") or greatest ("max") value of a metric.

        Of equal values the earliest version wins; NaN is ignored. With `branch`, only versions
        that were saved to it count.

        Raises:
            NotFoundError: no such version has the metric.
        """
        return best_version(self.catalog, metric, mode=mode, branch=branch)

    def entries(
        self, ref: RefLike | None = None, fqns: Iterable[str] | None = None
    ) -> list[EntryRecord]:
        """Return what a version holds, by FQN: all entries, or those of `fqns`.

        Raises:
            NotFoundError: an FQN that the version lacks, with the nearest names.
        """
        return self._entries(self.show(ref).number, _as_list(fqns))

    def _entries(self, number: int, wanted: list[str] | None) -> list[EntryRecord]:
        """Return entries of a version; for a composed tensor those that it is stored as."""
        try:
            return load_entries(self.catalog, number, wanted)
        except NotFoundError:
            every = load_entries(self.catalog, number)
            parts: dict[str, list[str]] = {}
            for part, fqn in outer_fqns(entry.fqn for entry in every).items():
                parts.setdefault(fqn, []).append(part)
            if parts.keys().isdisjoint(wanted or ()):
                raise
        listed = [name for fqn in wanted or () for name in parts.get(fqn, [fqn])]
        return load_entries(self.catalog, number, listed)

    def tag(self, name: str, ref: RefLike | None = None, *, move: bool = False) -> RefRecord:
        """Name a version.

        Args:
            name: of the tag.
            ref: the version.
            move: allow the tag to exist, and move it then, in one operation that `undo` reverts. A
                tag that does not exist is created in any case.

        Raises:
            InvalidInputError: the name breaks the grammar; offers the nearest that is allowed.
            AlreadyExistsError: the name is taken; with `move`, only by a branch.
        """
        author = this_user()

        def change() -> Recorded[RefRecord]:
            made = make_ref(self.catalog, name, "tag", version=ref, author=author, move=move)
            for entry in made.entries:  # none if the tag was there already
                keep_reference(self.storage, entry["new"]["uid"])
            return made

        return recorded(self, change)

    def branch(self, name: str, *, at: RefLike | None = None) -> RefRecord:
        """Create a branch at a version.

        Raises:
            AlreadyExistsError: the name is taken, by a branch or a tag.
        """
        return recorded(
            self,
            lambda: make_ref(self.catalog, name, "branch", version=at, author=this_user()),
        )

    @journaled
    def delete_tag(self, name: str, *, expect: RefLike | None = None) -> RefRecord:
        """Delete a tag; return what it was. `undo` restores it.

        Raises:
            ConflictError: it does not name the version `expect`.
        """
        return self._delete(name, "tag", expect)

    @journaled
    def delete_branch(self, name: str, *, expect: RefLike | None = None) -> RefRecord:
        """Delete a branch, and none of its versions; return what it was. `undo` restores it.

        Raises:
            ConflictError: its tip is not the version `expect`.
        """
        return self._delete(name, "branch", expect)

    def _delete(
        self, name: str, kind: Literal["tag", "branch"], expect: RefLike | None
    ) -> RefRecord:
        expected = None if expect is None else resolve(self.catalog, expect).number
        return delete_ref(self.catalog, name, kind, expect=expected, author=this_user())

    @journaled
    def rollback(
        self,
        ref: RefLike,
        *,
        branch: str = "main",
        force: bool = False,
        expect_tip: RefLike | None = None,
    ) -> RefRecord:
        """Move a branch to an earlier version, so that the next save continues from there.

        No version is deleted: `undo` moves the branch back.

        Args:
            ref: where to; an ancestor of the branch's tip, or any version with `force`.
            branch: the branch to move.
            force: allow a version that is not an ancestor, such as one of another branch.
            expect_tip: the ref that the branch must still name.

        Raises:
            InvalidInputError: the version is not an ancestor, and `force` is not given.
            ConflictError: the branch is not at `expect_tip`.
        """
        expected = None if expect_tip is None else resolve(self.catalog, expect_tip).number
        return roll_back(
            self.catalog, branch, ref, force=force, expect_tip=expected, author=this_user()
        )

    @journaled
    def undo(self, *, expect: int | None = None) -> Operation:
        """Revert the last operation on refs, metrics or labels that is not undone yet.

        Deleted tags and branches are restored, moved branches go back. After a save the branch
        goes back and its tags are deleted; the version stays. Each further call reverts the
        operation before. A gc is skipped. An expire, or the copy of a version, cannot be undone: to
        undo the operation before it, give that as `expect`.

        Args:
            expect: the number of the operation that is to be undone.

        Returns:
            The new operation, of kind `undo`, that this call recorded.

        Raises:
            InvalidInputError: nothing is left to undo.
            NotFoundError: a ref would go back to a version that was expired.
            ConflictError: the last operation that is not undone yet is not number `expect`, perhaps
                because another came in. Or `expect` is not given, and the newest operation is one
                that cannot be undone, such as an expire; the message has the number of the one
                before it.
        """
        return undo_last(self.catalog, expect=expect, author=this_user())

    def operations(self, *, limit: int | None = None) -> list[Operation]:
        """Return what was done to the repository, newest first."""
        return list_operations(self.catalog, limit=limit)

    @journaled
    def add_metrics(self, ref: RefLike | None, metrics: Mapping[str, SupportsFloat]) -> Version:
        """Add metrics to a version, such as those of a later evaluation.

        Raises:
            InvalidInputError: a name or value that cannot be kept.
            AlreadyExistsError: a metric is there with another value.
        """
        return add_metrics(self.catalog, ref, as_metrics(metrics), author=this_user())

    @journaled
    def add_labels(self, ref: RefLike | None, labels: Mapping[str, object]) -> Version:
        """Add labels to a version.

        Raises:
            InvalidInputError: a name or text that cannot be kept.
            AlreadyExistsError: a label is there with another text.
        """
        return add_labels(self.catalog, ref, as_labels(labels), author=this_user())

    def diff(self, old: RefLike, new: RefLike | None = None, *, stats: bool = False) -> Diff:
        """Return what changed from one version to another.

        Without `stats` it reads the catalog alone: contents are compared by digest. With it, each
        changed tensor has statistics, from the chunks that differ. A tensor that is made of tensors
        is one entry, with those as its parts.

        Raises:
            CorruptionError: with `stats`, stored bytes are damaged.
        """
        from dcpstore.history.diff import diff_versions, fold_diff  # noqa: PLC0415 (loaded when called)

        diff = diff_versions(self.catalog, resolve(self.catalog, old), resolve(self.catalog, new))
        if not stats:
            return fold_diff(diff)
        from dcpstore.history.measure import with_stats  # noqa: PLC0415 (loads torch)

        return fold_diff(with_stats(diff, self.catalog, self.storage))

    def tags(self) -> list[RefRecord]:
        """Return all tags, by name."""
        return list_refs(self.catalog, "tag")

    def branches(self) -> list[RefRecord]:
        """Return all branches, by name."""
        return list_refs(self.catalog, "branch")

    def read(
        self,
        ref: RefLike | None = None,
        fqns: str | Iterable[str] | Mapping[str, Index] | None = None,
        *,
        nested: bool = False,
        verify: bool = True,
        allow_pickle: bool = False,
    ) -> dict[str, Any]:
        """Return tensors (plain, on the CPU) and values of a version by FQN, without a template.

        Args:
            ref: the version.
            fqns: which entries. A text is the name of an entry or of all below it ("model"), or a
                glob of FQNs ("*.bias"). A list holds names of entries and globs. A mapping also
                gives each tensor an index (integers, slices, `...`), and only the chunks that it
                meets are read. None is everything.
            nested: return the whole nested state, with empty containers and the original keys;
                `["optim"]` of it is what `optim.load_state_dict` takes. Named tuples become tuples,
                dataclasses become dicts, and items of a list that are not read become None.
            verify: check every byte read against its digest.
            allow_pickle: let values that are pickles run their code.

        Raises:
            NotFoundError: an FQN that the version lacks, or a text that none matches, with the
                nearest names.
            InvalidInputError: an index that does not fit the tensor's shape.
            CorruptionError: stored bytes are damaged, or, with `nested`, the stored paths
                contradict each other.
        """
        from dcpstore.reading.selection import read_entries  # noqa: PLC0415 (loads torch)
        from dcpstore.state.tree import nested_state, path_above  # noqa: PLC0415 (loads torch)

        version = self.show(ref)
        if isinstance(fqns, str):
            entries = self._matching(version, [fqns])
        else:
            wanted = _as_list(fqns)
            has_glob = any(not _GLOB_CHARACTERS.isdisjoint(text) for text in wanted or ())
            if has_glob and not isinstance(fqns, Mapping):
                entries = self._matching(version, wanted or [])
            else:
                entries = self._entries(version.number, wanted)
        with closing(PackReader(self.storage)) as packs:
            found = read_entries(
                entries,
                fqns if isinstance(fqns, Mapping) else {},
                self.catalog,
                packs,
                version=version.number,
                verify=verify,
                allow_pickle=allow_pickle,
            )
        if not nested:
            return found
        paths = {
            one.fqn: path_above(one.mark.path, len(one.path))
            if isinstance(one, ComposedEntry)
            else one.path
            for one in fold_entries(entries)
        }
        state: dict[str, Any] = nested_state(found, paths)
        return state

    def _matching(self, version: Version, patterns: list[str]) -> list[EntryRecord]:
        """Return the entries that texts stand for, each once."""
        entries = fold_entries(load_entries(self.catalog, version.number))
        chosen: dict[str, EntryRecord] = {}
        for pattern in patterns:
            for one in matching_entries(entries, pattern, where=str(version)):
                parts = [one.mark, *one.parts] if isinstance(one, ComposedEntry) else [one]
                chosen |= {part.fqn: part for part in parts}
        return list(chosen.values())

    def zarr(self, ref: RefLike | None = None, *, verify: bool = True) -> VersionStore:
        """Return a version as a read-only Zarr v3 store, for `zarr.open_group`.

        Each tensor is an array named by its FQN; values are attributes of the group.
        """
        from dcpstore.zarr.store import VersionStore  # noqa: PLC0415 (loads zarr)

        version = self.show(ref)
        return VersionStore(
            str(version),
            load_entries(self.catalog, version.number),
            attributes={"version": version.number, "uid": version.uid, "step": version.step},
            find=partial(load_chunks, self.catalog),
            read=PackReader(self.storage).read,
            verify=verify,
        )

    def references(self, ref: RefLike | None = None, *, data: str | None = None) -> dict[str, Any]:
        """Return the kerchunk reference by which plain Zarr reads a version, until gc moves chunks.

        `zarr.open_group("reference://", storage_options={"fo": reference}, mode="r")` takes it;
        `data` is the path or URL by which its readers find the data folder, if not as here.
        """
        return version_reference(self.storage, self.show(ref).uid, data=data or self.storage.url)

    def status(self) -> list[RunningSave]:
        """Return the saves that have begun and not ended, with how far their ranks are."""
        return list_running(self.catalog)

    def sql(self, query: str, /, **params: object) -> list[Row]:
        """Return the named rows of a query, on a connection that cannot write.

        `:name` in the query stands for `params["name"]`; a time without zone is in UTC, as those of
        the views are. The views are `history`, `entries`, `storage`, `operations`, `metrics`,
        `labels`, `tensor_history` and `unique_bytes`.

        Raises:
            InvalidInputError: the database refused the query, with its message, or the statement is
                not a query.
        """
        return query_rows(self.catalog, query, params)

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
            keep_last: for each branch, keep this many of the newest versions saved to it.
            keep_every: keep versions whose step is a multiple of this.
            keep_best: `("val_loss", 3)` keeps the three with the smallest val_loss;
                `("accuracy", 3, "max")` those with the largest.
            keep_tagged: adds no rule; tagged versions always stay. Use it when you want no other
                rule.
            keep_since: keep versions made since a time, or within a span such as `"7d"`.
            branch: look only at versions that were saved to this branch.
            dry_run: change nothing, and report what would expire.

        Raises:
            InvalidInputError: there is no rule, or an invalid one.
            NotFoundError: no version has that metric, or was saved to that branch.
        """
        from dcpstore.catalog.maintenance.retention import (  # noqa: PLC0415 (loaded when called)
            Retention,
            expire,
        )

        rules = Retention(
            keep_last=keep_last,
            keep_every=keep_every,
            keep_best=keep_best,
            keep_tagged=keep_tagged,
            keep_since=keep_since,
        )
        return expire(self.catalog, rules, author=this_user(), branch=branch, dry_run=dry_run)

    @journaled
    def forget(
        self,
        refs: RefLike | Iterable[RefLike],
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
            dry_run: change nothing, and report what would be forgotten.

        Raises:
            NotFoundError: a ref names nothing.
            InvalidInputError: a version is tagged, and `force` is not given.
        """
        from dcpstore.catalog.maintenance.expire import forget_versions  # noqa: PLC0415 (loaded when called)

        if isinstance(refs, str | int | Version):
            refs = [refs]
        if not isinstance(refs, Iterable):
            raise InvalidInputError(
                f"refs={refs!r} are not refs; pass a list such as ['v1', 'v2']."
            )
        return forget_versions(
            self.catalog, list(refs), force=force, dry_run=dry_run, author=this_user()
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
            dry_run: change nothing, and report what would be freed.
            lease: how long a save may be silent before it counts as crashed; a running save renews
                its lease every ten seconds.

        Raises:
            InvalidInputError: a save has been running for longer than `grace`.
        """
        from dcpstore.maintenance.gc import collect  # noqa: PLC0415 (loaded when called)

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

        A quick check lists the data folder: every object must exist, and packs, pages and plans
        must have the right size. Of what is new since the last check it also reads the manifests,
        and checks the rows of the catalog. What is damaged is marked: no save reuses it, so saving
        the same content again heals it.

        Args:
            deep: check the whole catalog, and read the journal and every manifest, page, plan and
                chunk that a version reaches, and compare digests; without it no chunk is read.
            resume: continue a deep check that was interrupted.
            limit: read at most this many bytes per second.

        Raises:
            InvalidInputError: `limit` is not positive, or `resume` is given without `deep`.
        """
        from dcpstore.maintenance.verify import verify  # noqa: PLC0415 (loaded when called)

        if limit is not None and not (isinstance(limit, int | float) and limit > 0):
            raise InvalidInputError(f"limit is {limit!r}; give bytes a second, more than 0.")
        if resume and not deep:
            raise InvalidInputError("resume works only with deep=True (--deep); pass that too.")
        with self.catalog.keep_connection():
            return verify(self.catalog, self.storage, deep=deep, resume=resume, limit=limit)

    def copy_to(self, other: Repository, refs: Sequence[RefLike] | None = None) -> CopyReport:
        """Copy versions to another repository, without writing chunks that it holds.

        A version keeps its uid and gets a new number; one that is there already is left alone.

        Args:
            other: the repository to copy to.
            refs: the versions, without their ancestors; tags and branches among them are made
                there too. None is every version, tag and branch.

        Raises:
            NotFoundError: a ref names nothing.
            CorruptionError: a stored chunk is damaged.
        """
        from dcpstore.maintenance.copy import copy_versions  # noqa: PLC0415 (loads torch)

        if not isinstance(other, Repository):
            raise InvalidInputError(f"other is {other!r}; open that repository, and pass it.")
        if isinstance(refs, str) or not isinstance(refs, Iterable | None):
            raise InvalidInputError(f"refs={refs!r} is no list of refs; pass one: [{refs!r}].")
        if other.catalog.repository.uid == self.catalog.repository.uid:
            raise InvalidInputError("source and target are the same repository.")
        with (
            changing_repository(other.catalog),
            self.catalog.keep_connection(),
            other.catalog.keep_connection(),
        ):
            return copy_versions(
                (self.catalog, self.storage),
                (other.catalog, other.storage),
                refs,
                author=this_user(),
            )

    def finish_before_close(self, finish: Callable[[], None]) -> None:
        """Have `finish` called by `close`: it ends what still uses this repository."""
        self._finish = finish

    def close(self) -> None:
        """Close the database connections.

        Raises:
            DcpstoreError: an asynchronous save failed and nobody has asked for its result.
        """
        try:
            self._finish()
        finally:
            self.catalog.close()

    def __enter__(self) -> Repository:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self._target,)

    def __repr__(self) -> str:
        return f"Repository({self.catalog!r}, data={self.storage.url!r})"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the newest versions, with one look at the catalog."""
        title = f"Repository {self.location}"
        try:
            with self.catalog.keep_connection():
                newest = self.log(limit=_NEWEST)
                refs = [f"{ref.name} (v{ref.version})" for ref in (*self.branches(), *self.tags())]
        except DcpstoreError as error:  # show the error in the notebook instead of raising it
            return html_pairs(title, [("data", self.storage.url), ("problem", str(error))])
        below = f"branches and tags: {some_of(refs, _NEWEST)}" if refs else "no versions yet"
        return versions_as_html(title, newest, below=below)


def open(
    target: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    create: bool = True,
    chunk: ChunkDefaults | None = None,
) -> Repository:
    """Open a repository, or make a new one where there is none.

    Args:
        target: a folder, for a catalog in its `catalog.db` (SQLite) with the chunks beside it; or a
            database URL, such as `postgresql+psycopg://user@host/database`.
        data: where the chunks lie, a path or `s3://bucket/prefix`. A new repository needs it where
            the target is a URL, and keeps it in its catalog; later it may be left out.
        create: False raises NotFoundError where there is no repository.
        chunk: how a new repository cuts and encodes tensors.

    Raises:
        NotFoundError: no repository, no database server, or no data folder.
        InvalidInputError: `data` is missing, or not what the repository keeps.
        SchemaError: the database is not a dcpstore catalog, or its schema is older or newer than
            this dcpstore's; the message names the command that helps.
        AlreadyExistsError: a new repository's data folder holds another's data.
    """
    given, target = target, absolute_target(target)
    url, folder = locate(target)
    data_url = _data_url(data)
    try:
        catalog = Catalog.open(url, data_url=data_url)
    except NotFoundError as error:
        if not create:
            if folder is not None and (advice := advise(folder, given)):
                raise NotFoundError(advice) from error
            raise
        try:
            return make(target, data=data, chunk=chunk)
        except AlreadyExistsError as taken:
            try:
                catalog = Catalog.open(url, data_url=data_url)  # another process was faster
            except NotFoundError:
                raise taken from None
    return _with_storage(target, catalog)


def advise(folder: Path, given: str | os.PathLike[str]) -> str:
    """Return advice for a folder in which no repository was found.

    It is "" if there is none to give: a catalog is there, or the folder cannot be read.
    `given` is the folder as the user named it.
    """
    if (folder / ".metadata").is_file():
        return (
            f"the folder {os.fspath(folder)!r} holds a checkpoint of "
            "torch.distributed.checkpoint, and no repository. 'dcpstore import' stores it "
            "as a version; torch's own FileSystemReader loads it as it is, as the "
            "storage_reader= of dcpstore.load too."
        )
    with suppress(DcpstoreError, OSError):
        catalog = folder / CATALOG_FILE
        is_gone = not catalog.exists() or not catalog.stat().st_size  # an empty file holds nothing
        if is_gone and folder.is_dir() and any(LocalFolder(folder).list("operations")):
            return (
                f"no repository at {folder}: its data are there, but its catalog is gone. Restore "
                f"the catalog with 'dcpstore rebuild {folder} --into {folder}'."
            )
        if is_gone:
            return (
                f"no repository at {os.fspath(given)}. Check the path, or create one with "
                "'dcpstore init'."
            )
    return ""


def make(
    target: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None,
    chunk: ChunkDefaults | None,
) -> Repository:
    """Make a new repository; if it fails, no catalog remains, except perhaps an empty file.

    Args:
        target, data, chunk: as for `open`.

    Raises:
        AlreadyExistsError: there is one, perhaps from a process that was faster; or the data folder
            holds the data of another repository.
        InvalidInputError: `data` is missing, or `chunk` is invalid.
        NotFoundError: no database server.
        SchemaError: a database that is neither empty nor ours.
    """
    target = absolute_target(target)
    url, folder = locate(target)
    data_url = _data_url(data)
    if chunk is not None:
        check_chunk(chunk)
    if folder is not None:
        LocalFolder(folder, create=True)  # for the catalog itself
        # relative to the catalog, so that the folder can move as a whole
        data_url = data_url or "."
    catalog = Catalog.make(
        url,
        data_url=data_url,
        chunk=chunk,
        make_data=lambda: _make_data(data_url or "", folder),
    )
    made = _with_storage(target, catalog)
    with catalog.keep_connection():
        write_journal(catalog, made.storage)  # from now on the folder names its repository
    return made


def _as_list(fqns: Iterable[str] | None) -> list[str] | None:
    """Return FQNs as a list; None is all of them.

    Raises:
        InvalidInputError: they are one text, or no texts.
    """
    if fqns is None:
        return None
    if isinstance(fqns, str):
        raise InvalidInputError(f"fqns={fqns!r} is one text; pass a list: [{fqns!r}].")
    if not isinstance(fqns, Iterable):
        raise InvalidInputError(f"fqns={fqns!r} is no list; pass the names of entries.")
    named = list(fqns)
    odd = [fqn for fqn in named if not isinstance(fqn, str)]
    if odd:
        raise InvalidInputError(f"{odd[0]!r} is no FQN; give the names that 'dcpstore ls' shows.")
    return named


def _data_url(data: str | os.PathLike[str] | None) -> str | None:
    return None if data is None else absolute_data(check_path(data, what="data"))


def _make_data(data_url: str, folder: Path | None) -> None:
    """Make the data folder of a new repository; refuse one that holds the data of another."""
    storage = open_storage(data_url, base=folder, create=True)
    if any(storage.list("operations")):
        raise AlreadyExistsError(
            f"{storage.url!r} holds the data of a repository that has another catalog, or had one "
            "here; nothing was changed. Give another data folder, or restore a lost catalog with "
            "'dcpstore rebuild'."
        )


def _with_storage(target: str, catalog: Catalog) -> Repository:
    try:
        storage = open_storage(catalog.repository.data_url, base=catalog.folder)
    except BaseException:
        catalog.close()
        raise
    return Repository(target, catalog, storage)


def _reopen(target: str) -> Repository:
    """Open what another process had open."""
    return open(target, create=False)


@contextmanager
def opened(repo: Repository | str | os.PathLike[str], *, create: bool) -> Iterator[Repository]:
    """Yield an open repository and leave it open; or open what `open` takes, and close it after."""
    if isinstance(repo, Repository):
        yield repo
    else:
        with open(repo, create=create) as made:
            yield made
