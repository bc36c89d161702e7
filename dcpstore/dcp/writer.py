"""`RepositoryWriter`: torch's StorageWriter on a repository.

An adapter: torch calls it, and it calls `saving.two_exchanges`. Torch moves plans to the ranks and
results to the coordinator, and nothing else. Invariants: nothing that belongs to one save (a uid, a
path) is put into a plan, since torch may use the plan of an earlier save again; and the version is
begun before anything is written, so that gc knows of the save. Torch does not call a writer when a
save fails elsewhere: the version is then aborted when the writer is used again, or by gc when its
lease has expired.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Unpack

from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from dcpstore.catalog.location import absolute_target
from dcpstore.catalog.write.saves import kept_lease
from dcpstore.compat.torch_private import set_format_version
from dcpstore.core.uids import new_uid
from dcpstore.errors import DcpstoreError, InvalidInputError
from dcpstore.planning.global_plan import check_results
from dcpstore.planning.plan_table import GlobalTable, item_nbytes
from dcpstore.planning.save_planner import recorded_by
from dcpstore.records import ObjectPath, Version
from dcpstore.repository import Repository, opened
from dcpstore.saving.commit import BegunVersion, SaveTarget, checked_planner_data, entries_of_parent
from dcpstore.saving.layout import Layout, lay_out
from dcpstore.saving.plan_exchange import checked_table
from dcpstore.saving.request import (
    SaveRequest,
    VersionOptions,
    check_options,
    make_request,
    own_request,
    shows_options,
)
from dcpstore.saving.two_exchanges import RankReport, commit_reports, write_plan

__all__ = ["RepositoryWriter"]

_log = logging.getLogger(__name__)


class _Layouts(NamedTuple):
    """What the coordinator adds to a rank's plan as `storage_data`: how its tensors are cut."""

    by_fqn: Mapping[str, Layout]


