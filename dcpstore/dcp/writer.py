"""`RepositoryWriter`: torch's StorageWriter on a repository.

Torch moves plans to the ranks and results to the coordinator, and nothing else. So each rank asks
the catalog itself which of its chunks are known, and what it found and wrote travels in its
results. Invariants: nothing that belongs to one save (a uid, a path) is put into a plan, for torch
may use the plan of an earlier save again; and the version is begun before anything is written, so
that gc knows of the save. Nothing tells a writer that torch gave a save up: the version is then
aborted when the writer is used again, or by gc once its lease is over.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.location import absolute_target
from dcpstore.catalog.read.dedup import find_chunks
from dcpstore.catalog.write.lease import kept_lease
from dcpstore.catalog.write.saves import abort_save, begin_save
from dcpstore.core.identity import new_uid
from dcpstore.errors import DcpstoreError, InvalidInputError
from dcpstore.planning.balance import item_nbytes
from dcpstore.planning.plan_checks import check_agreement, check_names, check_results, check_tiling
from dcpstore.planning.plan_table import GlobalTable, PlanTable
from dcpstore.planning.save_planner import recorded_by
from dcpstore.records import ChunkPlace, ObjectPath, PackRecord, Version, VersionDraft
from dcpstore.repository import Repository, opened
from dcpstore.saving.commit import (
    SaveTarget,
    apply_retention,
    draft_version,
    entries_before,
    give_up,
    kept_planner_data,
    publish,
)
from dcpstore.saving.layout import Layout, join_layouts, lay_out
from dcpstore.saving.pack_writer import ChunkWriter
from dcpstore.saving.rank_chunks import ChunkKey, Digested, RankData
from dcpstore.saving.request import (
    SaveRequest,
    VersionOptions,
    check_options,
    make_request,
    own_request,
    shows_options,
)
from dcpstore.saving.save_state import SaveState

__all__ = ["RepositoryWriter"]

_log = logging.getLogger(__name__)


class _Layouts(NamedTuple):
    """What the coordinator adds to a rank's plan: how its tensors are cut."""

    by_fqn: Mapping[str, Layout]


