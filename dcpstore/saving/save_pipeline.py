"""A save from end to end, as all ranks run it together.

After an opening, three exchanges: plans (what each rank holds against what it is to write), digests
(against the chunks that it is to write), results (against the version). One more where there is
much to write, so that the first chunks are on their way to the disk while the others are digested;
or one where the parent is cut otherwise, and only its bytes tell what changed. Packs, then the
manifest, are durable before one transaction makes the version visible (design, invariants 2 to 4).

Every rank publishes its progress; the coordinator collects it for the catalog.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.planner import SavePlanner

from dcpstore.catalog.maintenance.journal import changing_repository
from dcpstore.catalog.write.lease import kept_lease
from dcpstore.collectives import Collectives, alone_in_thread, in_step, in_turn
from dcpstore.core.gc_pause import gc_paused
from dcpstore.core.progress import ProgressBar
from dcpstore.planning.save_planner import planner_of
from dcpstore.records import RankProgress, Version
from dcpstore.saving.commit import SaveTarget
from dcpstore.saving.coordinator import Coordinator, OpenRequest
from dcpstore.saving.pack_writer import ChunkWriter
from dcpstore.saving.rank import RankWork
from dcpstore.saving.request import SaveRequest
from dcpstore.state.stateful import check_keys

__all__ = ["Reports", "save_version"]


class Reports:
    """The reports of the ranks of one save."""

    def __init__(self, ranks: Collectives) -> None:
        self._ranks = ranks
        self._phase = ""
        self._since = ""

    def publish(self, phase: str, nbytes: int, total: int) -> None:
        """Report that this rank has done `nbytes` of `total` in a phase."""
        if phase != self._phase:
            self._phase, self._since = phase, datetime.now(UTC).isoformat()
        self._ranks.publish(json.dumps([phase, nbytes, total, self._since]))

    def progress_by_rank(self) -> list[RankProgress]:
        """Return what each rank reported last."""
        progress_by_rank = []
        for rank, said in self._ranks.progress_by_rank().items():
            phase, nbytes, total, since = json.loads(said)
            progress_by_rank.append(
                RankProgress(rank, phase, nbytes, total, datetime.fromisoformat(since))
            )
        return progress_by_rank


@gc_paused()
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
    coordinator = Coordinator(planner, ranks.size, is_whole=is_whole)
    reports = Reports(ranks)

    def begin() -> OpenRequest:
        given = request(), check_keys(state_dict)  # first: for bad ones no repository is made
        coordinator.target = open_target()
        held.enter_context(changing_repository(coordinator.target.catalog))
        return OpenRequest(coordinator.target.catalog.repository.uid, *given)

    held = contextlib.ExitStack()
    held.enter_context(alone_in_thread(ranks))
    try:
        began = time.perf_counter()
        uid, keys = in_step(ranks, "open", begin, coordinator.begin)
        with (
            kept_lease(coordinator.target.catalog, uid, progress=reports.progress_by_rank)
            if ranks.leads
            else contextlib.nullcontext(),
            ThreadPoolExecutor(torch.get_num_threads(), "dcpstore-save") as pool,
            ChunkWriter(coordinator.target.storage, uid=uid, rank=ranks.rank, pool=pool) as writer,
            ProgressBar("save", shown=ranks.leads, publish=reports.publish) as bar,
        ):
            bar.begin("plan", 0)
            work = RankWork(
                planner,
                coordinator.target,
                pool=pool,
                writer=writer,
                bar=bar,
                allow_pickle=allow_pickle,
                buffers=buffers,
            )
            reply = in_turn(
                ranks, "plan", lambda: work.plan(state_dict, keys, ranks, uid=uid), coordinator.plan
            )
            if reply.asks:
                reply = in_turn(ranks, "plan", work.plan_whole, coordinator.plan)
            work.take(reply, seconds=time.perf_counter() - began)
            if reply.splits:
                work.begin_writing(
                    in_turn(ranks, "digest", work.digest_first, coordinator.choose_first)
                )
            assignment = in_turn(ranks, "digest", work.digest, coordinator.look_up)
            if assignment.compare:
                assignment = in_turn(
                    ranks, "compare", partial(work.compare, assignment), coordinator.take_changed
                )
            return in_step(ranks, "write", partial(work.write, assignment), coordinator.commit)
    except BaseException as error:
        coordinator.give_up(error)
        raise
    finally:
        held.close()
