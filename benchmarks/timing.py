"""Seconds, measured alternately.

Invariant: within each round every contender runs once, each round beginning with another one, so
that other people's load and a drifting disk hit all alike.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["Contender", "Measured", "Samples", "in_turns", "seconds"]

# Runs one round, given its number from 0; returns what it measured, by name.
Contender = Callable[[int], Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Samples:
    """What the rounds measured of one thing."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    @property
    def least(self) -> float:
        """The smallest value."""
        return min(self.values)

    @property
    def most(self) -> float:
        """The largest value."""
        return max(self.values)


Measured = dict[str, dict[str, Samples]]  # by contender, then by what was measured


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes; garbage of what ran before is not its concern."""
    gc.collect()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def in_turns(
    contenders: Mapping[str, Contender], *, rounds: int, say: Callable[[str], None]
) -> Measured:
    """Run every contender once a round, and return what each measured over the rounds."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            for what, value in contenders[name](number).items():
                found[name].setdefault(what, []).append(value)
        say(f"round {number + 1} of {rounds}")
    return {
        name: {what: Samples(tuple(values)) for what, values in measured.items()}
        for name, measured in found.items()
    }
