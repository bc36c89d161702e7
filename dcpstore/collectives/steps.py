"""Steps that all ranks take together, with every rank's error.

Invariant: a rank that fails makes every rank raise the same error (design, invariant 8). Each
message carries either a result or an error, so that no rank waits for one that has already stopped.
A result that cannot be pickled or unpickled is replaced by an error that says so.
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
    """What one side of a step produced: a value, or the error that it raised."""

    value: Any = None
    error: BaseException | None = None


def in_step(
    ranks: Collectives,
    step: str,
    local: Callable[[], Local],
    combine: Callable[[list[Local]], Result],
) -> Result:
    """Run `local` on every rank and `combine` on the coordinator; return its result on every rank.

    `combine` gets the results of `local`, by rank.

    Raises:
        RankFailure: `local` failed on some ranks (raised on every rank, with the error of each), or
            some did not arrive within the deadline. If all ranks failed alike, that error itself.
    """
    if ranks.size == 1:
        return combine([local()])
    outcome, results = _gather(ranks, step, local)
    packed = _packed(_attempt(lambda: combine(results()))) if ranks.leads else None
    answer: Result = _unpacked(ranks.broadcast(packed, step=step), outcome)
    return answer


def in_turn(
    ranks: Collectives,
    step: str,
    local: Callable[[], Local],
    combine: Callable[[list[Local]], Sequence[Result]],
) -> Result:
    """Run `local` on every rank and `combine` on the coordinator; each rank gets its own result.

    `combine` gets the results of `local`, and returns those of the step, by rank.

    Raises:
        RankFailure: as `in_step`.
    """
    if ranks.size == 1:
        (only,) = combine([local()])
        return only
    outcome, results = _gather(ranks, step, local)

    def packed_by_rank() -> list[bytes]:
        values = combine(results())
        # A global plan comes from the caller's planner, and may have any length.
        if len(values) != ranks.size:
            raise InvalidInputError(
                f"{step} gave {len(values)} results for {ranks.size} ranks; a planner must return "
                "one plan for each rank, in their order."
            )
        return [_packed(_Outcome(value)) for value in values]

    packed = None
    if ranks.leads:
        combined = _attempt(packed_by_rank)
        packed = combined.value if combined.error is None else [_packed(combined)] * ranks.size
    answer: Result = _unpacked(ranks.scatter(packed, step=step), outcome)
    return answer


def _gather(
    ranks: Collectives, step: str, local: Callable[[], Local]
) -> tuple[_Outcome, Callable[[], list[Local]]]:
    """Run `local` and send its outcome to the coordinator.

    Return the outcome, and a function that gives the coordinator the values of all ranks; it raises
    their joined error if any rank failed.
    """
    outcome = _attempt(local)
    gathered = ranks.gather(_packed(outcome), step=step)

    def results() -> list[Local]:
        assert gathered is not None
        outcomes: list[_Outcome] = [pickle.loads(packed) for packed in gathered]
        failures = {rank: o.error for rank, o in enumerate(outcomes) if o.error is not None}
        if failures:
            raise _joined(step, failures, ranks.size)
        return [o.value for o in outcomes]

    return outcome, results


def _attempt(call: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(value=call())
    except BaseException as error:  # the other ranks must learn of an interrupt too
        return _Outcome(error=error)


def _packed(outcome: _Outcome) -> bytes:
    """Return an outcome as bytes; one that cannot be pickled becomes an error that says so."""
    if outcome.error is not None:
        return pickle.dumps(_Outcome(error=_portable(outcome.error)))
    try:
        return pickle.dumps(outcome)
    except Exception as reason:
        error = DcpstoreError(
            f"what this rank sends to the others cannot be pickled ({type(reason).__name__}: "
            f"{reason}); remove such objects from what a planner returns."
        )
        return pickle.dumps(_Outcome(error=error))


def _unpacked(packed: bytes, local: _Outcome) -> Any:
    """Return the coordinator's answer, or raise its error; `local` is the outcome of this rank."""
    if local.error is not None and not isinstance(local.error, Exception):
        raise local.error  # an interrupt stays one on the rank that was interrupted
    try:
        outcome: _Outcome = pickle.loads(packed)
    except Exception as error:  # unpickling runs foreign code, which may raise anything
        raise DcpstoreError(
            f"the coordinator's answer cannot be read on this rank ({type(error).__name__}: "
            f"{error}); make what a planner returns importable on every rank."
        ) from error
    if outcome.error is None:
        return outcome.value
    if local.error is not None:
        raise outcome.error from local.error
    raise outcome.error


def _joined(step: str, failures: Mapping[int, BaseException], size: int) -> BaseException:
    """Return the one error that all ranks raise."""
    first = next(iter(failures.values()))
    distinct = {(type(error), str(error)) for error in failures.values()}
    if len(failures) == size and len(distinct) == 1:
        return first
    mismatches = [error for error in failures.values() if isinstance(error, MismatchError)]
    if len(mismatches) == len(failures):  # one report of all differences, whichever rank saw them
        return MismatchError.listing(line for error in mismatches for line in error.differences)
    return RankFailure(step, failures)


def _portable(error: BaseException) -> BaseException:
    """Return `error` if it survives pickling, else an error of ours with its text."""
    note = ""
    try:
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except Exception as reason:
        note = f" (the error itself cannot be pickled: {reason})"
    text = f"{type(error).__name__}: {error}{note}"
    return DcpstoreError(text).with_traceback(error.__traceback__)
