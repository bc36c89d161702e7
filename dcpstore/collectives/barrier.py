"""A barrier before each exchange: all ranks arrive, or all learn which ranks did not.

Invariant: a barrier has one verdict, and every live rank gets it within the deadline, counted from
its own arrival. A rank whose time is up gives the verdict in place of the coordinator; the first
verdict counts. So a rank that is late, or arrives at a barrier that failed without it, raises the
same error as the others.

The barrier uses the key-value store of torch.distributed by which the ranks found one another. It
needs no backend, and a failed barrier leaves the process group as it was, for no rank has entered a
collective yet.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store

from dcpstore.errors import RankFailure

__all__ = ["StoreBarrier"]

_log = logging.getLogger(__name__)
_ALL_CAME = "all came"
_ROLL_CALL = timedelta(seconds=5)  # how long a lost connection waits for those who are still there


class StoreBarrier:
    """The barriers of one rank with the others of a group, one after another.

    All ranks create theirs on a group in the same order, as they call a collective.
    """

    def __init__(self, store: Store, *, rank: int, size: int, coordinator: int) -> None:
        self._deadline: timedelta = store.timeout  # type: ignore[attr-defined]  # the stubs lack it
        # A connection of its own: a rank that waits here must not keep others from the store.
        self._store = PrefixStore("dcpstore", store.clone())  # type: ignore[attr-defined]  # nor this
        self._rank = rank
        self._size = size
        self._coordinator = coordinator
        # And one to listen by, for a thread that asks while this rank waits.
        self._ear = PrefixStore("dcpstore", store.clone())  # type: ignore[attr-defined]  # nor this
        self._call = self._store.add(f"calls/{rank}", 1)
        self._count = 0

    def wait(self, step: str) -> None:
        """Wait at the next barrier until all ranks have arrived.

        Raises:
            RankFailure: some have not arrived within the deadline, or one lost its connection.
        """
        self._count += 1
        with self._answering(step):
            verdict = self._arrive(step)
        if verdict != _ALL_CAME:
            raise _opened(verdict)

    def report_lost(self, step: str, error: Exception) -> RankFailure:
        """Return the failure of a broken exchange, and let the others learn it as they arrive.

        A rank that neither arrives nor reports a broken exchange itself counts as lost.
        """
        self._count += 1
        with self._answering(step):
            # Not as an arrival: that could make the barrier succeed.
            self._store.set(f"{self._verdict}/lost/{self._rank}", "")
            until = time.monotonic() + min(self._deadline, _ROLL_CALL).total_seconds()
            while (lost := self._silent()) and time.monotonic() < until:
                time.sleep(0.05)
            lost = lost or [self._rank]
            failures = dict.fromkeys(lost, f"the connection was lost: {_line(error)}")
            headline = f"lost touch with {_named(lost)} in {step}:"
            return _opened(self._decide(step, headline, failures, kind="lost"))

    def publish(self, said: str) -> None:
        """Publish the progress of this rank; does not block."""
        try:
            self._store.set(f"{self._call}/said/{self._rank}", said)
        except (
            RuntimeError
        ) as error:  # not an error: the next barrier fails too if the store is gone
            _log.info("cannot publish the progress of this rank: %s", _line(error))

    def progress_by_rank(self) -> dict[int, str]:
        """Return what each rank published last, by rank."""
        words = {}
        try:
            for rank in range(self._size):
                key = f"{self._call}/said/{rank}"
                if self._ear.check([key]):
                    words[rank] = self._ear.get(key).decode()
        except RuntimeError as error:
            _log.info("cannot read the progress of the other ranks: %s", _line(error))
        return words

    def _arrive(self, step: str) -> str:
        """Record the arrival of this rank and return the verdict."""
        self._store.set(self._arrival(self._rank), "")
        if self._rank == self._coordinator:
            everyone = [self._arrival(rank) for rank in range(self._size)]
            if not self._is_there(everyone) and self._missing():
                return self._give_up(step)
            verdict = self._store.compare_set(self._verdict, "", _ALL_CAME).decode()
            if self._count > 1:  # every rank here knows the verdict of the one before
                self._store.delete_key(f"{self._call}/{self._count - 1}")
        elif self._is_there([self._verdict]):
            verdict = self._store.get(self._verdict).decode()
        else:
            return self._give_up(step)
        if verdict == _ALL_CAME:
            self._store.delete_key(self._arrival(self._rank))
        return verdict

    def _give_up(self, step: str) -> str:
        """Give the verdict of a barrier whose time is up, and return the one that counts."""
        late = self._missing()
        seconds = self._deadline.total_seconds()
        failures = dict.fromkeys(late, f"did not come within {seconds:g} s")
        if not late:  # the coordinator arrived, and ended before it gave the verdict
            late = [self._coordinator]
            failures = {self._coordinator: f"came, and gave no answer within {seconds:g} s"}
        headline = f"waiting for {_named(late)} in {step}:"
        return self._decide(step, headline, failures, kind="late")

    def _decide(self, step: str, headline: str, failures: Mapping[int, str], *, kind: str) -> str:
        """Give a verdict, and return the one that counts: the first one given."""
        said = {"step": step, "headline": headline, "failures": [*failures.items()], "kind": kind}
        verdict = self._store.compare_set(self._verdict, "", json.dumps(said)).decode()
        for rank in failures:  # wake the coordinator, which waits for them
            self._store.set(self._arrival(rank), "")
        return verdict

    def _missing(self) -> list[int]:
        return [r for r in range(self._size) if not self._store.check([self._arrival(r)])]

    def _silent(self) -> list[int]:
        """Return the other ranks that have neither arrived nor reported a lost connection."""
        return [
            rank
            for rank in self._missing()
            if not self._store.check([f"{self._verdict}/lost/{rank}"])
        ]

    def _is_there(self, keys: list[str]) -> bool:
        """Wait until the store has all keys; False when the time is up."""
        try:
            self._store.wait(keys, self._deadline)
        except RuntimeError:  # a FileStore raises no narrower one when the time is up
            return self._store.check(keys)
        return True

    @contextmanager
    def _answering(self, step: str) -> Iterator[None]:
        """Turn the silence of the store into a failure of ours."""
        try:
            yield
        except RuntimeError as error:  # of which torch's errors of the store are
            reason = ConnectionError(
                f"the process that keeps the store where the ranks meet has ended: {_line(error)}"
            )
            headline = f"lost touch with the other ranks in {step}:"
            raise RankFailure(step, {self._coordinator: reason}, headline=headline) from error

    def _arrival(self, rank: int) -> str:
        return f"{self._verdict}/{rank}"

    @property
    def _verdict(self) -> str:
        return f"{self._call}/{self._count}"


def _opened(verdict: str) -> RankFailure:
    """Return the error that a verdict stands for."""
    said = json.loads(verdict)
    kind = ConnectionError if said["kind"] == "lost" else TimeoutError
    return RankFailure(
        said["step"],
        {rank: kind(text) for rank, text in said["failures"]},
        headline=said["headline"],
    )


def _named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _line(error: Exception) -> str:
    """Return the first line of an error: torch adds a C++ stack below."""
    return next(iter(str(error).splitlines()), type(error).__name__)
