"""A save from end to end, as all ranks run it together.

Three exchanges: plans (each rank's write items against its assignment), digests (against the chunks
that it is to write), results (against the version). Between the last two all packs, then the
manifest, are durable; one transaction then makes the version visible (design, invariants 2 to 4).
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from dcpstore.catalog import Catalog
from dcpstore.collectives import Collectives, in_step, in_turn
from dcpstore.encoding.digests import text_digest
from dcpstore.errors import DcpstoreError, InvalidInputError, NotFoundError
from dcpstore.planning.checks import check_agreement, check_tiling, item_box
from dcpstore.planning.save_planner import DefaultSavePlanner
from dcpstore.progress import ProgressBar
from dcpstore.records import (
    ChunkDefaults,
    EntryRecord,
    ObjectPath,
    PlanRecord,
    ShardRecord,
    Version,
    VersionContent,
    VersionDraft,
)
from dcpstore.saving.assembly import Books
from dcpstore.saving.chunking import Digested, RankData, total_nbytes
from dcpstore.saving.layouts import Assignment, lay_out
from dcpstore.saving.writing import Written, write_chunks
from dcpstore.storage.interface import Storage
from dcpstore.storage.manifests import encode_manifest, manifest_key
from dcpstore.zarr_view.documents import manifest_references

__all__ = ["SaveTarget", "save_version"]

Seconds = dict[str, float]


@dataclass(frozen=True, slots=True)
class SaveTarget:
    """The parts of a repository that a save writes to."""

    catalog: Catalog
    storage: Storage
    chunk: ChunkDefaults


def save_version(
    state_dict: dict[str, Any],
    target: SaveTarget,
    draft: VersionDraft,
    *,
    ranks: Collectives,
    planner: SavePlanner,
    allow_pickle: bool,
) -> Version:
    """Save `state_dict`, of which this rank holds its part, as the version that `draft` describes.

    Every rank of `ranks` calls it with its own state and the same draft (whose `uid`, `ranks`,
    `host` and missing `author` are filled in here), and gets the same `Version`.

    Raises:
        InvalidInputError: ranks disagree, or the plan does not tile its tensors.
        UnsafeDataError: an item is neither tensor nor value, and pickle is not allowed.
        ConflictError, AlreadyExistsError, NotFoundError: as the catalog finds the refs.
        RankFailure: some ranks failed; the repository shows nothing of the save.
    """
    lead = _Lead(target, planner, ranks.size)
    seconds: Seconds = {}

    def local_plan() -> tuple[VersionDraft, SavePlan]:
        planner.set_up_planner(state_dict=state_dict, is_coordinator=ranks.leads)
        return draft, planner.create_local_plan()

    def digest() -> tuple[Digested, Seconds]:
        nonlocal data
        with _timed(seconds, "digest"):
            data = RankData(
                planner.finish_plan(assignment.plan),
                planner,
                dict(assignment.layouts),
                chunk=target.chunk,
                allow_pickle=allow_pickle,
            )
            bar.begin("digest", total_nbytes(data.chunks))
            return data.digest(pool, bar.advance), seconds

    def write() -> tuple[Written, Seconds]:
        with _timed(seconds, "write"):
            chunks = [data.chunks[i] for i in asked]
            bar.begin("write", total_nbytes(chunks))
            written = write_chunks(
                chunks,
                target.storage,
                uid=assignment.uid,
                rank=ranks.rank,
                pool=pool,
                advance=bar.advance,
            )
        return written, seconds

    data: RankData
    try:
        with _timed(seconds, "plan"):
            assignment = in_turn(ranks, "plan", local_plan, lead.plan)
        with (
            ThreadPoolExecutor(torch.get_num_threads(), "dcpstore-save") as pool,
            ProgressBar("save", shown=ranks.leads) as bar,
        ):
            asked = in_turn(ranks, "digest", digest, lead.choose)
            return in_step(ranks, "write", write, lead.commit)
    except BaseException as error:
        lead.give_up(error)
        raise


class _Lead:
    """What the coordinator does with everyone's answers; on the other ranks it is never asked."""

    def __init__(self, target: SaveTarget, planner: SavePlanner, size: int) -> None:
        self._target = target
        self._planner = planner
        self._size = size
        self._open = False  # whether a pending version waits for commit or abort

    def plan(self, told: Sequence[tuple[VersionDraft, SavePlan]]) -> list[Assignment]:
        """Check that the ranks agree, begin the version, and assign each rank its part."""
        _check_drafts([draft for draft, _ in told])
        self.draft = dataclasses.replace(
            told[0][0],
            uid=uuid.uuid4().hex,
            ranks=self._size,
            host=socket.gethostname(),
            author=told[0][0].author or getpass.getuser(),
        )
        all_plans = [plan for _, plan in told]
        if not isinstance(self._planner, DefaultSavePlanner):
            check_agreement(all_plans)
        self._plans, described = self._planner.create_global_plan(all_plans)
        if not isinstance(self._planner, DefaultSavePlanner):
            check_tiling(self._plans)
        self._paths = _paths(described)
        self._layouts = lay_out(self._plans, chunk=self._target.chunk, parent=self._parent())
        self._target.catalog.begin(self.draft)
        self._open = True
        return [
            Assignment(
                self.draft.uid,
                plan,
                {
                    i.index.fqn: self._layouts[i.index.fqn]
                    for i in plan.items
                    if i.tensor_data is not None
                },
            )
            for plan in self._plans
        ]

    def choose(self, told: Sequence[tuple[Digested, Seconds]]) -> list[Sequence[int]]:
        """Return which of its chunks each rank is to write."""
        self._books = Books(
            self._plans,
            self._layouts,
            [digested for digested, _ in told],
            paths=self._paths,
            chunk=self._target.chunk,
        )
        return self._books.choose_writes(self._target.catalog)

    def commit(self, told: Sequence[tuple[Written, Seconds]]) -> Version:
        """Write the manifest and commit the version."""
        began = time.perf_counter()
        books = self._books
        books.take_results([written for written, _ in told])
        tensors = books.tensors(self._target.catalog)
        seconds = {
            phase: max(one[phase] for _, one in told) for phase in ("plan", "digest", "write")
        }
        content = VersionContent(
            entries=books.entries(),
            tensors=tensors,
            packs=[pack for written, _ in told for pack in written.packs],
            plan=_plan_record(self._plans),
            nbytes=books.nbytes,
            nbytes_written=books.nbytes_written,
            nbytes_reused=books.nbytes_reused,
            seconds=seconds,
            created_at=datetime.now(UTC),
        )
        documents, keys = manifest_references(content.entries, tensors, self.draft)
        manifest = encode_manifest(
            self.draft,
            content,
            documents=documents,
            chunk_keys=keys,
            data_url=self._target.storage.url,
        )
        self._target.storage.put(manifest_key(self.draft.uid), manifest)
        seconds["manifest"] = time.perf_counter() - began
        version = self._target.catalog.commit(self.draft.uid, content)
        self._open = False
        return version

    def give_up(self, error: BaseException) -> None:
        """Record why a begun save ended without a version."""
        if self._open:
            self._open = False
            try:
                self._target.catalog.abort(self.draft.uid, f"{type(error).__name__}: {error}")
            except DcpstoreError as second:
                error.add_note(f"the catalog could not record that the save failed: {second}")

    def _parent(self) -> list[EntryRecord]:
        """Return the entries of the version whose grids are to be kept: the parent as it is now."""
        draft = self.draft
        try:
            parent = self._target.catalog.resolve(draft.branch)
        except NotFoundError:
            if draft.parent is None:
                return []
            parent = self._target.catalog.resolve(draft.parent)
        return self._target.catalog.entries(parent.number)


