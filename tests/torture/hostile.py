"""Hostile input: every attack on a repository or an import, and every input that is kept."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random

from tests.hostile.guided import search
from tests.hostile.listing import ATTACKS
from tests.hostile.parsers import PARSERS
from tests.torture.kinds import Ground, Kind, Outcome, Verdict

__all__ = ["kinds"]

_SEARCHES, _RUNS = 20, 2_000  # of each parser, in the long form


def kinds(ground: Ground) -> Iterable[Kind]:
    """Return the kinds of this module."""
    yield _Attacks(ground)
    yield _Inputs(ground)
    if ground.long:
        yield _Searches(ground)


@dataclass(frozen=True)
class _Attacks:
    """Attacks by name; each asserts for itself that it came to nothing."""

    ground: Ground
    name: str = "hostile input: attacks"

    def points(self) -> Iterable[str]:
        """Return the names."""
        return self.ground.pick(list(ATTACKS), 3)  # the tests try them all

    def try_point(self, point: str) -> Outcome:
        """Attack."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of torch, without a process group
            try:
                ATTACKS[point](self.ground.folder())
            except BaseException as error:  # pytest's own failures are no Exceptions
                if isinstance(error, KeyboardInterrupt):
                    raise
                return Outcome(Verdict.LOST, f"{type(error).__name__}: {error}")
        return Outcome(Verdict.SURVIVED)


@dataclass(frozen=True)
class _Inputs:
    """The kept inputs of every parser, each taken or refused with an error of ours."""

    ground: Ground
    name: str = "hostile input: kept inputs"

    def points(self) -> Iterator[tuple[str, str]]:
        """Return the parsers and the names of their inputs."""
        yield from ((one.name, name) for one in PARSERS.values() for name in one.corpus())

    def try_point(self, point: tuple[str, str]) -> Outcome:
        """Parse."""
        parser = PARSERS[point[0]]
        parser.try_on(parser.corpus()[point[1]], self.ground.folder())
        return Outcome(Verdict.SURVIVED)


@dataclass(frozen=True)
class _Searches:
    """Searches by coverage, from a seed that the report names."""

    ground: Ground
    name: str = "hostile input: guided searches"

    def points(self) -> Iterator[tuple[str, int]]:
        """Return the parsers and seeds, new ones each time."""
        seeds = Random().sample(range(10**9), _SEARCHES)
        yield from ((name, seed) for name in PARSERS for seed in seeds)

    def try_point(self, point: tuple[str, int]) -> Outcome:
        """Search."""
        name, seed = point
        found = search(PARSERS[name], self.ground.folder(), runs=_RUNS, seed=seed)
        if not found.broken:
            return Outcome(Verdict.SURVIVED)
        data, error = found.broken[0]
        return Outcome(Verdict.LOST, f"{data[:300]!r} leads to {error!r:.300}")