class RepositoryWriter(StorageWriter):
    """Saves through `torch.distributed.checkpoint` as versions of a repository.

    Each save makes one version; one writer may be used for many saves. After a save, `version` is
    the new version on the coordinator.

    Args:
        repo: a `Repository`, or what `open` takes. The writer can be sent to another process.
        branch, step, message, tags, metrics, labels, author, parent, expect_tip, retention: as for
            `save`, but only those of the coordinator's writer count, because torch does not send
            those of other ranks.
        allow_pickle: store values that JSON cannot hold as pickles.

    A `checkpoint_id` given to torch's call becomes a tag of the version.
    """

    @shows_options(VersionOptions)
    def __init__(
        self,
        repo: Repository | str | os.PathLike[str],
        *,
        allow_pickle: bool = False,
        **options: Unpack[VersionOptions],
    ) -> None:
        check_options("RepositoryWriter", options, VersionOptions)
        self._repo = repo if isinstance(repo, Repository) else absolute_target(repo)
        self._request = make_request(**options)
        self._allow_pickle = allow_pickle
        self._checkpoint_id: str | os.PathLike[str] | None = None
        self._rank = 0
        self._is_alone = False  # torch uses no collectives: each rank saves its own version
        self._is_cached = False  # torch's plan cache left out the plans of some ranks
        self._paths: Mapping[str, ObjectPath] = {}
        self._is_used = False  # a save with `save_id` was begun
        self._begun: BegunVersion | None = None  # of this save, on the coordinator
        self.save_id, self._next_id = new_uid(), new_uid()
        self.version: Version | None = None

    @property
    def checkpoint_id(self) -> str | os.PathLike[str] | None:
        """What torch calls this save."""
        return self._checkpoint_id

    @property
    def _lasting_id(self) -> str | os.PathLike[str] | None:
        """The `checkpoint_id` of a save for which torch gives none."""
        return None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Tell whether torch may make a writer from this id alone: it may from a database URL."""
        return "sql" in os.fspath(checkpoint_id).partition("://")[0]

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new save; a `checkpoint_id` is for this save only."""
        self._renew()
        self._checkpoint_id = checkpoint_id

    def storage_meta(self) -> StorageMeta:
        """Return what torch's planner gets for the next save, or for the one that has begun.

        After a save, `save_id` and `version` stay those of that save until the next one begins.
        """
        if self._is_used:  # torch calls `reset` only for a save that has a checkpoint_id
            return StorageMeta(self._lasting_id, self._next_id)
        return StorageMeta(self.checkpoint_id, self.save_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Set the rank of this process in the save, and whether the ranks save together."""
        if self._is_used:
            self._renew()
        self._rank = kwargs.get("rank", 0)
        self._is_alone = not kwargs.get("use_collectives", True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Begin the version, and return the plans with the layouts of their tensors.

        Raises:
            InvalidInputError: the plans do not tile their tensors, or no catalog can store an FQN.
            UnsafeDataError: storing a plan's data would need pickle.
            ConflictError, AlreadyExistsError, NotFoundError: a ref is not as the save needs it.
        """
        # With torch's plan cache, a rank whose plan did not change gets one that is not usable.
        self._is_cached = not all(plan.usable for plan in plans)
        if not any(plan.usable for plan in plans):  # each rank still has its plan, with layouts
            with self._opened() as target:
                self._begin(target, ranks=len(plans))
            return plans
        is_whole = not self._is_alone and not self._is_cached
        table = checked_table(plans, is_whole=is_whole)
        for plan in plans:  # checked again in `finish`, but then all bytes are written
            checked_planner_data(plan.planner_data)
        with self._opened() as target, self._aborting(target):
            begun = self._begin(target, ranks=len(plans))
            layouts = lay_out(
                table,
                chunk=target.catalog.repository.chunk,
                # Another rank may have saved the parent: its grids would not fit.
                parent={} if self._is_alone else entries_of_parent(target, begun.parent)[1],
                are_whole=is_whole,
            )
        return [
            dataclasses.replace(
                plan,
                storage_data=_Layouts(
                    {i.index.fqn: layouts[i.index.fqn] for i in plan.items if i.tensor_data}
                ),
            )
            for plan in plans
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write what the plan says and the repository does not hold; durable on return.

        Raises:
            InvalidInputError: the plan has no layouts, or the planner's data do not match it.
            UnsafeDataError: an item is neither tensor nor value, and `allow_pickle` is False.
        """
        self._is_used = True
        self._paths = recorded_by(planner)
        if plan.items and not isinstance(plan.storage_data, _Layouts):
            raise InvalidInputError(
                "the plan has no storage_data any more; a planner must keep what the writer's "
                "prepare_global_plan put there."
            )
        layouts = plan.storage_data.by_fqn if plan.items else {}
        with (
            self._opened() as target,
            self._aborting(target),
            # Only the rank that began the version renews its lease; without one gc clears it.
            kept_lease(target.catalog, self.save_id)
            if self._begun is not None and self._begun.is_pending
            else nullcontext(),
        ):
            report = write_plan(
                plan,
                planner,
                layouts,
                target,
                # The other ranks do not know the uid of the version: torch sends them plans only.
                uid=new_uid() if self._rank else self.save_id,
                rank=self._rank,
                allow_pickle=self._allow_pickle,
            )
        # The report goes with the first result; torch wants one result for each item.
        results = [
            WriteResult(item.index, item_nbytes(item), None if i else report)
            for i, item in enumerate(plan.items)
        ]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit the version.

        Raises:
            InvalidInputError: the results are not those of the plan.
            ConflictError, AlreadyExistsError, NotFoundError: a ref is not as the save needs it.
        """
        reports = [_report_of(rank, given) for rank, given in enumerate(results)]
        table = GlobalTable.of([report.planned for report in reports])
        check_results(metadata, results, table)
        paths, planner_data = checked_planner_data(metadata.planner_data, self._paths)
        with self._opened() as target, self._aborting(target):
            self.version = commit_reports(
                self._begin(target, ranks=len(reports)),
                target,
                table,
                reports,
                paths=paths,
                planner_data=planner_data,
                is_whole=not self._is_alone,
                is_cached=self._is_cached,
            )
        # As torch's FileSystemWriter does: callers get the metadata from `save`.
        metadata.storage_data = {r.index: r.size_in_bytes for given in results for r in given}
        metadata.storage_meta = StorageMeta(self.checkpoint_id, self.save_id)
        set_format_version(metadata)

    def _begin(self, target: SaveTarget, *, ranks: int) -> BegunVersion:
        """Return the version of this save; begin it if it is not pending."""
        if self._begun is None or not self._begun.is_pending:
            self._begun = BegunVersion(target, self._full_request(), ranks=ranks, uid=self.save_id)
            self._is_used = True
        return self._begun

    @contextmanager
    def _aborting(self, target: SaveTarget) -> Iterator[None]:
        """Abort the version, if it was begun here, when the block fails."""
        try:
            yield
        except BaseException as error:
            if self._begun is not None:
                self._begun.abort_for(target.catalog, error)
            raise

    def _renew(self) -> None:
        """Get ready for the next save; abort the last one if it is still pending."""
        begun, self._begun = self._begun, None
        if begun is not None and begun.is_pending:
            try:
                with self._opened() as target:
                    begun.abort(target.catalog, "torch began another save before this one ended")
            except DcpstoreError as error:
                _log.warning("the save %s was not aborted; gc will: %s", self.save_id, error)
        self.save_id, self._next_id = self._next_id, new_uid()
        self._checkpoint_id = None
        self._is_used = False
        self.version = None

    def _full_request(self) -> SaveRequest:
        """Return the request with what this save adds: a tag, or names of the rank's own."""
        request = self._request
        if self._checkpoint_id is not None:
            tags = (*request.tags, os.fspath(self._checkpoint_id))
            request = dataclasses.replace(request, tags=tags)
        if self._is_alone:
            return own_request(request, self._rank)
        return request

    @contextmanager
    def _opened(self) -> Iterator[SaveTarget]:
        with opened(self._repo, create=True) as repo:
            yield SaveTarget(repo.catalog, repo.storage, repo.memory, repo.location)


def _report_of(rank: int, results: Sequence[WriteResult]) -> RankReport:
    if not results:
        return RankReport.empty()
    report = results[0].storage_data
    if not isinstance(report, RankReport):
        raise InvalidInputError(
            f"the results of rank {rank} are not what this writer returned (storage_data is "
            f"{type(report).__name__}); pass them to finish() unchanged."
        )
    return report
