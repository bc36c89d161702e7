"""Meetings of ranks: before they exchange anything, all have come, or all hear who has not.

Invariant: a meeting has one verdict, and every live rank gets it within the deadline, counted from
its own coming. Whoever's time is up gives it in the coordinator's place; the first one counts. So a
rank that is late, or comes to a meeting that failed without it, raises the same error as the rest.

Meetings are held in the key-value store by which the ranks found one another. It needs no backend,
and a failed meeting leaves the group as it was, for nobody has entered a collective yet.
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

__all__ = ["Meeting"]

_log = logging.getLogger(__name__)
_ALL_CAME = "all came"
_ROLL_CALL = timedelta(seconds=5)  # how long a lost connection waits for those who are still there


class Meeting:
    """The meetings of one rank with the others of a group, one after another.

    All ranks make theirs on a group in the same order, as they call a collective.
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

    def hold(self, step: str) -> None:
        """Come to the next meeting, and return when all have come.

        Raises:
            RankFailure: some have not within the deadline, or one has lost touch with the others.
        """
        self._count += 1
        with self._answering(step):
            verdict = self._come(step)
        if verdict != _ALL_CAME:
            raise _opened(verdict)

    def report_lost(self, step: str, error: Exception) -> RankFailure:
        """Return the failure that a broken exchange is, and have the others hear it as they come.

        Whoever neither comes nor reports a broken exchange himself is taken for lost.
        """
        self._count += 1
        with self._answering(step):
            # Not as come: that could make the meeting succeed.
            self._store.set(f"{self._verdict}/lost/{self._rank}", "")
            until = time.monotonic() + min(self._deadline, _ROLL_CALL).total_seconds()
            while (lost := self._silent()) and time.monotonic() < until:
                time.sleep(0.05)
            lost = lost or [self._rank]
            failures = dict.fromkeys(lost, f"the connection was lost: {_line(error)}")
            headline = f"lost touch with {_named(lost)} in {step}:"
            return _opened(self._rule(step, headline, failures, kind="lost"))

    def tell(self, said: str) -> None:
        """Leave a word for whoever asks how far this rank is."""
        try:
            self._store.set(f"{self._call}/said/{self._rank}", said)
        except RuntimeError as error:  # of no weight: the next meeting finds the store gone too
            _log.info("the other ranks do not hear how far this one is: %s", _line(error))

    def heard(self) -> dict[int, str]:
        """Return the last word of each rank that has told one."""
        words = {}
        try:
            for rank in range(self._size):
                key = f"{self._call}/said/{rank}"
                if self._ear.check([key]):
                    words[rank] = self._ear.get(key).decode()
        except RuntimeError as error:
            _log.info("how far the other ranks are is not known: %s", _line(error))
        return words

    def _come(self, step: str) -> str:
        """Come, and return the verdict."""
        self._store.set(self._arrival(self._rank), "")
        if self._rank == self._coordinator:
            everyone = [self._arrival(rank) for rank in range(self._size)]
            if not self._is_there(everyone) and self._missing():
                return self._give_up(step)
            verdict = self._store.compare_set(self._verdict, "", _ALL_CAME).decode()
            if self._count > 1:  # whoever is here has heard how the one before ended
                self._store.delete_key(f"{self._call}/{self._count - 1}")
        elif self._is_there([self._verdict]):
            verdict = self._store.get(self._verdict).decode()
        else:
            return self._give_up(step)
        if verdict == _ALL_CAME:
            self._store.delete_key(self._arrival(self._rank))
        return verdict

    def _give_up(self, step: str) -> str:
        """Give the verdict of a meeting whose time is up, and return the one that counts."""
        late = self._missing()
        seconds = self._deadline.total_seconds()
        failures = dict.fromkeys(late, f"did not come within {seconds:g} s")
        if not late:  # the coordinator came, and ended before it could say that all had
            late = [self._coordinator]
            failures = {self._coordinator: f"came, and gave no answer within {seconds:g} s"}
        headline = f"waiting for {_named(late)} in {step}:"
        return self._rule(step, headline, failures, kind="late")

    def _rule(self, step: str, headline: str, failures: Mapping[int, str], *, kind: str) -> str:
        """Give a verdict, and return the one that counts: the first."""
        said = {"step": step, "headline": headline, "failures": [*failures.items()], "kind": kind}
        verdict = self._store.compare_set(self._verdict, "", json.dumps(said)).decode()
        for rank in failures:  # wake the coordinator, which waits for them
            self._store.set(self._arrival(rank), "")
        return verdict

    def _missing(self) -> list[int]:
        return [r for r in range(self._size) if not self._store.check([self._arrival(r)])]

    def _silent(self) -> list[int]:
        """Return the other ranks that have not come, nor lost touch themselves."""
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
