"""A save from end to end, as all ranks run it together.

After an opening, three exchanges: plans (what each rank holds against what it is to write), digests
(against the chunks that it is to write), results (against the version). One more where there is
much to write, so that the first chunks are on their way to the disk while the others are digested;
or one where the parent is cut otherwise, and only its bytes tell what changed. Packs, then the
manifest, are durable before one transaction makes the version visible (design, invariants 2 to 4).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.planner import SavePlanner

from dcpstore.collectives import Collectives, alone_in_thread, in_step, in_turn
from dcpstore.collector import collector_held
from dcpstore.journal import changing_repository
from dcpstore.leases import kept_lease
from dcpstore.planning.save_planner import planner_of
from dcpstore.planning.stateful import check_keys
from dcpstore.progress import ProgressBar
from dcpstore.records import Version
from dcpstore.saving.lead import Lead, Opening
from dcpstore.saving.publishing import SaveRequest, SaveTarget
from dcpstore.saving.rank_work import RankWork
from dcpstore.saving.reporting import Reports
from dcpstore.saving.writing import ChunkWriter

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
    buffers: Collection[str] = (),
    is_whole: bool = True,
) -> Version:
    """Save `state_dict`, of which this rank holds its part, as one version.

    Every rank of `ranks` calls it with its own state, and gets the same `Version`. `open_target`
    and `request` are called inside the first exchange, so that all ranks raise what they raise.
    Without a planner it is ours, which goes with all its records when the save ends. `buffers` are
    the FQNs of module buffers in a state that was staged, and so has no modules any more. Without
    `is_whole` this rank saves for itself, and what it holds need not be whole tensors.

    Raises:
        InvalidInputError: ranks disagree, or hold different contents of what they hold alike, or
            the plan does not tile its tensors.
        UnsafeDataError: an item is neither tensor nor value, and pickle is not allowed.
        ConflictError, AlreadyExistsError, NotFoundError: as the catalog finds the refs.
        ConflictError: this thread is saving to the repository already, further up its stack.
        RankFailure: some ranks failed; the repository shows nothing of the save.
    """
    planner = planner_of(planner, is_whole=is_whole)
    lead = Lead(planner, ranks.size, is_whole=is_whole)
    reports = Reports(ranks)

    def begin() -> Opening:
        given = request(), check_keys(state_dict)  # first: for bad ones no repository is made
        lead.target = open_target()
        held.enter_context(changing_repository(lead.target.catalog))
        return Opening(lead.target.catalog.repository.uid, *given)

    held = contextlib.ExitStack()
    held.enter_context(alone_in_thread(ranks))
    try:
        began = time.perf_counter()
        uid, keys = in_step(ranks, "open", begin, lead.begin)
        with (
            kept_lease(lead.target.catalog, uid, progress=reports.heard)
            if ranks.leads
            else contextlib.nullcontext(),
            ThreadPoolExecutor(torch.get_num_threads(), "dcpstore-save") as pool,
            ChunkWriter(lead.target.storage, uid=uid, rank=ranks.rank, pool=pool) as writer,
            ProgressBar("save", shown=ranks.leads, tell=reports.tell) as bar,
        ):
            bar.begin("plan", 0)
            work = RankWork(
                planner,
                lead.target,
                pool=pool,
                writer=writer,
                bar=bar,
                allow_pickle=allow_pickle,
                buffers=buffers,
            )
            answer = in_turn(
                ranks, "plan", lambda: work.plan(state_dict, keys, ranks, uid=uid), lead.plan
            )
            if answer.asks:
                answer = in_turn(ranks, "plan", work.plan_whole, lead.plan)
            work.take(answer, seconds=time.perf_counter() - began)
            if answer.splits:
                work.begin_writing(in_turn(ranks, "digest", work.digest_first, lead.choose_first))
            duty = in_turn(ranks, "digest", work.digest, lead.look_up)
            if duty.compare:
                duty = in_turn(ranks, "compare", partial(work.compare, duty), lead.take_changed)
            return in_step(ranks, "write", partial(work.write, duty), lead.commit)
    except BaseException as error:
        lead.give_up(error)
        raise
    finally:
        held.close()
