"""A barrier before each exchange: all ranks arrive, or all learn which ranks did not.

Invariant: a barrier has one verdict, and every live rank gets it within the deadline, counted from
its own arrival. A rank whose deadline passes decides in place of the coordinator; the first verdict
counts. So a rank that is late, or arrives at a barrier that failed without it, raises the same
error as the others.

The barrier uses the key-value store of torch.distributed through which the ranks found each other.
It needs no backend, and a failed barrier leaves the process group as it was, because no rank has
entered a collective yet. The keys of a rank's n-th barrier are:

    <call>/<n>               the verdict
    <call>/<n>/<rank>        this rank has arrived
    <call>/<n>/lost/<rank>   this rank reports that its connection broke
    <call>/progress/<rank>   what this rank published last
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store

from dcpstore.errors import RankFailure

__all__ = ["StoreBarrier", "name_ranks"]

_log = logging.getLogger(__name__)
_ALL_ARRIVED = "all arrived"
_REPORT_TIME = timedelta(seconds=5)  # after a lost connection, for the live ranks to report it too
_SHOWN = 8  # ranks in one message; more would hide the rest of it


class StoreBarrier:
    """The barriers of one rank with the others of a group, one after another.

    Every rank must create its `StoreBarrier` objects in the same order, as for collective calls.
    """

    def __init__(self, store: Store, *, rank: int, size: int, coordinator: int) -> None:
        self._deadline: timedelta = store.timeout  # type: ignore[attr-defined]  # the stubs lack it
        # A connection of its own: a rank that waits here must not block other users of the store.
        self._store = PrefixStore("dcpstore", store.clone())  # type: ignore[attr-defined]  # nor this
        self._rank = rank
        self._size = size
        self._coordinator = coordinator
        # And a second one, for the thread that collects the progress while this rank waits.
        self._progress = PrefixStore("dcpstore", store.clone())  # type: ignore[attr-defined]  # nor this
        # Every rank counts its barrier objects, so that the keys of two of them never clash.
        self._call = self._store.add(f"calls/{rank}", 1)
        self._count = 0

    def wait(self, step: str) -> None:
        """Wait at the next barrier until all ranks have arrived.

        Raises:
            RankFailure: some have not arrived within the deadline, or one lost its connection.
        """
        self._count += 1
        with self._store_reachable(step):
            verdict = self._arrive(step)
        if verdict != _ALL_ARRIVED:
            raise _failure_of(verdict)

    def report_lost(self, step: str, error: Exception) -> RankFailure:
        """Return the failure of a broken exchange, and let the others learn it as they arrive.

        A rank that neither arrives nor reports a broken exchange itself counts as lost.
        """
        self._count += 1
        with self._store_reachable(step):
            # Not as an arrival: that could make the barrier succeed.
            self._store.set(f"{self._verdict}/lost/{self._rank}", "")
            until = time.monotonic() + min(self._deadline, _REPORT_TIME).total_seconds()
            while (lost := self._unreported()) and time.monotonic() < until:
                time.sleep(0.05)
            lost = lost or [self._rank]
            failures = dict.fromkeys(lost, f"the connection was lost: {_first_line(error)}")
            headline = f"lost the connection to {name_ranks(lost)} in {step}:"
            return _failure_of(self._decide(step, headline, failures, kind="lost"))

    def publish(self, progress: str) -> None:
        """Publish the progress of this rank; does not block."""
        try:
            self._store.set(f"{self._call}/progress/{self._rank}", progress)
        except RuntimeError as error:
            # Only logged: if the store is gone, the next barrier fails and says so.
            _log.info("cannot publish the progress of this rank: %s", _first_line(error))

    def progress_by_rank(self) -> dict[int, str]:
        """Return what each rank published last, by rank."""
        found = {}
        try:
            for rank in range(self._size):
                key = f"{self._call}/progress/{rank}"
                if self._progress.check([key]):  # `get` would wait for a rank that has none yet
                    found[rank] = self._progress.get(key).decode()
        except RuntimeError as error:
            _log.info("cannot read the progress of the other ranks: %s", _first_line(error))
        return found

    def _arrive(self, step: str) -> str:
        """Record the arrival of this rank and return the verdict."""
        self._store.set(self._arrival(self._rank), "")
        if self._rank == self._coordinator:
            arrivals = [self._arrival(rank) for rank in range(self._size)]
            if not self._wait_for(arrivals) and self._missing():
                return self._time_out(step)
            verdict = self._store.compare_set(self._verdict, "", _ALL_ARRIVED).decode()
            if self._count > 1:  # every rank here knows the verdict of the barrier before
                self._store.delete_key(f"{self._call}/{self._count - 1}")
        elif self._wait_for([self._verdict]):
            verdict = self._store.get(self._verdict).decode()
        else:
            return self._time_out(step)
        if verdict == _ALL_ARRIVED:
            self._store.delete_key(self._arrival(self._rank))
        return verdict

    def _time_out(self, step: str) -> str:
        """Decide a barrier whose deadline has passed, and return the verdict that counts."""
        late = self._missing()
        seconds = self._deadline.total_seconds()
        failures = dict.fromkeys(late, f"did not arrive within {seconds:g} s")
        if not late:  # the coordinator arrived, and ended before it decided
            late = [self._coordinator]
            failures = {self._coordinator: f"arrived, and did not answer within {seconds:g} s"}
        headline = f"waiting for {name_ranks(late)} in {step}:"
        return self._decide(step, headline, failures, kind="late")

    def _decide(self, step: str, headline: str, failures: Mapping[int, str], *, kind: str) -> str:
        """Propose a verdict, and return the one that counts: the first that any rank proposed."""
        given = {"step": step, "headline": headline, "failures": [*failures.items()], "kind": kind}
        verdict = self._store.compare_set(self._verdict, "", json.dumps(given)).decode()
        for rank in failures:  # wake the coordinator, which waits for their arrival
            self._store.set(self._arrival(rank), "")
        return verdict

    def _missing(self) -> list[int]:
        return [r for r in range(self._size) if not self._store.check([self._arrival(r)])]

    def _unreported(self) -> list[int]:
        """Return the other ranks that have neither arrived nor reported a lost connection."""
        return [
            rank
            for rank in self._missing()
            if not self._store.check([f"{self._verdict}/lost/{rank}"])
        ]

    def _wait_for(self, keys: list[str]) -> bool:
        """Wait until the store has all keys; return False when the deadline has passed."""
        try:
            self._store.wait(keys, self._deadline)
        except RuntimeError:  # a FileStore raises nothing narrower at a timeout
            return self._store.check(keys)
        return True

    @contextmanager
    def _store_reachable(self, step: str) -> Iterator[None]:
        """Turn an error of the store into a RankFailure."""
        try:
            yield
        except RuntimeError as error:  # the base class of torch's errors of the store
            reason = ConnectionError(
                "the process that keeps the store of the process group has ended: "
                f"{_first_line(error)}"
            )
            headline = f"lost the connection to the other ranks in {step}:"
            raise RankFailure(step, {self._coordinator: reason}, headline=headline) from error

    def _arrival(self, rank: int) -> str:
        return f"{self._verdict}/{rank}"

    @property
    def _verdict(self) -> str:
        return f"{self._call}/{self._count}"


def name_ranks(ranks: Iterable[int]) -> str:
    """Return ranks as a message names them, such as "rank 3" or "ranks 0, 2"."""
    distinct = sorted(set(ranks))
    more = f" and {len(distinct) - _SHOWN} more" if len(distinct) > _SHOWN else ""
    noun = "rank" if len(distinct) == 1 else "ranks"
    return f"{noun} {', '.join(map(str, distinct[:_SHOWN]))}{more}"


def _failure_of(verdict: str) -> RankFailure:
    """Return the error that a verdict stands for."""
    given = json.loads(verdict)
    kind = ConnectionError if given["kind"] == "lost" else TimeoutError
    return RankFailure(
        given["step"],
        {rank: kind(text) for rank, text in given["failures"]},
        headline=given["headline"],
    )


def _first_line(error: Exception) -> str:
    """Return the first line of an error: torch adds a C++ stack below."""
    return next(iter(str(error).splitlines()), type(error).__name__)
