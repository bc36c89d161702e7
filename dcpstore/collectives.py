"""Steps that all ranks take together, with every rank's error.

Invariant: a rank that fails makes every rank raise the same error (design, invariant 8). Each step
carries either a result or an error, so that no rank waits for one that has already given up.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from dcpstore.errors import DcpstoreError, MismatchError, RankFailure

__all__ = ["Alone", "Collectives", "RankGroup", "find_collectives", "in_step", "in_turn"]

_log = logging.getLogger(__name__)

Local = TypeVar("Local")
Result = TypeVar("Result")


class Collectives(Protocol):
    """Who takes part, and the three ways in which objects travel."""

    @property
    def rank(self) -> int:
        """This process among `size`, from 0."""

    @property
    def size(self) -> int:
        """The number of processes that take part."""

    @property
    def leads(self) -> bool:
        """Whether this process is the coordinator."""

    def gather(self, value: Any) -> list[Any] | None:
        """Return every rank's value, by rank, on the coordinator, and None elsewhere."""

    def scatter(self, values: Sequence[Any] | None) -> Any:
        """Return this rank's one of the values that the coordinator gives."""

    def broadcast(self, value: Any) -> Any:
        """Return the coordinator's value."""


@dataclass(frozen=True, slots=True)
class Alone:
    """One process that asks nobody."""

    rank: int = 0
    size: int = 1
    leads: bool = True

    def gather(self, value: Any) -> list[Any]:
        """Return the one value."""
        return [value]

    def scatter(self, values: Sequence[Any] | None) -> Any:
        """Return the one value."""
        assert values is not None
        return values[0]

    def broadcast(self, value: Any) -> Any:
        """Return the value."""
        return value


class RankGroup:
    """The ranks of a torch process group; the coordinator is counted inside the group."""

    def __init__(self, group: dist.ProcessGroup | None = None, *, coordinator: int = 0) -> None:
        self._group = group
        self._coordinator = coordinator
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    @property
    def leads(self) -> bool:
        """Whether this process is the coordinator."""
        return self.rank == self._coordinator

    def gather(self, value: Any) -> list[Any] | None:
        """Return every rank's value, by rank, on the coordinator, and None elsewhere."""
        values: list[Any] | None = [None] * self.size if self.leads else None
        dist.gather_object(value, values, group=self._group, group_dst=self._coordinator)
        return values

    def scatter(self, values: Sequence[Any] | None) -> Any:
        """Return this rank's one of the values that the coordinator gives."""
        mine: list[Any] = [None]
        given = None if values is None else list(values)
        dist.scatter_object_list(mine, given, group=self._group, group_src=self._coordinator)
        return mine[0]

    def broadcast(self, value: Any) -> Any:
        """Return the coordinator's value."""
        box = [value]
        dist.broadcast_object_list(box, group=self._group, group_src=self._coordinator)
        return box[0]


def find_collectives(group: dist.ProcessGroup | None, *, no_dist: bool) -> Collectives:
    """Return the ranks of `group` (None: all), or this process alone where torch runs no group."""
    if no_dist:
        return Alone()
    if not dist.is_available() or not dist.is_initialized():
        _log.info("no process group is initialised; working in this process alone")
        return Alone()
    return RankGroup(group)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What one side of a step came to: a value, or the error that it raised."""

    value: Any = None
    error: BaseException | None = None


def in_step(
    ranks: Collectives,
    step: str,
    local: Callable[[], Local],
    combine: Callable[[list[Local]], Result],
) -> Result:
    """Run `local` on every rank and `combine` on the coordinator; return its result on every rank.

    Raises:
        RankFailure: `local` failed on some ranks, on every rank, with each one's error. Where all
            ranks failed alike, that error itself.
    """
    mine, everyone = _gathered(ranks, step, local)
    outcome = _attempt(ranks, lambda: combine(everyone())) if ranks.leads else None
    result: Result = _opened(ranks, mine, ranks.broadcast(outcome))
    return result


def in_turn(
    ranks: Collectives,
    step: str,
    local: Callable[[], Local],
    combine: Callable[[list[Local]], Sequence[Result]],
) -> Result:
    """Run `local` on every rank and `combine` on the coordinator; each rank gets its own result.

    Raises:
        RankFailure: as `in_step`.
    """
    mine, everyone = _gathered(ranks, step, local)
    outcomes = None
    if ranks.leads:
        outcome = _attempt(ranks, lambda: combine(everyone()))
        if outcome.error is None:
            assert len(outcome.value) == ranks.size
            outcomes = [_Outcome(value) for value in outcome.value]
        else:
            outcomes = [outcome] * ranks.size
    result: Result = _opened(ranks, mine, ranks.scatter(outcomes))
    return result


def _gathered(
    ranks: Collectives, step: str, local: Callable[[], Local]
) -> tuple[_Outcome, Callable[[], list[Local]]]:
    """Return this rank's outcome, and how the coordinator opens those of all ranks."""
    mine = _attempt(ranks, local)
    outcomes = ranks.gather(mine)

    def everyone() -> list[Local]:
        assert outcomes is not None
        failures = {rank: o.error for rank, o in enumerate(outcomes) if o.error is not None}
        if failures:
            raise _joined(step, failures, ranks.size)
        return [outcome.value for outcome in outcomes]

    return mine, everyone


def _attempt(ranks: Collectives, call: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(value=call())
    except BaseException as error:  # the other ranks must hear of an interrupt too
        return _Outcome(error=error if ranks.size == 1 else _portable(error))


def _opened(ranks: Collectives, mine: _Outcome, outcome: _Outcome) -> Any:
    if mine.error is not None and not isinstance(mine.error, Exception):
        raise mine.error  # an interrupt stays one on the rank that was interrupted
    if outcome.error is None:
        return outcome.value
    if mine.error is not None and ranks.size > 1:
        raise outcome.error from mine.error
    raise outcome.error


def _joined(step: str, failures: Mapping[int, BaseException], size: int) -> BaseException:
    """Return the one error that all ranks raise."""
    first = next(iter(failures.values()))
    alike = {(type(error), str(error)) for error in failures.values()}
    if len(failures) == size and len(alike) == 1:
        return first
    mismatches = [error for error in failures.values() if isinstance(error, MismatchError)]
    if len(mismatches) == len(failures):  # one report of what does not fit, whichever rank saw it
        return MismatchError.listing(line for error in mismatches for line in error.differences)
    return RankFailure(step, failures)


def _portable(error: BaseException) -> BaseException:
    """Return `error` if it survives pickling, else one of ours with its text."""
    try:
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except Exception as reason:
        text = f"{type(error).__name__}: {error} (not sent whole: {reason})"
        return DcpstoreError(text).with_traceback(error.__traceback__)
    return DcpstoreError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