def _check_drafts(drafts: Sequence[VersionDraft]) -> None:
    for field in dataclasses.fields(VersionDraft):
        values = [getattr(draft, field.name) for draft in drafts]
        odd = [rank for rank, value in enumerate(values) if value != values[0]]
        if odd:
            raise InvalidInputError(
                f"the ranks disagree about {field.name}: rank 0 says {values[0]!r}, rank {odd[0]} "
                f"says {values[odd[0]]!r}; pass the same {field.name}= on every rank."
            )


def _paths(described: Metadata) -> Mapping[str, ObjectPath]:
    given = described.planner_data
    if not isinstance(given, Mapping):  # a custom planner keeps something else there
        return {}
    return {fqn: path for fqn, path in given.items() if isinstance(path, tuple)}


def _plan_record(plans: Sequence[SavePlan]) -> PlanRecord:
    shards = [
        ShardRecord(item.index.fqn, rank, item_box(item))
        for rank, plan in enumerate(plans)
        for item in plan.items
        if item.tensor_data is not None
    ]
    shards.sort(key=lambda shard: (shard.fqn, shard.rank, shard.box))
    text = "\n".join(f"{s.fqn}\t{s.rank}\t{s.box.offsets}\t{s.box.sizes}" for s in shards)
    return PlanRecord(text_digest(f"{len(plans)}\n{text}"), len(plans), shards)


@contextlib.contextmanager
def _timed(seconds: Seconds, phase: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - began
