"""A load from end to end, as all ranks run it together.

The coordinator resolves the ref and reads the entries; each rank plans against them; all agree that
everything fits before any rank touches a tensor; then each rank asks the catalog for just its
chunks and reads them; when all have, each hands its objects their state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

from dcpstore.catalog import Catalog
from dcpstore.collectives import Collectives, in_step, in_turn
from dcpstore.collector import collector_held
from dcpstore.encoding.values import decode_value
from dcpstore.errors import InvalidInputError, MismatchError, UnsafeDataError
from dcpstore.loading.items import ItemReads, check_values
from dcpstore.planning.described import describe_entries
from dcpstore.planning.load_options import LoadOptions
from dcpstore.planning.load_planner import DefaultLoadPlanner
from dcpstore.planning.plain import nesting_checked
from dcpstore.planning.stateful import Template, check_fillable, give_state, take_template
from dcpstore.progress import ProgressBar
from dcpstore.records import EntryRecord, LoadReport, Version
from dcpstore.storage.interface import Storage
from dcpstore.storage.packs import PackReader
from dcpstore.uids import new_uid

__all__ = ["LoadSource", "load_version"]


@dataclass(frozen=True, slots=True)
class LoadSource:
    """The parts of a repository that a load reads from.

    `location` is what torch's planners are given as `checkpoint_id`.
    """

    catalog: Catalog
    storage: Storage
    location: str | Path


@dataclass(frozen=True, slots=True)
class _Told:
    """What one rank tells of its load."""

    missing: tuple[str, ...] = ()
    asked: frozenset[str] = frozenset()
    cast: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    chunks: int = 0
    nbytes: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)


@collector_held()
def load_version(
    state_dict: MutableMapping[str, Any],
    open_source: Callable[[], LoadSource],
    ref: str | int | None,
    *,
    ranks: Collectives,
    make_planner: Callable[[], LoadPlanner],
    verify: bool,
    allow_pickle: bool,
    dry_run: bool = False,
    init_missing: Callable[[str, torch.Tensor], object] | None = None,
) -> LoadReport:
    """Fill `state_dict`, of which this rank holds its part, from the version that `ref` names.

    Every rank of `ranks` calls it with its own state, and gets the same report. `open_source`
    and `make_planner` are called inside the first exchange, so that all ranks raise their errors.

    Raises:
        MismatchError: everything that is missing or differs, on any rank; no tensor was touched.
        NotFoundError: no such version.
        CorruptionError: stored bytes are damaged.
        UnsafeDataError: a value is a pickle, and pickle is not allowed; no tensor was touched.
        RankFailure: some ranks failed.
    """
    began = time.perf_counter()
    source: LoadSource
    planner: LoadPlanner
    template: Template

    def begin() -> _Opening:
        nonlocal source, planner
        source = open_source()
        keys = check_fillable(state_dict)
        planner = make_planner()
        return _Opening(source.catalog.repository.uid, ref, dry_run, keys)

    def resolve(
        told: Sequence[_Opening],
    ) -> tuple[Version, list[EntryRecord], list[str], str | None]:
        _check_agreement(told)
        keys = sorted({key for one in told for key in one.keys})
        with source.catalog.kept():
            version = source.catalog.resolve(ref)
            kept = _kept_data(source.catalog, planner, version)
            return version, source.catalog.entries(version.number), keys, kept

    def local_plan() -> LoadPlan:
        nonlocal template
        meta = StorageMeta(source.location, version.uid, new_uid())
        described = _described(entries, meta, kept, allow_pickle=allow_pickle)
        with nesting_checked():
            template = _template(
                state_dict, keys, entries, planner=planner, rank=ranks.rank, dry_run=dry_run
            )
            plan = _fitting_plan(planner, template, described, leads=ranks.leads)
        if not allow_pickle:
            check_values(plan, by_fqn, version=version.number)
        return plan

    def foretell() -> _Told:
        try:
            plan = local_plan()
        except MismatchError as error:
            return _Told(asked=_asked(planner, None), differences=error.differences)
        except UnsafeDataError as error:
            return _Told(asked=_asked(planner, None), differences=(str(error),))
        reads = ItemReads(plan, planner, by_fqn)
        chunks, nbytes = reads.measure(source.catalog, version=version.number)
        return _told(planner, plan, chunks, nbytes)

    def read() -> _Told:
        plan = planner.finish_plan(mine)
        planned = time.perf_counter()
        with (
            ProgressBar("load", shown=ranks.leads) as bar,
            closing(PackReader(source.storage)) as packs,
        ):
            reads = ItemReads(plan, planner, by_fqn)
            chunks, nbytes = reads.run(
                source.catalog,
                packs,
                bar,
                version=version.number,
                verify=verify,
                allow_pickle=allow_pickle,
            )
        if init_missing is not None:
            _initialise(planner, init_missing)
        seconds = {"plan": planned - began, "read": time.perf_counter() - planned}
        return _told(planner, plan, chunks, nbytes, seconds)

    def report(told: Sequence[_Told]) -> LoadReport:
        asked = frozenset().union(*(one.asked for one in told))
        return LoadReport(
            version=version,
            missing=_joined(one.missing for one in told),
            unexpected=tuple(e.fqn for e in entries if e.fqn not in asked),
            chunks=sum(one.chunks for one in told),
            nbytes_read=sum(one.nbytes for one in told),
            seconds={phase: max(one.seconds[phase] for one in told) for phase in told[0].seconds},
            cast=_joined(one.cast for one in told),
            differences=_joined(one.differences for one in told),
        )

    version, entries, keys, kept = in_step(ranks, "open", begin, resolve)
    by_fqn = {entry.fqn: entry for entry in entries}
    if dry_run:
        return in_step(ranks, "plan", foretell, report)
    mine: LoadPlan = in_turn(ranks, "plan", local_plan, planner.create_global_plan)
    done = in_step(ranks, "read", read, report)
    in_step(
        ranks,
        "load_state_dict",
        lambda: give_state(state_dict, template, rank=ranks.rank),
        lambda _: None,
    )
    return done


@dataclass(frozen=True, slots=True)
class _Opening:
    """What each rank brings to the first exchange, and must agree on but for its keys."""

    repository: str
    ref: str | int | None
    dry_run: bool
    keys: tuple[str, ...]


def _template(
    state_dict: Mapping[str, Any],
    keys: Sequence[str],
    entries: Sequence[EntryRecord],
    *,
    planner: LoadPlanner,
    rank: int,
    dry_run: bool,
) -> Template:
    if not isinstance(planner, DefaultLoadPlanner):  # torch's own cannot do without memory
        return take_template(state_dict, keys, entries, LoadOptions(), rank=rank, dry_run=False)
    template = take_template(state_dict, keys, entries, planner.options, rank=rank, dry_run=dry_run)
    planner.optional = template.optional
    return template


def _fitting_plan(
    planner: LoadPlanner, template: Template, described: Metadata, *, leads: bool
) -> LoadPlan:
    """Return this rank's plan, if neither the planner nor the template found a difference."""
    differences = [*template.differences]
    planner.set_up_planner(template.state, described, leads)
    try:
        plan = planner.create_local_plan()
    except MismatchError as error:
        differences += error.differences
    if differences:
        raise MismatchError.listing(differences)
    return plan


