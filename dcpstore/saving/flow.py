"""A save from end to end, as all ranks run it together.

After an opening, three exchanges: plans (each rank's write items against its assignment), digests
(against the chunks that it is to write), results (against the version); one more where the parent
is cut otherwise and only its bytes tell what changed. Packs, then the manifest, are durable before
one transaction makes the version visible (design, invariants 2 to 4).
"""

from __future__ import annotations

import contextlib
import getpass
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from dcpstore.catalog import Catalog
from dcpstore.collectives import Collectives, in_step, in_turn
from dcpstore.encoding.digests import text_digest
from dcpstore.errors import DcpstoreError, InvalidInputError
from dcpstore.planning.checks import check_agreement, check_tiling, item_box
from dcpstore.planning.save_planner import DefaultSavePlanner
from dcpstore.planning.stateful import check_keys, take_state
from dcpstore.progress import ProgressBar
from dcpstore.reading.comparing import find_changed
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
from dcpstore.saving.layouts import Assignment, Layout, lay_out
from dcpstore.saving.writing import Written, write_chunks
from dcpstore.storage.interface import Storage
from dcpstore.storage.manifests import encode_manifest, manifest_key
from dcpstore.zarr_view.documents import chunk_references, zarr_documents

__all__ = ["SaveRequest", "SaveTarget", "save_version"]

Seconds = dict[str, float]


@dataclass(frozen=True, slots=True)
class SaveTarget:
    """The parts of a repository that a save writes to."""

    catalog: Catalog
    storage: Storage


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """What the caller says about the version to be; `parent` and `expect_tip` are refs."""

    branch: str = "main"
    step: int | None = None
    message: str = ""
    tags: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    author: str = ""
    parent: str | int | None = None
    expect_tip: str | int | None = None


def save_version(
    state_dict: Mapping[str, Any],
    open_target: Callable[[], SaveTarget],
    request: Callable[[], SaveRequest],
    *,
    ranks: Collectives,
    planner: SavePlanner,
    allow_pickle: bool,
) -> Version:
    """Save `state_dict`, of which this rank holds its part, as one version.

    Every rank of `ranks` calls it with its own state, and gets the same `Version`. `open_target`
    and `request` are called inside the first exchange, so that all ranks raise what they raise.

    Raises:
        InvalidInputError: ranks disagree, or the plan does not tile its tensors.
        UnsafeDataError: an item is neither tensor nor value, and pickle is not allowed.
        ConflictError, AlreadyExistsError, NotFoundError: as the catalog finds the refs.
        RankFailure: some ranks failed; the repository shows nothing of the save.
    """
    lead = _Lead(planner, ranks.size)
    seconds: Seconds = {}
    target: SaveTarget
    data: RankData

    def begin() -> _Opening:
        nonlocal target
        target = lead.target = open_target()
        return _Opening(target.catalog.repository.uid, request(), check_keys(state_dict))

    def local_plan() -> SavePlan:
        planner.set_up_planner(take_state(state_dict, keys), is_coordinator=ranks.leads)
        return planner.create_local_plan()

    def digest() -> tuple[Digested, Seconds]:
        nonlocal data
        with _timed(seconds, "digest"):
            data = RankData(
                planner.finish_plan(assignment.plan),
                planner,
                dict(assignment.layouts),
                chunk=target.catalog.repository.chunk,
                allow_pickle=allow_pickle,
            )
            bar.begin("digest", total_nbytes(data.chunks))
            return data.digest(pool, bar.advance), seconds

    def compare() -> set[str]:
        with _timed(seconds, "compare"):
            return find_changed(
                data.held(duty.compare),
                target.catalog,
                target.storage,
                version=duty.version,
                pool=pool,
            )

    def write() -> tuple[Written, Seconds]:
        with _timed(seconds, "write"):
            chunks = [data.chunks[i] for i in duty.write]
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

    try:
        with _timed(seconds, "plan"):
            keys = in_step(ranks, "open", begin, lead.begin)
            assignment = in_turn(ranks, "plan", local_plan, lead.plan)
        with (
            ThreadPoolExecutor(torch.get_num_threads(), "dcpstore-save") as pool,
            ProgressBar("save", shown=ranks.leads) as bar,
        ):
            duty = in_turn(ranks, "digest", digest, lead.look_up)
            if duty.compare:
                duty = in_turn(ranks, "compare", compare, lead.take_changed)
            return in_step(ranks, "write", write, lead.commit)
    except BaseException as error:
        lead.give_up(error)
        raise


@dataclass(frozen=True, slots=True)
class _Opening:
    """What each rank brings to the first exchange, and must agree on but for its keys."""

    repository: str
    request: SaveRequest
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Duty:
    """What a rank is to do next: compare entries of a version with what it holds, or write.

    `write` are places among its chunks. All ranks are given the same entries to compare.
    """

    write: Sequence[int] = ()
    compare: Sequence[EntryRecord] = ()
    version: int = 0


