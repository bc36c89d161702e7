"""A save from end to end, as all ranks run it together.

After an opening, three exchanges: plans (what each rank holds against what it is to write), digests
(against the chunks that it is to write), results (against the version); one more where the parent
is cut otherwise and only its bytes tell what changed. Packs, then the manifest, are durable before
one transaction makes the version visible (design, invariants 2 to 4).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.distributed.checkpoint.planner import SavePlanner

from dcpstore.collectives import Collectives, in_step, in_turn
from dcpstore.collector import collector_free, collector_held
from dcpstore.leases import kept_lease
from dcpstore.planning.plain import check_state, nesting_checked
from dcpstore.planning.save_planner import DefaultSavePlanner
from dcpstore.planning.stateful import check_keys, take_state
from dcpstore.progress import ProgressBar
from dcpstore.reading.comparing import find_changed
from dcpstore.records import Version
from dcpstore.saving.chunking import Digested, RankData, total_nbytes
from dcpstore.saving.lead import Lead, Opening, Seconds
from dcpstore.saving.plans import LocalPlan, Offer
from dcpstore.saving.publishing import SaveRequest, SaveTarget
from dcpstore.saving.reporting import Reports
from dcpstore.saving.writing import Written, write_chunks

__all__ = ["save_version"]


@collector_held()
def save_version(
    state_dict: Mapping[str, Any],
    open_target: Callable[[], SaveTarget],
    request: Callable[[], SaveRequest],
    *,
    ranks: Collectives,
    planner: SavePlanner | None,
    allow_pickle: bool,
) -> Version:
    """Save `state_dict`, of which this rank holds its part, as one version.

    Every rank of `ranks` calls it with its own state, and gets the same `Version`. `open_target`
    and `request` are called inside the first exchange, so that all ranks raise what they raise.
    Without a planner it is ours, which goes with all its records when the save ends.

    Raises:
        InvalidInputError: ranks disagree, or the plan does not tile its tensors.
        UnsafeDataError: an item is neither tensor nor value, and pickle is not allowed.
        ConflictError, AlreadyExistsError, NotFoundError: as the catalog finds the refs.
        RankFailure: some ranks failed; the repository shows nothing of the save.
    """
    planner = planner or DefaultSavePlanner()
    lead = Lead(planner, ranks.size)
    reports = Reports(ranks)
    seconds: Seconds = {}
    local: LocalPlan
    data: RankData

    def begin() -> Opening:
        given = request(), check_keys(state_dict)  # first: for bad ones no repository is made
        lead.target = open_target()
        return Opening(lead.target.catalog.repository.uid, *given)

    def local_plan() -> Offer:
        nonlocal local
        with nesting_checked():
            state = take_state(state_dict, keys, rank=ranks.rank)
            check_state(state)
            planner.set_up_planner(state, is_coordinator=ranks.leads)
        local = LocalPlan(planner.create_local_plan(), planner, lead.target.memory)
        return local.offer()

    def digest() -> tuple[Digested, Seconds]:
        nonlocal data
        with _timed(seconds, "digest"):
            plan, layouts = local.take(answer)
            data = RankData(
                planner.finish_plan(plan),
                planner,
                dict(layouts),
                chunk=lead.target.catalog.repository.chunk,
                allow_pickle=allow_pickle,
            )
            nbytes = total_nbytes(data.chunks)
            bar.begin("digest", nbytes)
            with collector_free(nbytes):
                return data.digest(pool, bar.advance), seconds

    def compare() -> set[str]:
        with _timed(seconds, "compare"), collector_free():
            return find_changed(
                data.held(duty.compare),
                lead.target.catalog,
                lead.target.storage,
                version=duty.version,
                pool=pool,
            )

    def write() -> tuple[Written, Seconds]:
        with _timed(seconds, "write"):
            chunks = [data.chunks[i] for i in duty.write]
            nbytes = total_nbytes(chunks)
            bar.begin("write", nbytes)
            with collector_free(nbytes):
                written = write_chunks(
                    chunks,
                    lead.target.storage,
                    uid=uid,
                    rank=ranks.rank,
                    pool=pool,
                    advance=bar.advance,
                )
        return written, seconds

    try:
        began = time.perf_counter()
        uid, keys = in_step(ranks, "open", begin, lead.begin)
        with (
            kept_lease(lead.target.catalog, uid, progress=reports.heard)
            if ranks.leads
            else contextlib.nullcontext(),
            ThreadPoolExecutor(torch.get_num_threads(), "dcpstore-save") as pool,
            ProgressBar("save", shown=ranks.leads, tell=reports.tell) as bar,
        ):
            bar.begin("plan", 0)
            answer = in_turn(ranks, "plan", local_plan, lead.plan)
            if answer.asks:
                answer = in_turn(ranks, "plan", lambda: local.offer(whole=True), lead.plan)
            seconds["plan"] = time.perf_counter() - began
            duty = in_turn(ranks, "digest", digest, lead.look_up)
            if duty.compare:
                duty = in_turn(ranks, "compare", compare, lead.take_changed)
            return in_step(ranks, "write", write, lead.commit)
    except BaseException as error:
        lead.give_up(error)
        raise


@contextlib.contextmanager
def _timed(seconds: Seconds, phase: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - began
