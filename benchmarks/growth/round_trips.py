"""How many statements a small save, a tag and a load ask of the database."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import dcpstore
from benchmarks.databases import places
from benchmarks.growth.figures import Figure, Run
from benchmarks.long_history import state_of
from dcpstore import Repository

__all__ = ["measure_round_trips"]

DATABASES = ("sqlite", "postgres")
CALLS: dict[str, Callable[[Repository, int], object]] = {
    "save": lambda repo, i: dcpstore.save(state_of(i), repo),
    "tag": lambda repo, i: repo.tag(f"tag-{i}"),
    "load": lambda repo, i: dcpstore.load(state_of(i), repo),
}
TARGETS = {"save": 16, "tag": 6, "load": 6}


def measure_round_trips(run: Run) -> Iterator[Figure]:
    """Each in a repository that is open, after it was done once before."""
    with places(run.folder) as made:
        for database in DATABASES:
            with made.new(database).open(create=True) as repo:
                for name, ask in CALLS.items():
                    ask(repo, 0)
                    with repo.trace() as seen:
                        ask(repo, 1)
                    yield Figure(
                        f"statements of a small {name}",
                        len(seen.statements),
                        "statements",
                        TARGETS[name],
                        database,
                    )
