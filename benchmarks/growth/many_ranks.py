"""What the coordinator of very many ranks does, simulated in one process on SQLite.

The ranks' messages are made before; nothing is digested and no pack is written. So these are the
coordinator's own seconds: reading what the ranks sent, planning, the catalog and the manifest.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks.databases import Place, places
from benchmarks.growth.figures import Figure, Run
from benchmarks.simulated import Saved, SimulatedRanks, plan_alone
from dcpstore.saving.commit import SaveTarget

__all__ = ["measure_ranks"]

DATABASES = ("sqlite", "postgres")
COMMIT_ALL, COMMIT_NONE = 15.0, 1.0  # seconds
PER_CHUNK = 60  # bytes of the catalog, and of the data folder without packs


def measure_ranks(run: Run) -> Iterator[Figure]:
    """Save from very many ranks, all changed and then nothing, and plan for many more."""
    with places(run.folder) as made:
        for database in DATABASES:
            yield from _save(run, made.new(database), database)
    ranks, tensors = run.size.planned
    run.say(f"planning {ranks:,} ranks x {tensors:,} tensors")
    # In a process of its own, whose memory has no other peak.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
        planned = alone.submit(plan_alone, ranks, tensors).result()
    what = f"planning {ranks:,} ranks x {tensors:,} tensors: "
    yield Figure(f"{what}seconds", planned.seconds, "s")
    yield Figure(f"{what}memory", planned.memory, "bytes", note="growth of the peak")
    yield Figure(f"{what}received", planned.received, "bytes", note="of all ranks together")
    yield Figure(f"{what}sent", planned.sent, "bytes", note="to all ranks together")


def _save(run: Run, place: Place, database: str) -> Iterator[Figure]:
    ranks, tensors = run.size.ranks
    run.say(f"{ranks:,} ranks x {tensors:,} tensors on {database}")
    what = f"{ranks:,} ranks x {tensors:,} tensors: "
    with place.open(create=True) as repo:
        before = place.catalog_nbytes(), place.data_nbytes()[1]
        target = SaveTarget(repo.catalog, repo.storage, repo.memory, repo.location)
        simulated = SimulatedRanks(ranks, tensors, target)
        first = simulated.save()
        after = place.catalog_nbytes(), place.data_nbytes()[1]
        again = simulated.save(changed=0.0)
    grown = [new - old for old, new in zip(before, after, strict=True)]
    for name, nbytes in zip(("catalog", "data without packs"), grown, strict=True):
        note = f"{nbytes / 1e6:.1f} MB for {first.chunks:,} chunks"
        per_chunk = nbytes / first.chunks
        yield Figure(f"{what}{name} a chunk", per_chunk, "bytes", PER_CHUNK, database, note)
    for name, saved, most in (("all", first, COMMIT_ALL), ("nothing", again, COMMIT_NONE)):
        yield Figure(
            f"{what}commit of {name} new",
            saved.seconds["write"],
            "s",
            most,
            database,
            _note(saved),
        )


def _note(saved: Saved) -> str:
    took = ", ".join(f"{step} {seconds:.2f}" for step, seconds in saved.seconds.items())
    received = sum(saved.received.values()) / 1e6
    sent = sum(saved.sent.values()) / 1e6
    return f"seconds: {took}; {received:.1f} MB received, {sent:.1f} MB sent"
