"""A load from start to end, as all ranks run it together.

The coordinator resolves the ref and reads the entries. Each rank takes the state of its objects and
plans the load against the entries. Only if everything fits on all ranks does any rank change a
tensor: then the coordinator finds the chunks of all ranks in the catalog, and each rank reads its
own. When all have finished, each rank gives its objects their state, and checks that they hold it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

from dcpstore.catalog.catalog import Catalog
from dcpstore.catalog.read.entries import load_entries, load_planner_data
from dcpstore.catalog.read.ref_lookup import resolve
from dcpstore.collectives import Collectives, in_step, in_turn
from dcpstore.core.gc_pause import gc_paused
from dcpstore.core.progress import ProgressBar
from dcpstore.core.uids import new_uid
from dcpstore.errors import InvalidInputError, MismatchError, UnsafeDataError
from dcpstore.formats.composition import compositions, outer_fqns
from dcpstore.geometry.box_table import Ints
from dcpstore.loading.chunk_rows import ChunkRows, as_rows, hand_out
from dcpstore.loading.item_reads import ItemReads, check_values
from dcpstore.loading.owner_check import OwnerCheck
from dcpstore.loading.shared_memory import check_memory
from dcpstore.planning.load_planner import DefaultLoadPlanner, keeps_local_plans
from dcpstore.planning.torch_metadata import describe_version
from dcpstore.reading.box_reads import find_ranges
from dcpstore.records import (
    ChunkRange,
    EntryRecord,
    LoadReport,
    RefLike,
    SentRef,
    StoredChunk,
    Version,
    VersionRef,
)
from dcpstore.state.composed import check_none_composed
from dcpstore.state.load_options import LoadOptions, NamesInOptions
from dcpstore.state.stateful import Template, check_fillable, common_growth, take_template
from dcpstore.state.walk import nesting_checked
from dcpstore.storage.interface import Storage
from dcpstore.storage.packs import PackReader

__all__ = [
    "LoadRequest",
    "LoadSource",
    "OwnerFaults",
    "RankLoad",
    "VersionToLoad",
    "load_version",
]


@dataclass(frozen=True, slots=True)
class LoadSource:
    """The parts of a repository that a load reads from.

    `location` is what torch's planners get as `checkpoint_id`.
    """

    catalog: Catalog
    storage: Storage
    location: str | Path


@gc_paused()
def load_version(
    state_dict: MutableMapping[str, Any],
    open_source: Callable[[], LoadSource],
    ref: RefLike | None,
    *,
    ranks: Collectives,
    make_planner: Callable[[], LoadPlanner],
    verify: bool,
    allow_pickle: bool,
    dry_run: bool = False,
    init_missing: Callable[[str, torch.Tensor], object] | None = None,
) -> LoadReport:
    """Fill `state_dict`, this rank's part of the state, from the version that `ref` names.

    Every rank of `ranks` calls it with its own state, and gets the same report.

    Args:
        state_dict: what to fill.
        open_source: opens the repository; called inside the first exchange, so that its errors are
            raised on all ranks.
        ref: of the version.
        ranks: the ranks that load together.
        make_planner: makes the load planner; called like `open_source`.
        verify: whether digests are checked.
        allow_pickle: whether pickles among the values may be read.
        dry_run: whether only to report what a load would do.
        init_missing: initialises a tensor that the version lacks, given its FQN.

    Raises:
        MismatchError: before the load: all that is missing or differs, on any rank, and no tensor
            was changed. After it (the message says so): what the objects do not hold.
        NotFoundError: there is no such version.
        CorruptionError: stored bytes are damaged.
        UnsafeDataError: a value is a pickle, and `allow_pickle` is False; no tensor was changed.
        RankFailure: some ranks failed.
    """
    load = _Load(
        state_dict=state_dict,
        ref=ref,
        ranks=ranks,
        verify=verify,
        allow_pickle=allow_pickle,
        dry_run=dry_run,
        init_missing=init_missing,
    )
    load.opened = in_step(ranks, "open", lambda: load.open(open_source, make_planner), load.resolve)
    load.growth = in_step(ranks, "state_dict", load.take_state, common_growth)
    if dry_run:
        return in_step(ranks, "plan", load.predict, load.report)
    if load.opened.sends_plans:
        plan = in_turn(ranks, "plan", load.plan, load.planner.create_global_plan)
    else:
        in_step(ranks, "plan", load.plan_locally, load.check_names)
        plan = load.local_plan
    if ranks.size == 1:
        stored = load.find(load.finish_plan(plan))
    else:
        found = in_turn(ranks, "find", lambda: as_rows(load.finish_plan(plan)), load.hand_out)
        stored = found.chunks()
    report = in_step(ranks, "read", lambda: load.read(stored), load.report)
    in_step(ranks, "load_state_dict", load.give_state, lambda _: None)
    # A step of its own, because `state_dict()` may be a collective call.
    faults = in_step(ranks, "state_dict", load.check_owners, OwnerFaults.joined)
    lost = faults.lost
    if lost:  # checked twice: an item that changes by itself, such as a clock, is not lost
        again = in_step(ranks, "state_dict", load.check_owners, OwnerFaults.joined).lost
        lost = {fqn: text for fqn, text in lost.items() if again.get(fqn) == text}
    if lost and load.options.strict:
        raise MismatchError.after_load(lost.values())
    return replace(report, differences=tuple(lost.values()), unfilled=faults.unfilled)


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What each rank sends in the first exchange; all but `keys` must be the same on all ranks."""

    repository: str
    ref: SentRef | None
    dry_run: bool
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VersionToLoad:
    """What all ranks load: a version, its entries, and the sorted keys of all ranks' states.

    `planner_data` is what the save planner stored with the version, as typed JSON. It is None if it
    stored none, or if the load planner is ours, which does not use it. `sends_plans` says whether
    the coordinator's planner makes a global plan of its own; otherwise each rank carries out its
    local plan as it is, and need not send it.
    """

    version: Version
    entries: Sequence[EntryRecord]
    keys: Sequence[str]
    planner_data: str | None
    sends_plans: bool


