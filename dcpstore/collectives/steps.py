"""Steps that all ranks take together, with every rank's error.

Invariant: a rank that fails makes every rank raise the same error (design, invariant 8). Each step
carries either a result or an error, so that no rank waits for one that has already given up; what
does not survive the way is such an error too.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from dcpstore.collectives.group import Collectives
from dcpstore.errors import DcpstoreError, InvalidInputError, MismatchError, RankFailure

__all__ = ["in_step", "in_turn"]

Local = TypeVar("Local")
Result = TypeVar("Result")


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
        RankFailure: `local` failed on some ranks, on every rank, with each one's error; or some did
            not come within the deadline. Where all ranks failed alike, that error itself.
    """
    if ranks.size == 1:
        return combine([local()])
    mine, everyone = _gathered(ranks, step, local)
    packed = _packed(_attempt(lambda: combine(everyone()))) if ranks.leads else None
    result: Result = _opened(mine, ranks.broadcast(packed, step=step))
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
    if ranks.size == 1:
        (only,) = combine([local()])
        return only
    mine, everyone = _gathered(ranks, step, local)

    def shares() -> list[bytes]:
        values = combine(everyone())
        if len(values) != ranks.size:  # a planner's doing: it makes the global plan
            raise InvalidInputError(
                f"{step} came to {len(values)} results for {ranks.size} ranks; a planner must "
                "return one plan for each rank, in their order."
            )
        return [_packed(_Outcome(value)) for value in values]

    packed = None
    if ranks.leads:
        outcome = _attempt(shares)
        packed = outcome.value if outcome.error is None else [_packed(outcome)] * ranks.size
    result: Result = _opened(mine, ranks.scatter(packed, step=step))
    return result


def _gathered(
    ranks: Collectives, step: str, local: Callable[[], Local]
) -> tuple[_Outcome, Callable[[], list[Local]]]:
    """Return this rank's outcome, and how the coordinator opens those of all ranks."""
    mine = _attempt(local)
    gathered = ranks.gather(_packed(mine), step=step)

    def everyone() -> list[Local]:
        assert gathered is not None
        outcomes: list[_Outcome] = [pickle.loads(packed) for packed in gathered]
        failures = {rank: o.error for rank, o in enumerate(outcomes) if o.error is not None}
        if failures:
            raise _joined(step, failures, ranks.size)
        return [outcome.value for outcome in outcomes]

    return mine, everyone


def _attempt(call: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(value=call())
    except BaseException as error:  # the other ranks must hear of an interrupt too
        return _Outcome(error=error)


def _packed(outcome: _Outcome) -> bytes:
    """Return an outcome as bytes; one that cannot travel becomes an error that says so."""
    if outcome.error is not None:
        return pickle.dumps(_Outcome(error=_portable(outcome.error)))
    try:
        return pickle.dumps(outcome)
    except Exception as reason:
        error = DcpstoreError(
            f"what this rank tells the others cannot be pickled ({type(reason).__name__}: "
            f"{reason}); keep such objects out of what a planner returns."
        )
        return pickle.dumps(_Outcome(error=error))


def _opened(mine: _Outcome, packed: bytes) -> Any:
    if mine.error is not None and not isinstance(mine.error, Exception):
        raise mine.error  # an interrupt stays one on the rank that was interrupted
    try:
        outcome: _Outcome = pickle.loads(packed)
    except Exception as error:  # whatever the classes that it names raise
        raise DcpstoreError(
            f"the coordinator's answer cannot be read on this rank ({type(error).__name__}: "
            f"{error}); make what a planner returns importable on every rank."
        ) from error
    if outcome.error is None:
        return outcome.value
    if mine.error is not None:
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
