"""`RepositoryReader`: torch's StorageReader on a version of a repository."""

from __future__ import annotations

import os
from contextlib import closing
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from dcpstore.catalog.location import absolute_target
from dcpstore.catalog.read.entries import load_entries, load_planner_data
from dcpstore.core.progress import ProgressBar
from dcpstore.core.syntax import rank_name
from dcpstore.core.uids import new_uid
from dcpstore.loading.item_reads import ItemReads
from dcpstore.planning.torch_metadata import describe_version
from dcpstore.reading.box_reads import find_ranges
from dcpstore.records import EntryRecord, RefLike, Version
from dcpstore.repository import Repository, opened
from dcpstore.storage.packs import PackReader

__all__ = ["RepositoryReader"]


class RepositoryReader(StorageReader):
    """Loads versions of a repository through `torch.distributed.checkpoint`.

    Args:
        repo: a `Repository`, or what `open` takes.
        ref: the version; None is the tip of `main`. A `checkpoint_id` given to torch's call is a
            ref, and is used instead.
        verify: check every byte read against its digest.
        allow_pickle: load values that are pickles, which can run code.
    """

    def __init__(
        self,
        repo: Repository | str | os.PathLike[str],
        ref: RefLike | None = None,
        *,
        verify: bool = True,
        allow_pickle: bool = False,
    ) -> None:
        self._repo = repo if isinstance(repo, Repository) else absolute_target(repo)
        self._ref = ref
        self._verify = verify
        self._allow_pickle = allow_pickle
        self._checkpoint_id: str | os.PathLike[str] | None = None
        self._is_used = False  # a load with `load_id` has ended
        self._read: tuple[Version, list[EntryRecord]] | None = None
        self.load_id = new_uid()

    @property
    def checkpoint_id(self) -> str | os.PathLike[str] | None:
        """What torch calls this load."""
        return self._checkpoint_id

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Tell whether torch may make a reader from this id alone: it may from a database URL."""
        return "sql" in os.fspath(checkpoint_id).partition("://")[0]

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new load; a `checkpoint_id` is for this load only."""
        self._checkpoint_id = checkpoint_id
        self._is_used = False
        self._read = None
        self.load_id = new_uid()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return torch's description of the version.

        Args:
            rank: with it, the version that this rank saved for itself (`use_collectives=False`).

        Raises:
            NotFoundError: there is no such version.
        """
        if self._is_used:  # torch calls `reset` only for a load that has a checkpoint_id
            self.reset()
        ref = self._ref if self._checkpoint_id is None else os.fspath(self._checkpoint_id)
        if "rank" in kwargs and not isinstance(ref, Version):  # which is exactly one version
            ref = rank_name(str(ref or "main"), kwargs["rank"])
        with opened(self._repo, create=False) as repo:
            version = repo.show(ref)
            entries = load_entries(repo.catalog, version.number)
            planner_data = load_planner_data(repo.catalog, version.number)
        self._read = version, entries
        meta = StorageMeta(self.checkpoint_id, version.uid, self.load_id)
        return describe_version(entries, meta, planner_data, allow_pickle=self._allow_pickle)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Prepare to read what `metadata` describes; only the coordinator has read it itself."""
        if self._read is None:
            self.read_metadata()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan asks for into the planner's tensors.

        Raises:
            CorruptionError: stored bytes are damaged.
            UnsafeDataError: a value is a pickle, and `allow_pickle` is False.
        """
        if self._read is None:
            self.read_metadata()
        assert self._read is not None
        version, entries = self._read
        with (
            opened(self._repo, create=False) as repo,
            closing(PackReader(repo.storage)) as packs,
            ProgressBar("load", shown=False) as bar,
        ):
            reads = ItemReads(plan, planner, {entry.fqn: entry for entry in entries})
            ranges = reads.ranges(version=version.number)
            reads.run(
                find_ranges(ranges, repo.catalog, version=version.number),
                packs,
                bar,
                version=version.number,
                verify=self._verify,
                allow_pickle=self._allow_pickle,
            )
        self._is_used = True
        # Done already: threads of our own have read in parallel, and torch only waits for it.
        future: Future[None] = Future()
        future.set_result(None)
        return future
