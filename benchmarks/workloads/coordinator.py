"""(h) What the coordinator plans of a save, simulated in one process, against torch's planning."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan

from benchmarks.planning import Ours
from benchmarks.plans import gathered_plans
from benchmarks.table import Row
from benchmarks.timing import in_turns, seconds
from benchmarks.workloads.bench import Bench

__all__ = ["measure_planning"]

PART = 4
TARGETS = {(256, 1000): (10.0, 100.0)}  # first and repeated, against torch's first


def measure_planning(bench: Bench) -> list[Row]:
    """(h) Planning alone, first and repeated, at growing numbers of ranks.

    Where torch takes minutes, it plans a part of the tensors, once; its time grows with their
    number alone, and is multiplied.
    """
    scale = bench.scale
    rows = []
    for ranks, tensors in scale.planned:
        rows += _measure(bench, ranks, tensors, rounds=bench.rounds, part=1)
    for ranks, tensors in scale.planned_in_part:
        rows += _measure(bench, ranks, tensors, rounds=1, part=PART)
    return rows


def _measure(bench: Bench, ranks: int, tensors: int, *, rounds: int, part: int) -> list[Row]:
    bench.say(f"{ranks:,} ranks x {tensors:,} tensors")
    gathered, ours = gathered_plans(ranks, tensors // part), Ours(ranks, tensors)

    def by_torch(number: int) -> Mapping[str, float]:
        return {"first": part * seconds(lambda: plan_by_torch(gathered))}

    def by_us(number: int) -> Mapping[str, float]:
        return ours.measure()

    measured = in_turns({"torch": by_torch, "ours": by_us}, rounds=rounds, say=bench.say)
    peer = "torch's planning, first"
    if part > 1:
        peer += f": {part} x that of {tensors // part:,} tensors"
    targets = TARGETS.get((ranks, tensors), (None, None))
    return [
        Row(
            "h",
            f"planning {ranks:,} ranks x {tensors:,} tensors, {way}",
            peer,
            measured["torch"]["first"],
            measured["ours"][way],
            target=target,
        )
        for way, target in zip(("first", "repeated"), targets, strict=True)
    ]


def plan_by_torch(gathered: list[bytes]) -> int:
    """Do what torch's coordinator does between the gathering and the scattering of plans.

    It unpickles the local plans, makes the global plan (replicas removed, described, validated),
    pickles a plan for each rank and, for its file, the description. Returns the bytes it sends.
    """
    plans: list[SavePlan] = [pickle.loads(data) for data in gathered]
    told, described = DefaultSavePlanner().create_global_plan(plans)
    file = io.BytesIO()
    pickle.dump(described, file)
    return sum(len(pickle.dumps(plan)) for plan in told) + file.tell()
