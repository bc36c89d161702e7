"""A load from end to end, as all ranks run it together.

The coordinator resolves the ref and reads the entries; each rank plans against them; all agree that
everything fits before any rank touches a tensor; then each rank asks the catalog for just its
chunks and reads them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

from dcpstore.catalog import Catalog
from dcpstore.collectives import Collectives, in_step, in_turn
from dcpstore.errors import InvalidInputError
from dcpstore.loading.items import ItemReads
from dcpstore.planning.described import describe_entries
from dcpstore.planning.stateful import check_keys, give_state, take_template
from dcpstore.progress import ProgressBar
from dcpstore.records import EntryRecord, LoadReport, Version
from dcpstore.storage.interface import Storage
from dcpstore.storage.packs import PackReader

__all__ = ["LoadSource", "load_version"]


@dataclass(frozen=True, slots=True)
class LoadSource:
    """The parts of a repository that a load reads from."""

    catalog: Catalog
    storage: Storage


@dataclass(frozen=True, slots=True)
class _Told:
    """What one rank tells of its load."""

    missing: tuple[str, ...] = ()
    asked: frozenset[str] = frozenset()
    chunks: int = 0
    nbytes: int = 0
    plan_seconds: float = 0.0
    read_seconds: float = 0.0


def load_version(
    state_dict: dict[str, Any],
    open_source: Callable[[], LoadSource],
    ref: str | int | None,
    *,
    ranks: Collectives,
    planner: LoadPlanner,
    verify: bool,
    allow_pickle: bool,
) -> LoadReport:
    """Fill `state_dict`, of which this rank holds its part, from the version that `ref` names.

    Every rank of `ranks` calls it with its own state, and gets the same report. `open_source` is
    called inside the first exchange, so that what it raises is raised on all ranks.

    Raises:
        MismatchError: everything that is missing or differs, on any rank; no tensor was touched.
        NotFoundError: no such version.
        CorruptionError: stored bytes are damaged.
        UnsafeDataError: a value is a pickle, and pickle is not allowed.
        RankFailure: some ranks failed.
    """
    began = time.perf_counter()
    source: LoadSource
    template: dict[str, Any]

    def begin() -> _Opening:
        nonlocal source
        source = open_source()
        return _Opening(source.catalog.repository.uid, ref, check_keys(state_dict))

    def resolve(told: Sequence[_Opening]) -> tuple[Version, list[EntryRecord], list[str]]:
        _check_agreement(told)
        version = source.catalog.resolve(ref)
        keys = sorted({key for one in told for key in one.keys})
        return version, source.catalog.entries(version.number), keys

    def local_plan() -> LoadPlan:
        nonlocal template
        template = take_template(state_dict, keys, entries)
        planner.set_up_planner(template, described, ranks.leads)
        return planner.create_local_plan()

    def read() -> _Told:
        plan = planner.finish_plan(mine)
        planned = time.perf_counter()
        with (
            ProgressBar("load", shown=ranks.leads) as bar,
            closing(PackReader(source.storage)) as packs,
        ):
            reads = ItemReads(plan, planner, {e.fqn: e for e in entries})
            chunks, nbytes = reads.run(
                source.catalog,
                packs,
                bar,
                version=version.number,
                verify=verify,
                allow_pickle=allow_pickle,
            )
        return _Told(
            missing=tuple(getattr(planner, "missing", ())),
            asked=_asked(planner, plan),
            chunks=chunks,
            nbytes=nbytes,
            plan_seconds=planned - began,
            read_seconds=time.perf_counter() - planned,
        )

    def report(told: Sequence[_Told]) -> LoadReport:
        asked = frozenset().union(*(one.asked for one in told))
        return LoadReport(
            version=version,
            missing=tuple(sorted({fqn for one in told for fqn in one.missing})),
            unexpected=tuple(e.fqn for e in entries if e.fqn not in asked),
            chunks=sum(one.chunks for one in told),
            nbytes_read=sum(one.nbytes for one in told),
            seconds={
                "plan": max(one.plan_seconds for one in told),
                "read": max(one.read_seconds for one in told),
            },
        )

    version, entries, keys = in_step(ranks, "open", begin, resolve)
    described = describe_entries(entries)
    mine = in_turn(ranks, "plan", local_plan, planner.create_global_plan)
    done = in_step(ranks, "read", read, report)
    give_state(state_dict, template)
    return done


@dataclass(frozen=True, slots=True)
class _Opening:
    """What each rank brings to the first exchange, and must agree on but for its keys."""

    repository: str
    ref: str | int | None
    keys: tuple[str, ...]


def _asked(planner: LoadPlanner, plan: LoadPlan) -> frozenset[str]:
    """Return the FQNs that a rank asked for, those without elements (and so without items) too."""
    asked = frozenset(item.storage_index.fqn for item in plan.items)
    return asked.union(getattr(planner, "state_dict", ()))


def _check_agreement(told: Sequence[_Opening]) -> None:
    asked = [(one.repository, one.ref) for one in told]
    odd = next((rank for rank, one in enumerate(asked) if one != asked[0]), 0)
    if odd:
        raise InvalidInputError(
            f"rank 0 loads {asked[0][1]!r} of repository {asked[0][0]}, rank {odd} "
            f"{asked[odd][1]!r} of {asked[odd][0]}; pass the same ref and repository on every rank."
        )
