"""What a version adds when all, some or none of its tensors changed, and what a save of many costs.

Bytes are the mean of several versions, because a database grows page by page.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

import dcpstore
from benchmarks.databases import Place, places
from benchmarks.growth.figures import Figure, Run
from benchmarks.states import State, nbytes_of
from benchmarks.stores import DCP_DEFAULT, OURS
from benchmarks.watched import LOAD, SAVE, Watched, watched
from dcpstore import Repository

__all__ = ["measure_many_tensors", "measure_versions_added"]

DATABASES = ("sqlite", "postgres")
_VERSIONS = 4  # saved of each kind
_SMALL = 256  # elements of a tensor whose version is weighed: 1 kB
_LARGER = 1250  # elements of one of the many tensors: 5 kB
_PER_LAYER = 20
KB, MIB = 1000, 1 << 20
# What a version adds at most: to the catalog, and to the data folder without packs.
TARGETS = {
    "none": (4 * KB, 8 * KB),
    "1 %, neighbours": (40 * KB, 60 * KB),
    "all": (1200 * KB, 800 * KB),
}
UNCHANGED_SHARE = 0.25  # of the processor time of a full save
BESIDE_STATE = 256 * MIB
METADATA_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class _Added:
    """What one version added, the mean of several; `seconds` of processor time, the least."""

    catalog: float
    metadata: float
    packs: float
    rows: dict[str, float]
    seconds: float


def measure_versions_added(run: Run) -> Iterator[Figure]:
    """Weigh versions of one state on both databases."""
    with places(run.folder) as made:
        for database in DATABASES:
            run.say(f"{run.size.tensors:,} tensors on {database}")
            yield from _weigh(made.new(database), run.size.tensors, database)


def _weigh(place: Place, tensors: int, database: str) -> Iterator[Figure]:
    state = _state(tensors, _SMALL)
    names = sorted(state)
    changes: dict[str, Callable[[], None]] = {
        "none": lambda: None,
        "1 %, neighbours": lambda: _change(state, names[: max(tensors // 100, 1)]),
        "all": lambda: _change(state, names),
    }
    with place.open(create=True) as repo:
        for _ in range(2):  # what the first saves of a process add
            dcpstore.save(state, repo)
        added = {name: _saved(place, repo, state, change) for name, change in changes.items()}
    for name, one in added.items():
        most = TARGETS[name]
        what = f"changed: {name}: "
        rows = ", ".join(f"{table} {count:,.4g}" for table, count in one.rows.items() if count)
        yield Figure(f"{what}catalog", one.catalog, "bytes", most[0], database)
        yield Figure(f"{what}data without packs", one.metadata, "bytes", most[1], database)
        yield Figure(f"{what}packs", one.packs, "bytes", None, database)
        yield Figure(f"{what}new rows", sum(one.rows.values()), "rows", None, database, rows)
    unchanged, full = added["none"].seconds, added["all"].seconds
    yield Figure(
        "processor time of an unchanged save, of a full one",
        unchanged / full,
        "share",
        UNCHANGED_SHARE,
        database,
        f"{1000 * unchanged:.0f} of {1000 * full:.0f} ms",
    )


def _saved(place: Place, repo: Repository, state: State, change: Callable[[], None]) -> _Added:
    """Change and save a few times; return what one version added."""
    before = place.catalog_nbytes(), place.data_nbytes(), place.rows()
    took = []
    for _ in range(_VERSIONS):
        change()
        began = time.process_time()
        dcpstore.save(state, repo)
        took.append(time.process_time() - began)
    after = place.catalog_nbytes(), place.data_nbytes(), place.rows()
    packs, metadata = (
        (new - old) / _VERSIONS for old, new in zip(before[1], after[1], strict=True)
    )
    return _Added(
        catalog=(after[0] - before[0]) / _VERSIONS,
        metadata=metadata,
        packs=packs,
        rows={name: (count - before[2][name]) / _VERSIONS for name, count in after[2].items()},
        seconds=min(took),
    )


def measure_many_tensors(run: Run) -> Iterator[Figure]:
    """Save and load very many small tensors beside torch's DCP, each in a process of its own."""
    make = partial(_state, run.size.many_tensors, _LARGER)
    took: dict[tuple[str, str], list[Watched]] = {}
    with ExitStack() as stack:
        asks = {}
        for name in (DCP_DEFAULT, OURS):
            place = run.folder / name.replace(", ", "-")
            asks[name] = stack.enter_context(watched(name, make, place))
        for number in range(run.size.rounds):
            for name in sorted(asks, reverse=bool(number % 2)):
                for way in (SAVE, LOAD):
                    took.setdefault((name, way), []).append(asks[name](way))
            run.say(f"{run.size.many_tensors:,} tensors, round {number + 1} of {run.size.rounds}")
        own = run.folder / OURS / str(run.size.rounds)
        share = _metadata_nbytes(own) / nbytes_of(make())
    for way in (SAVE, LOAD):
        ours, theirs = (
            median(one.seconds for one in took[name, way]) for name in (OURS, DCP_DEFAULT)
        )
        note = f"{ours:.2f} of {theirs:.2f} s"
        yield Figure(f"{way}, in DCP's time", ours / theirs, "times", 1.0, "sqlite", note)
        peak = max(one.peak for one in took[OURS, way])
        theirs_at_peak = max(one.peak for one in took[DCP_DEFAULT, way])
        yield Figure(
            f"memory beside the state, {way}",
            peak,
            "bytes",
            BESIDE_STATE,
            "sqlite",
            f"DCP {theirs_at_peak / MIB:.0f} MiB",
        )
    yield Figure("catalog and metadata, of the data", share, "share", METADATA_SHARE, "sqlite")


def _metadata_nbytes(folder: Path) -> int:
    place = Place(str(folder), folder)
    return place.catalog_nbytes() + place.data_nbytes()[1]


def _state(tensors: int, elements: int) -> State:
    """Return very many small tensors, named as those of a model's layers."""
    dice = torch.Generator().manual_seed(5)
    return {
        f"model.layers.{i // _PER_LAYER}.weight_{i % _PER_LAYER}": torch.randn(
            elements, generator=dice
        )
        for i in range(tensors)
    }


def _change(state: State, names: list[str]) -> None:
    for name in names:
        state[name].add_(1.0)