@dataclass(frozen=True, slots=True)
class RankLoad:
    """What one rank reports of its part of a load."""

    missing: tuple[str, ...] = ()
    asked: frozenset[str] = frozenset()
    cast: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    chunks: int = 0
    nbytes: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    names_in_options: NamesInOptions | None = None


@dataclass(frozen=True, slots=True)
class OwnerFaults:
    """What is wrong with the objects of the state after a load.

    Attributes:
        lost: by FQN, a message for each item that its object lacks, or holds otherwise than stored.
        unfilled: FQNs of tensors that are still on the meta device.
    """

    lost: Mapping[str, str]
    unfilled: tuple[str, ...]

    @classmethod
    def joined(cls, ranks: Sequence[OwnerFaults]) -> OwnerFaults:
        """Return what all ranks found; the text for an FQN is that of the lowest rank."""
        lost = {fqn: one.lost[fqn] for one in reversed(ranks) for fqn in one.lost}
        return cls({fqn: lost[fqn] for fqn in sorted(lost)}, _joined(one.unfilled for one in ranks))


@dataclass(kw_only=True)
class _Load:
    """One rank's work in a load. Each method runs inside an exchange, in this order."""

    state_dict: MutableMapping[str, Any]
    ref: RefLike | None
    ranks: Collectives
    verify: bool
    allow_pickle: bool
    dry_run: bool
    init_missing: Callable[[str, torch.Tensor], object] | None
    began: float = field(default_factory=time.perf_counter)
    # The methods set these, in this order.
    source: LoadSource = field(init=False)
    planner: LoadPlanner = field(init=False)
    options: LoadOptions = field(init=False)
    allocates: bool = field(init=False)  # whether targets get memory
    opened: VersionToLoad = field(init=False)
    by_fqn: Mapping[str, EntryRecord] = field(init=False)  # the entries of `opened`
    template: Template = field(init=False)
    # Key: the FQN of an owner. Value: the stored entries below the owner that its state_dict() has
    # on none of the ranks that hold the owner. Both are named by FQNs of the state.
    growth: Mapping[str, frozenset[str]] = field(init=False)
    local_plan: LoadPlan = field(init=False)  # only where plans are not sent
    finished: LoadPlan = field(init=False)
    reads: ItemReads = field(init=False)
    planned: float = field(init=False)  # when the plan was finished
    owner_check: OwnerCheck = field(init=False)

    def open(
        self, open_source: Callable[[], LoadSource], make_planner: Callable[[], LoadPlanner]
    ) -> LoadRequest:
        """Open the repository and make the planner; return what the ranks must agree on."""
        self.source = open_source()
        keys = check_fillable(self.state_dict)
        self.planner = make_planner()
        ours = self.planner if isinstance(self.planner, DefaultLoadPlanner) else None
        self.options = ours.options if ours else LoadOptions()
        # In a dry run targets get no memory, unless the planner is not ours: it may need it.
        self.allocates = not (self.dry_run and ours)
        ref = VersionRef.reduced(self.ref)
        return LoadRequest(self.source.catalog.repository.uid, ref, self.dry_run, keys)

    def resolve(self, requests: Sequence[LoadRequest]) -> VersionToLoad:
        """On the coordinator: resolve the ref, and read the entries of the version."""
        _check_agreement(requests)
        keys = sorted({key for one in requests for key in one.keys})
        catalog = self.source.catalog
        with catalog.keep_connection():
            version = resolve(catalog, self.ref)
            # Ours does not use planner data, but a subclass may.
            is_ours = type(self.planner) is DefaultLoadPlanner
            data = None if is_ours else load_planner_data(catalog, version.number)
            entries = load_entries(catalog, version.number)
            sends_plans = not keeps_local_plans(self.planner)
            return VersionToLoad(version, entries, keys, data, sends_plans)

    def take_state(self) -> Mapping[str, frozenset[str]]:
        """Take the plain state.

        Returns, for each owner on this rank that is not a module, the stored entries below it that
        its state_dict() lacks. Owners and entries are given by the FQNs of the state (after
        `rename`).
        """
        self.by_fqn = {entry.fqn: entry for entry in self.opened.entries}
        with nesting_checked():
            self.template = take_template(
                self.state_dict,
                self.opened.keys,
                self.opened.entries,
                self.options,
                rank=self.ranks.rank,
                dry_run=not self.allocates,
            )
        return self.template.growth()

    def plan(self) -> LoadPlan:
        """Return the read items of this rank; raise MismatchError if something does not fit."""
        self.template.take_growth(self.growth, dry_run=not self.allocates)
        with nesting_checked():
            plan = self._fitting_plan()
        number = self.opened.version.number
        if isinstance(self.planner, DefaultLoadPlanner):
            catalog, storage = self.source.catalog, self.source.storage
            check_memory(self.planner, self.by_fqn, catalog, storage, version=number)
        check_values(
            plan, self.planner, self.by_fqn, version=number, allow_pickle=self.allow_pickle
        )
        return plan

    def plan_locally(self) -> NamesInOptions | None:
        """Make and keep the plan of this rank; return what the ranks must judge together."""
        self.local_plan = self.plan()
        return self._names_in_options()

    def check_names(self, ranks: Sequence[NamesInOptions | None]) -> None:
        """On the coordinator: check that each name in the options is meant for some rank.

        Raises:
            NotFoundError: neither the version nor the state of any rank has one of them.
        """
        if isinstance(self.planner, DefaultLoadPlanner):
            self.planner.check_names(ranks)

    def predict(self) -> RankLoad:
        """Return what a load would do; `differences` are the reasons why it would fail."""
        try:
            plan = self.plan()
        except MismatchError as error:
            report = RankLoad(asked=self._asked(None), differences=error.differences)
        except UnsafeDataError as error:
            report = RankLoad(asked=self._asked(None), differences=(str(error),))
        else:
            reads = ItemReads(plan, self.planner, self.by_fqn)
            counts = reads.measure(self.source.catalog, version=self.opened.version.number)
            report = self._reported(plan, *counts)
        # The names in the options are judged from all ranks together.
        return replace(report, names_in_options=self._names_in_options())

    def finish_plan(self, mine: LoadPlan) -> list[ChunkRange]:
        """Finish this rank's part of the global plan; return which chunks it needs.

        No tensor is changed yet.
        """
        self.finished = self.planner.finish_plan(mine)
        self.reads = ItemReads(self.finished, self.planner, self.by_fqn)
        self.reads.check_room()
        self.planned = time.perf_counter()
        return self.reads.ranges(version=self.opened.version.number)

    def find(self, wanted: Sequence[ChunkRange]) -> list[StoredChunk]:
        """Find chunks in the catalog, in one statement.

        Raises:
            NotFoundError: the version has expired in the meantime.
            CorruptionError: the catalog lacks some of them.
        """
        return find_ranges(wanted, self.source.catalog, version=self.opened.version.number)

    def hand_out(self, wanted: Sequence[Ints]) -> list[ChunkRows]:
        """On the coordinator: find the chunks of all ranks, as `find`."""
        return hand_out(wanted, self.find)

    def read(self, stored: Sequence[StoredChunk]) -> RankLoad:
        """Read this rank's part of the version into its tensors."""
        with (
            ProgressBar("load", shown=self.ranks.leads) as bar,
            closing(PackReader(self.source.storage)) as packs,
        ):
            counts = self.reads.run(
                stored,
                packs,
                bar,
                version=self.opened.version.number,
                verify=self.verify,
                allow_pickle=self.allow_pickle,
            )
        if self.init_missing is not None:
            _initialise(self.planner, self.init_missing)
        seconds = {
            "plan": self.planned - self.began,
            "read": time.perf_counter() - self.planned,
        }
        return replace(self._reported(self.finished, *counts), seconds=seconds)

    def give_state(self) -> None:
        """Give the owners their state."""
        self.owner_check = OwnerCheck(self.template)
        self.template.give_back(self.state_dict, rank=self.ranks.rank)
        self.owner_check.restore_optimizers()

    def check_owners(self) -> OwnerFaults:
        """Return what the owners lack, or hold otherwise than stored."""
        lost = self.owner_check.differences(rank=self.ranks.rank)
        return OwnerFaults(lost, tuple(self.owner_check.left_on_meta()))

    def report(self, ranks: Sequence[RankLoad]) -> LoadReport:
        """On the coordinator: join the reports of all ranks."""
        asked = frozenset().union(*(one.asked for one in ranks))
        differences = [one.differences for one in ranks]
        if isinstance(self.planner, DefaultLoadPlanner):
            named = (one.names_in_options for one in ranks)
            differences.append(tuple(self.planner.name_faults(named)))
        return LoadReport(
            version=self.opened.version,
            missing=_joined(one.missing for one in ranks),
            unexpected=_unexpected(self.opened.entries, asked),
            chunks=sum(one.chunks for one in ranks),
            nbytes_read=sum(one.nbytes for one in ranks),
            seconds={phase: max(one.seconds[phase] for one in ranks) for phase in ranks[0].seconds},
            cast=_joined(one.cast for one in ranks),
            differences=_joined(differences),
        )

    def _fitting_plan(self) -> LoadPlan:
        """Return this rank's plan, or raise one error with all differences."""
        opened, template = self.opened, self.template
        meta = StorageMeta(self.source.location, opened.version.uid, new_uid())
        described = describe_version(
            opened.entries, meta, opened.planner_data, allow_pickle=self.allow_pickle
        )
        if isinstance(self.planner, DefaultLoadPlanner):
            self.planner.optional = template.optional
            self.planner.compositions = compositions(opened.entries)
        else:
            check_none_composed(template.state)
        differences = [*template.differences]
        self.planner.set_up_planner(template.state, described, self.ranks.leads)
        try:
            plan = self.planner.create_local_plan()
        except MismatchError as error:
            differences += error.differences
        if differences:
            raise MismatchError.listing(differences)
        return plan

    def _names_in_options(self) -> NamesInOptions | None:
        named = getattr(self.planner, "names_in_options", None)
        return named if isinstance(named, NamesInOptions) else None

    def _reported(self, plan: LoadPlan, chunks: int, nbytes: int) -> RankLoad:
        return RankLoad(
            missing=tuple(getattr(self.planner, "missing", ())),
            asked=self._asked(plan),
            cast=tuple(getattr(self.planner, "cast", ())),
            chunks=chunks,
            nbytes=nbytes,
        )

    def _asked(self, plan: LoadPlan | None) -> frozenset[str]:
        """Return the FQNs of the version that this rank asked for, also those of empty tensors."""
        asked = frozenset(item.storage_index.fqn for item in plan.items) if plan else frozenset()
        if isinstance(self.planner, DefaultLoadPlanner):
            return asked | self.planner.stored
        return asked.union(getattr(self.planner, "state_dict", ()))


