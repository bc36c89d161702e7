"""`RepositoryWriter`: torch's StorageWriter on a repository.

An adapter: torch calls it, and it calls `saving.two_exchanges`. Torch moves plans to the ranks and
results to the coordinator, and nothing else. Invariants: nothing that belongs to one save (a uid, a
path) is put into a plan, since torch may use the plan of an earlier save again; and the version is
begun before anything is written, so that gc knows of the save. Torch does not tell a writer when it
gives a save up: the version is then aborted when the writer is used again, or by gc once its lease
is over.
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
from dcpstore.saving.commit import BegunVersion, SaveTarget, entries_before, kept_planner_data
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
    """What the coordinator adds to a rank's plan: how its tensors are cut."""

    by_fqn: Mapping[str, Layout]


class RepositoryWriter(StorageWriter):
    """Saves through `torch.distributed.checkpoint` as versions of a repository.

    Each save makes one version; one writer may be used again and again. After a save, `version` is
    the new version on the coordinator.

    Args:
        repo: a `Repository`, or what `open` takes. The writer can be sent to another process.
        branch, step, message, tags, metrics, labels, author, parent, expect_tip, retention: as for
            `save`, but those of the coordinator's writer count, for torch moves nothing else.
        allow_pickle: let values that JSON cannot carry be stored as pickles.

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
        self._is_cached = False  # torch sent plans of this save in part only
        self._paths: Mapping[str, ObjectPath] = {}
        self._is_spent = False  # `save_id` belongs to a save that was begun
        self._begun: BegunVersion | None = None  # of this save, on the coordinator
        self.save_id, self._next_id = new_uid(), new_uid()
        self.version: Version | None = None

    @property
    def checkpoint_id(self) -> str | os.PathLike[str] | None:
        """What torch calls this save."""
        return self._checkpoint_id

    @property
    def _lasting_id(self) -> str | os.PathLike[str] | None:
        """The id of a save for which torch gives none."""
        return None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Tell whether torch may make a writer of an id alone: of a database URL it may."""
        return "sql" in os.fspath(checkpoint_id).partition("://")[0]

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new save; an id is for this one alone."""
        self._renew()
        self._checkpoint_id = checkpoint_id

    def storage_meta(self) -> StorageMeta:
        """Return what torch's planner is given for the next save, or for the one that has begun.

        After a save, `save_id` and `version` stay those of that save until the next one begins.
        """
        if self._is_spent:  # torch resets for the next save only if that has an id
            return StorageMeta(self._lasting_id, self._next_id)
        return StorageMeta(self.checkpoint_id, self.save_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Take this process's rank in the save, and whether the ranks save together."""
        if self._is_spent:
            self._renew()
        self._rank = kwargs.get("rank", 0)
        self._is_alone = not kwargs.get("use_collectives", True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Begin the version, and return the plans with the layouts of their tensors.

        Raises:
            InvalidInputError: the plans do not tile their tensors, or no catalog can keep an FQN.
            UnsafeDataError: only a pickle could keep a plan's data.
            ConflictError, AlreadyExistsError, NotFoundError: as the catalog finds the refs.
        """
        # torch's plan cache: a rank whose plan did not change gets an empty one
        self._is_cached = not all(plan.usable for plan in plans)
        if not any(plan.usable for plan in plans):
            with self._opened() as target:
                self._begin(target, ranks=len(plans))
            return plans
        is_whole = not self._is_alone and not self._is_cached
        table = checked_table(plans, is_whole=is_whole)
        for plan in plans:  # of which a planner makes what `finish` is given, once all is written
            kept_planner_data(plan.planner_data)
        with self._opened() as target, self._aborting(target):
            begun = self._begin(target, ranks=len(plans))
            layouts = lay_out(
                table,
                chunk=target.catalog.repository.chunk,
                parent={} if self._is_alone else entries_before(target, begun.draft)[1],
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
            InvalidInputError: the plan lost its layouts, or the planner's data do not match it.
            UnsafeDataError: an item is neither tensor nor value, and pickle is not allowed.
        """
        self._is_spent = True
        self._paths = recorded_by(planner)
        if plan.items and not isinstance(plan.storage_data, _Layouts):
            raise InvalidInputError(
                "the plan has lost its storage_data on the way; a planner must keep what the "
                "writer's prepare_global_plan put there."
            )
        layouts = plan.storage_data.by_fqn if plan.items else {}
        with (
            self._opened() as target,
            self._aborting(target),
            kept_lease(target.catalog, self.save_id) if self._is_pending else nullcontext(),
        ):
            report = write_plan(
                plan,
                planner,
                layouts,
                target,
                uid=new_uid() if self._rank else self.save_id,
                rank=self._rank,
                allow_pickle=self._allow_pickle,
            )
        results = [
            WriteResult(item.index, item_nbytes(item), report if first else None)
            for first, item in zip((True, *(False,) * len(plan.items)), plan.items, strict=False)
        ]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit the version.

        Raises:
            InvalidInputError: the results are not those of the plan.
            ConflictError, AlreadyExistsError, NotFoundError: as the catalog finds the refs.
        """
        reports = [_report_of(rank, given) for rank, given in enumerate(results)]
        table = GlobalTable.of([report.planned for report in reports])
        check_results(metadata, results, table)
        paths, planner_data = kept_planner_data(metadata.planner_data, self._paths)
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
        metadata.storage_data = {r.index: r.size_in_bytes for given in results for r in given}
        metadata.storage_meta = StorageMeta(self.checkpoint_id, self.save_id)
        set_format_version(metadata)

    @property
    def _is_pending(self) -> bool:
        return self._begun is not None and self._begun.is_pending

    def _begin(self, target: SaveTarget, *, ranks: int) -> BegunVersion:
        """Return the version of this save, which is begun now if it is not pending."""
        if self._begun is None or not self._begun.is_pending:
            self._begun = BegunVersion(target, self._versioned(), ranks=ranks, uid=self.save_id)
            self._is_spent = True
        return self._begun

    @contextmanager
    def _aborting(self, target: SaveTarget) -> Iterator[None]:
        """Abort the version, if it was begun here, where the block fails."""
        try:
            yield
        except BaseException as error:
            if self._begun is not None:
                self._begun.abort_for(target.catalog, error)
            raise

    def _renew(self) -> None:
        begun, self._begun = self._begun, None
        if begun is not None and begun.is_pending:
            try:
                with self._opened() as target:
                    begun.abort(target.catalog, "torch gave it up, and began another save")
            except DcpstoreError as error:
                _log.warning("the save %s was not aborted; gc will: %s", self.save_id, error)
        self.save_id, self._next_id = self._next_id, new_uid()
        self._checkpoint_id = None
        self._is_spent = False
        self.version = None

    def _versioned(self) -> SaveRequest:
        """Return the request, with what this save adds: a tag, or names of the rank's own."""
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
            f"{type(report).__name__}); pass them on unchanged."
        )
    return report