def _kept_data(catalog: Catalog, planner: LoadPlanner, version: Version) -> str | None:
    """Return what a save planner kept with a version; our own load planner asks for nothing."""
    return None if type(planner) is DefaultLoadPlanner else catalog.planner_data(version.number)


def _described(
    entries: Sequence[EntryRecord], meta: StorageMeta, kept: str | None, *, allow_pickle: bool
) -> Metadata:
    """Return torch's description of a version, with what its save planner kept."""
    described = describe_entries(entries, meta)
    if kept is not None:
        described.planner_data = decode_value(kept, allow_pickle=allow_pickle)
    return described


def _told(
    planner: LoadPlanner,
    plan: LoadPlan,
    chunks: int,
    nbytes: int,
    seconds: Mapping[str, float] | None = None,
) -> _Told:
    return _Told(
        missing=tuple(getattr(planner, "missing", ())),
        asked=_asked(planner, plan),
        cast=tuple(getattr(planner, "cast", ())),
        chunks=chunks,
        nbytes=nbytes,
        seconds=seconds or {},
    )


def _asked(planner: LoadPlanner, plan: LoadPlan | None) -> frozenset[str]:
    """Return the FQNs of the version that a rank asked for, those without elements too."""
    asked = frozenset(item.storage_index.fqn for item in plan.items) if plan else frozenset()
    if isinstance(planner, DefaultLoadPlanner):
        return asked | planner.stored
    return asked.union(getattr(planner, "state_dict", ()))


def _joined(told: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(sorted({text for texts in told for text in texts}))


@torch.no_grad()
def _initialise(planner: LoadPlanner, init_missing: Callable[[str, torch.Tensor], object]) -> None:
    assert isinstance(planner, DefaultLoadPlanner)
    planner.give_room(planner.missing)
    for fqn in planner.missing:
        tensor = planner.state_dict[fqn]
        if isinstance(tensor, torch.Tensor):
            init_missing(fqn, tensor)


def _check_agreement(told: Sequence[_Opening]) -> None:
    asked = [(one.repository, one.ref, one.dry_run) for one in told]
    odd = next((rank for rank, one in enumerate(asked) if one != asked[0]), 0)
    if odd:
        raise InvalidInputError(
            f"rank 0 loads {asked[0][1]!r} of repository {asked[0][0]} (dry_run={asked[0][2]}), "
            f"rank {odd} {asked[odd][1]!r} of {asked[odd][0]} (dry_run={asked[odd][2]}); pass the "
            "same ref, repository and dry_run on every rank."
        )