def _unexpected(entries: Sequence[EntryRecord], asked: frozenset[str]) -> tuple[str, ...]:
    outer = outer_fqns(entry.fqn for entry in entries)
    fqns = (entry.fqn for entry in entries if entry.fqn not in asked)
    return tuple(dict.fromkeys(outer.get(fqn, fqn) for fqn in fqns))


def _joined(texts: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(sorted({text for some in texts for text in some}))


@torch.no_grad()
def _initialise(planner: LoadPlanner, init_missing: Callable[[str, torch.Tensor], object]) -> None:
    assert isinstance(planner, DefaultLoadPlanner)
    planner.give_room(planner.missing)
    for fqn in planner.missing:
        tensor = planner.missing_tensor(fqn)
        if tensor is not None:
            init_missing(fqn, tensor)


def _check_agreement(requests: Sequence[LoadRequest]) -> None:
    asked = [(one.repository, one.ref, one.dry_run) for one in requests]
    odd = next((rank for rank, one in enumerate(asked) if one != asked[0]), 0)
    if odd:
        raise InvalidInputError(
            f"rank 0 loads {asked[0][1]!r} of repository {asked[0][0]} (dry_run={asked[0][2]}), "
            f"rank {odd} {asked[odd][1]!r} of {asked[odd][0]} (dry_run={asked[odd][2]}); pass the "
            "same ref, repository and dry_run on every rank."
        )
