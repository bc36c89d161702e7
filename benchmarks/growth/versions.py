"""What a repository with very many versions answers, beside one with few.

Processor time is that of this process and of the Postgres server together. Both repositories are
asked in turn, and the least of several rounds counts: the work is the same each time, so that
whatever takes longer is other people's.

Everything is asked once before it is measured: a first `gc` or `verify` has all versions to look
at.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

import dcpstore
from benchmarks.databases import Place, Places, places
from benchmarks.growth.figures import Figure, Run, Size
from benchmarks.long_history import ENTRIES, METRIC, STEPS, lengthen, state_of
from dcpstore import NotFoundError, Repository, Retention

__all__ = ["measure_long_histories"]

DATABASES = ("sqlite", "postgres")
MOST = 1.5
# Rules that keep every version but those at an odd step.
RULES: dict[str, Any] = {
    "keep_last": 20,
    "keep_every": STEPS,
    "keep_best": (METRIC, 3),
    "keep_since": "7d",
}
_REPEATS = 40  # of what is measured together, at most
_LONG = 2.0  # what takes longer is measured once
_SHOWN = 20  # versions that a log asks for


@dataclass(frozen=True, slots=True)
class _Costs:
    """What one question costs: seconds of processor time, and statements where they are seen."""

    seconds: float
    statements: int | None


def measure_long_histories(run: Run) -> Iterator[Figure]:
    """Ask the same of a repository with few versions and of one with many, on both databases."""
    few, many = run.size.versions
    for database in DATABASES:
        with places(run.folder) as made, ExitStack() as stack:
            asked = []
            for count in (few, many):
                place = made.new(database)
                repo = stack.enter_context(place.open(create=True))
                run.say(f"filling {count:,} versions on {database}")
                lengthen(repo, count)
                stack.enter_context(repo.catalog.keep_connection())
                asked.append((repo, _questions(place, repo, count)))
            for name in asked[0][1]:
                first, last = _compare(made, [(repo, ask[name]) for repo, ask in asked], run.size)
                yield Figure(
                    f"{name}, {few:,} -> {many:,} versions",
                    last.seconds / first.seconds,
                    "times",
                    MOST,
                    database,
                    _note(first, last),
                )


def _questions(place: Place, repo: Repository, versions: int) -> dict[str, Callable[[], object]]:
    """Return what is asked of a repository with so many versions, by name."""
    numbers = itertools.count(versions)
    tags = itertools.count()
    state = {fqn: torch.zeros_like(tensor) for fqn, tensor in state_of(0).items()}
    tip = repo.show()
    repo.branch("back", at=tip)
    start = repo.show(1).created_at

    def save(retention: Retention | None = None) -> None:
        number = next(numbers)
        dcpstore.save(
            state_of(number),
            repo,
            step=STEPS * (number + 1),
            metrics={METRIC: 1 / (number + 1)},
            retention=retention,
        )

    def fail(ref: str) -> None:
        with suppress(NotFoundError):
            repo.show(ref)
            raise AssertionError(f"{ref!r} names a version")

    def log(ref: str | None = None, **wanted: Any) -> Callable[[], object]:
        return lambda: repo.log(ref, limit=_SHOWN, **wanted)

    least = {"where": f"{METRIC}<{1 / (versions - 5)}"}
    logs: dict[str, Mapping[str, Any]] = {
        "": {},
        " --where, all match": {"where": f"{METRIC}<2"},
        " --where, the newest match": least,
        " --where, the oldest match": {"where": f"{METRIC}>{1 / 10}"},
        " --steps, the oldest": {"steps": (STEPS, 5 * STEPS)},
        " --since, the newest": {"since": tip.created_at - timedelta(hours=1)},
        " --until, the oldest": {"until": start + timedelta(hours=1)},
        " --label, a tenth matches": {"labels": {"run": "run-3"}},
        " --label, none matches": {"labels": {"run": "absent"}},
        " --tag, a pattern": {"tag": "tag-1*"},
        " --branch": {"branch": "main"},
    }
    return {
        "open": lambda: place.open().close(),
        "load": lambda: dcpstore.load(state, repo, ref=tip.number),
        "diff": lambda: repo.diff(tip.number - 1, tip.number),
        **{f"log{name}": log(**wanted) for name, wanted in logs.items()},
        **{f"log main{name}": log("main", **wanted) for name, wanted in logs.items() if name},
        "best": lambda: repo.best(METRIC),
        "main~far": lambda: repo.show(f"main~{versions - ENTRIES}"),
        "main@step": lambda: repo.show(f"main@step={STEPS}"),
        "misspelt ref": lambda: fail("mian"),
        "absent step": lambda: fail("main@step=7"),
        "expire --dry-run": lambda: repo.expire(**RULES, dry_run=True),
        "gc, nothing to do": repo.gc,
        "quick verify, nothing new": repo.verify,
        "save": save,
        "save(retention=)": lambda: save(Retention(**RULES)),
        "tag": lambda: repo.tag(f"new-{next(tags)}", tip),
        "rollback": lambda: repo.rollback("back~1", branch="back"),
    }


def _compare(
    made: Places, asked: list[tuple[Repository, Callable[[], object]]], size: Size
) -> list[_Costs]:
    """Return what a question costs each of the repositories."""
    statements, first = [], []
    for repo, ask in asked:
        ask()
        with repo.trace() as seen:
            first.append(_seconds(made, ask, 1))
        statements.append(len(seen.statements) or None)
    if max(first) > _LONG:
        least = first
    else:
        repeats = max(1, min(_REPEATS, round(size.together / max(first[0], 0.001))))
        least = [float("inf")] * len(asked)
        for _ in range(size.rounds):
            for i, (_, ask) in enumerate(asked):
                least[i] = min(least[i], _seconds(made, ask, repeats))
    return [_Costs(*costs) for costs in zip(least, statements, strict=True)]


def _seconds(made: Places, ask: Callable[[], object], repeats: int) -> float:
    """Return the processor time of one call, the mean of a few."""
    began = made.processor_seconds()
    for _ in range(repeats):
        ask()
    return (made.processor_seconds() - began) / repeats


def _note(few: _Costs, many: _Costs) -> str:
    took = " -> ".join(f"{1000 * costs.seconds:.3g}" for costs in (few, many))
    if few.statements is None:
        return f"{took} ms"
    return f"{took} ms, {few.statements} -> {many.statements} statements"