class _Lead:
    """What the coordinator does with everyone's answers; on the other ranks it is never asked."""

    target: SaveTarget

    def __init__(self, planner: SavePlanner, size: int) -> None:
        self._planner = planner
        self._size = size
        self._open = False  # whether a pending version waits for commit or abort

    @property
    def _chunk(self) -> ChunkDefaults:
        return self.target.catalog.repository.chunk

    def begin(self, told: Sequence[_Opening]) -> list[str]:
        """Check that the ranks agree and begin the version; return the keys of all ranks."""
        _check_agreement(told)
        request, catalog = told[0].request, self.target.catalog
        self.draft = VersionDraft(
            uid=uuid.uuid4().hex,
            branch=request.branch,
            step=request.step,
            message=request.message,
            tags=request.tags,
            metrics=request.metrics,
            labels=request.labels,
            author=request.author or getpass.getuser(),
            host=socket.gethostname(),
            ranks=self._size,
            parent=_number(catalog, request.parent),
            expect_tip=_number(catalog, request.expect_tip),
        )
        catalog.begin(self.draft)
        self._open = True
        return sorted({key for one in told for key in one.keys})

    def plan(self, all_plans: list[SavePlan]) -> list[Assignment]:
        """Make the global plan and assign each rank its part."""
        checked_by_planner = isinstance(self._planner, DefaultSavePlanner)
        if not checked_by_planner:
            check_agreement(all_plans)
        self._plans, described = self._planner.create_global_plan(all_plans)
        if not checked_by_planner:
            check_tiling(self._plans)
        self._paths = _paths(described)
        self._before_number, self._before = self._parent()
        self._layouts = lay_out(self._plans, chunk=self._chunk, parent=self._before)
        return [
            Assignment(self.draft.uid, plan, _needed(plan, self._layouts)) for plan in self._plans
        ]

    def look_up(self, told: Sequence[tuple[Digested, Seconds]]) -> list[_Duty]:
        """Find what the repository holds; have compared what digests cannot tell."""
        self._books = Books(
            self._plans,
            self._layouts,
            [digested for digested, _ in told],
            paths=self._paths,
            chunk=self._chunk,
        )
        before = {entry.fqn: entry for entry in self._before}
        self._compared = self._books.look_up(self.target.catalog, before)
        if not self._compared:
            return self._writes()
        return [_Duty(compare=self._compared, version=self._before_number)] * self._size

    def take_changed(self, told: Sequence[set[str]]) -> list[_Duty]:
        """Take what each rank found changed; return which of its chunks each is to write."""
        changed = set().union(*told)
        self._books.take_unchanged(e for e in self._compared if e.fqn not in changed)
        return self._writes()

    def _writes(self) -> list[_Duty]:
        return [_Duty(write=mine) for mine in self._books.choose_writes(self.target.catalog)]

    def commit(self, told: Sequence[tuple[Written, Seconds]]) -> Version:
        """Write the manifest and commit the version."""
        began = time.perf_counter()
        books = self._books
        books.take_results([written for written, _ in told])
        tensors = books.tensors(self.target.catalog)
        seconds = {
            phase: max(one.get(phase, 0.0) for _, one in told)
            for phase in ("plan", "digest", "compare", "write")
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
            aliases=books.aliases,
        )
        self.target.storage.put(manifest_key(self.draft.uid), self._manifest(content))
        seconds["manifest"] = time.perf_counter() - began
        version = self.target.catalog.commit(self.draft.uid, content)
        self._open = False
        return version

    def _manifest(self, content: VersionContent) -> bytes:
        entries = self._books.records(content)
        chunks = {tensor.digest: tensor.chunks for tensor in content.tensors}
        return encode_manifest(
            self.draft,
            content,
            chunks=chunks,
            data_url=self.target.storage.url,
            documents=zarr_documents(entries, {"uid": self.draft.uid, "step": self.draft.step}),
            references=chunk_references(entries, chunks),
        )

    def give_up(self, error: BaseException) -> None:
        """Record why a begun save ended without a version."""
        if self._open:
            self._open = False
            try:
                self.target.catalog.abort(self.draft.uid, f"{type(error).__name__}: {error}")
            except DcpstoreError as second:
                error.add_note(f"the catalog could not record that the save failed: {second}")

    def _parent(self) -> tuple[int, list[EntryRecord]]:
        """Return the parent as it is now, number and entries: its grids are kept where they fit."""
        ref: str | int | None = self.draft.branch
        if not any(known.name == ref for known in self.target.catalog.refs("branch")):
            ref = self.draft.parent
            if ref is None:
                return 0, []
        number = self.target.catalog.resolve(ref).number
        return number, self.target.catalog.entries(number)


def _check_agreement(told: Sequence[_Opening]) -> None:
    uids = [one.repository for one in told]
    if len(set(uids)) > 1:
        odd = next(rank for rank, uid in enumerate(uids) if uid != uids[0])
        raise InvalidInputError(
            f"rank 0 saves to repository {uids[0]}, rank {odd} to {uids[odd]}; pass the same "
            "repository on every rank, on storage that all of them see."
        )
    for name in (part.name for part in fields(SaveRequest)):
        values = [getattr(one.request, name) for one in told]
        texts = [repr(value) for value in values]  # a NaN does not equal itself
        odd = next((rank for rank, text in enumerate(texts) if text != texts[0]), 0)
        if odd:
            raise InvalidInputError(
                f"the ranks disagree about {name}: rank 0 says {values[0]!r}, rank {odd} says "
                f"{values[odd]!r}; pass the same {name}= on every rank."
            )


def _number(catalog: Catalog, ref: str | int | None) -> int | None:
    return None if ref is None else catalog.resolve(ref).number


def _needed(plan: SavePlan, layouts: Mapping[str, Layout]) -> dict[str, Layout]:
    return {
        item.index.fqn: layouts[item.index.fqn]
        for item in plan.items
        if item.tensor_data is not None
    }


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
