"""The coordinator of a whole save, for many ranks that one process simulates.

What is measured is the coordinator's work alone: it unpickles what the ranks send, and pickles what
each of them gets. Nothing is digested and no pack is written; the ranks only say that it was.
"""

from __future__ import annotations

import pickle
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.plans import local_plan
from dcpstore import ChunkDefaults, DefaultSavePlanner
from dcpstore.core.gc_pause import gc_paused
from dcpstore.planning.plan_table import PlanTable
from dcpstore.records import ChunkPlace, PackRecord
from dcpstore.saving.chunk_writer import Written
from dcpstore.saving.commit import SaveTarget
from dcpstore.saving.coordinator import (
    Coordinator,
    OpenRequest,
    RankDigests,
    RankResult,
    WriteAssignment,
)
from dcpstore.saving.digest_exchange import CHUNK_DIGEST, to_send
from dcpstore.saving.plan_exchange import PlanMemory, PlanOffer, PlanReply, reply_to_offers
from dcpstore.saving.rank_chunks import Digested
from dcpstore.saving.request import make_request

__all__ = ["Planned", "Saved", "SimulatedRanks", "plan_alone"]

_LENGTH = 4096  # bytes that each chunk is said to have in its pack


@dataclass(frozen=True, slots=True)
class Saved:
    """What one simulated save took, by exchange: seconds, and the bytes of all ranks together.

    `chunks` is how many of them the ranks had to write.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    received: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    chunks: int = 0


class SimulatedRanks:
    """So many ranks, each with its rows of so many tensors, that save to `target` together."""

    def __init__(self, ranks: int, tensors: int, target: SaveTarget) -> None:
        self._target = target
        self._planner = DefaultSavePlanner()
        self._offers = [_offer(rank, ranks, tensors) for rank in range(ranks)]
        self._digests: list[npt.NDArray[np.uint8]] = []  # by rank, [chunks, CHUNK_DIGEST]
        self._sent: list[bytes] = []  # by rank, the digests of the last version
        self._random = np.random.default_rng(0)

    def save(self, changed: float = 1.0) -> Saved:
        """Save once; of each rank's chunks the share `changed` differs from the last save."""
        with gc_paused():  # as all of a save is
            return self._save(changed)

    def _save(self, changed: float) -> Saved:
        done = Saved()
        coordinator = Coordinator(self._planner, len(self._offers), is_whole=True)
        coordinator.target = self._target
        request = OpenRequest(self._target.catalog.repository.uid, make_request(), ("model",))
        try:
            uid, _ = _exchange(
                done, "open", [request] * len(self._offers), lambda sent: [coordinator.begin(sent)]
            )[0]
            replies = _exchange(done, "plan", self._offers, coordinator.plan)
            reports = self._reports(replies, changed)
            writes = _exchange(done, "digest", reports, coordinator.look_up)
            results = [_result(uid, rank, write) for rank, write in enumerate(writes)]
            _exchange(done, "write", results, lambda sent: [coordinator.commit(sent)])
        except BaseException as error:
            coordinator.abort(error)
            raise
        self._sent = [digests.tobytes() for digests in self._digests]
        self._offers = [
            replace(offer, table=None, held=reply.key, base=uid)
            for offer, reply in zip(self._offers, replies, strict=True)
        ]
        return replace(done, chunks=sum(len(write.write) for write in writes))

    def _reports(self, replies: Sequence[PlanReply], changed: float) -> list[RankDigests]:
        """Change digests, and return what each rank sends of them."""
        if not self._digests:
            self._digests = [
                np.zeros((_chunks(reply, len(replies)), CHUNK_DIGEST), np.uint8)
                for reply in replies
            ]
        reports = []
        for rank, (digests, reply) in enumerate(zip(self._digests, replies, strict=True)):
            new = digests[: round(len(digests) * changed)]
            new[...] = self._random.integers(0, 256, new.shape, np.uint8)
            now, width = digests.tobytes(), CHUNK_DIGEST
            chunks = (
                to_send(now, self._sent[rank], base=reply.base, width=width) if reply.base else now
            )
            reports.append(RankDigests(chunks, Digested(b""), {}, b""))
        return reports


@dataclass(frozen=True, slots=True)
class Planned:
    """What planning one save took: seconds, bytes of all ranks together, and bytes of memory.

    `memory` is by how much the peak of the process grew.
    """

    seconds: float
    received: int
    sent: int
    memory: int


def plan_alone(ranks: int, tensors: int) -> Planned:
    """Plan the first save of so many ranks and tensors, and its shard index; store nothing."""
    offers = [pickle.dumps(_offer(rank, ranks, tensors)) for rank in range(ranks)]
    before = _peak()
    with gc_paused():
        began = perf_counter()
        plan, replies = reply_to_offers(
            [pickle.loads(offer) for offer in offers],
            PlanMemory(),
            chunk=ChunkDefaults(),
            parent={},
            to_lowest_rank=False,
        )
        assert plan is not None, "every rank has sent its table"
        assert plan.table.record.ranks == ranks
        sent = sum(len(pickle.dumps(reply)) for reply in replies)
        seconds = perf_counter() - began
    return Planned(seconds, sum(map(len, offers)), sent, _peak() - before)


def _exchange(
    done: Saved, step: str, messages: Sequence[Any], combine: Callable[[list[Any]], Sequence[Any]]
) -> list[Any]:
    """Return the answers of the coordinator, which are as many as the messages, or one for all."""
    packed = [pickle.dumps(message) for message in messages]
    began = perf_counter()
    answers = [pickle.dumps(answer) for answer in combine([pickle.loads(one) for one in packed])]
    done.seconds[step] = perf_counter() - began
    done.received[step] = sum(map(len, packed))
    done.sent[step] = sum(map(len, answers)) * (len(packed) // len(answers))
    return [pickle.loads(answer) for answer in answers]


def _offer(rank: int, ranks: int, tensors: int) -> PlanOffer:
    table = PlanTable.of(local_plan(rank, ranks, tensors))
    return PlanOffer(table.digest, table=table)


def _chunks(reply: PlanReply, ranks: int) -> int:
    """Return how many chunks a rank has: every rank has as many of each tensor."""
    assert reply.layouts is not None, "the first save gives each rank its layouts"
    layouts = pickle.loads(reply.layouts)
    return sum(grid.size // ranks for layout in layouts.values() for grid in layout.grids)


def _result(uid: str, rank: int, write: WriteAssignment) -> RankResult:
    """Return what a rank says once it has written its chunks, one after another, to one pack."""
    key, count = f"packs/{uid}/{rank}-0.pack", len(write.write)
    places = [ChunkPlace(key, i * _LENGTH, _LENGTH) for i in range(count)]
    packs = [PackRecord(key, count * _LENGTH)] if count else []
    return RankResult(Written(places, packs, count * _LENGTH), {})


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