@dataclass(frozen=True, slots=True)
class _Report:
    """What one rank did: it travels with the first of its results.

    `places` are those of all its chunks, `nbytes` the raw bytes of the ones that it wrote.
    """

    planned: PlanTable
    layouts: Mapping[str, Layout]
    digested: Digested
    places: Mapping[ChunkKey, ChunkPlace]
    packs: Sequence[PackRecord]
    nbytes: int


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
        self._is_pending = False  # its version waits for commit or abort; on the coordinator
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
        """Return what torch's planner hears of the next save, or of the one that it has begun.

        After a save, `save_id` and `version` stay those of that save until the next one begins.
        """
        if self._is_spent:  # torch resets for the next save only if that has an id
            return StorageMeta(self._lasting_id, self._next_id)
        return StorageMeta(self.checkpoint_id, self.save_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Learn this process's part of the save."""
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
        table = GlobalTable.of([PlanTable.of(plan) for plan in plans])
        check_names(table)
        for plan in plans:  # of which a planner makes what `finish` is given, once all is written
            kept_planner_data(plan.planner_data)
        is_whole = not self._is_alone and not self._is_cached
        if is_whole:
            check_agreement(table)
            check_tiling(table)
        with self._opened() as target, self._aborting(target):
            draft = self._begin(target, ranks=len(plans))
            _, before = entries_before(target, draft)
            layouts = lay_out(
                table,
                chunk=target.catalog.repository.chunk,
                parent={} if self._is_alone else before,
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
            ThreadPoolExecutor(torch.get_num_threads(), "dcpstore-save") as pool,
            ChunkWriter(
                target.storage,
                uid=new_uid() if self._rank else self.save_id,
                rank=self._rank,
                pool=pool,
            ) as writer,
        ):
            data = RankData(
                plan,
                planner,
                dict(layouts),
                chunk=target.catalog.repository.chunk,
                allow_pickle=self._allow_pickle,
            )
            first = _first_places(data.digest_first(pool))
            places = _look_up(target.catalog, first)
            early = [key for key in first if key not in places]
            writer.begin([data.chunks[first[key]] for key in early])
            digested = data.digest(pool)
            rest = {k: i for k, i in _first_places(data.keys).items() if k not in first}
            places |= _look_up(target.catalog, rest)
            late = [key for key in rest if key not in places]
            written = writer.finish([data.chunks[rest[key]] for key in late])
        places.update(zip([*early, *late], written.places, strict=True))
        report = _Report(
            PlanTable.of(plan), layouts, digested, places, written.packs, written.nbytes
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
            draft = self._begin(target, ranks=len(reports))
            layouts = {fqn: layout for report in reports for fqn, layout in report.layouts.items()}
            if self._is_cached and not self._is_alone:  # only now is the whole plan known
                check_agreement(table)
                check_tiling(table)
                layouts = join_layouts(table, [report.layouts for report in reports])
            state = SaveState(
                table,
                layouts,
                [report.digested for report in reports],
                paths=paths,
                chunk=target.catalog.repository.chunk,
                are_whole=not self._is_alone,
            )
            state.look_up(target.catalog, {})
            for report in reports:
                state.take_places(report.places, report.nbytes)
            with kept_lease(target.catalog, draft.uid):
                self.version = publish(
                    target,
                    draft,
                    state,
                    packs=[pack for report in reports for pack in report.packs],
                    seconds={},
                    planner_data=planner_data,
                )
            self._is_pending = False
            apply_retention(target, self._request.retention, self.version)
        metadata.storage_data = {r.index: r.size_in_bytes for given in results for r in given}
        metadata.storage_meta = StorageMeta(self.checkpoint_id, self.save_id)
        metadata.version = CURRENT_DCP_VERSION

    def _begin(self, target: SaveTarget, *, ranks: int) -> VersionDraft:
        """Return the draft of the version, which is begun now if it was not yet."""
        draft = draft_version(target.catalog, self._versioned(), ranks=ranks, uid=self.save_id)
        if not self._is_pending:
            begin_save(target.catalog, draft)
            self._is_spent = self._is_pending = True
        return draft

    @contextmanager
    def _aborting(self, target: SaveTarget) -> Iterator[None]:
        """Abort the version, if it was begun here, where the block fails."""
        try:
            yield
        except BaseException as error:
            if self._is_pending:
                self._is_pending = False
                give_up(target.catalog, self.save_id, error)
            raise

    def _renew(self) -> None:
        if self._is_pending:
            self._is_pending = False
            try:
                with self._opened() as target:
                    abort_save(
                        target.catalog, self.save_id, "torch gave it up, and began another save"
                    )
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


def _first_places(keys: Iterable[ChunkKey]) -> dict[ChunkKey, int]:
    """Return where each key stands first."""
    places: dict[ChunkKey, int] = {}
    for i, key in enumerate(keys):
        places.setdefault(key, i)
    return places


def _look_up(catalog: Catalog, keys: Collection[ChunkKey]) -> dict[ChunkKey, ChunkPlace]:
    """Return the places of the chunks that the repository holds."""
    return {
        (codec, digest): place
        for codec in dict.fromkeys(codec for codec, _ in keys)
        for digest, place in find_chunks(catalog, [d for c, d in keys if c == codec], codec).items()
    }


def _report_of(rank: int, results: Sequence[WriteResult]) -> _Report:
    if not results:
        return _Report(PlanTable.of(SavePlan([])), {}, Digested(b""), {}, (), 0)
    report = results[0].storage_data
    if not isinstance(report, _Report):
        raise InvalidInputError(
            f"the results of rank {rank} are not what this writer returned (storage_data is "
            f"{type(report).__name__}); pass them on unchanged."
        )
    return report
