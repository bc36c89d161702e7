"""SIGKILL at every step of an operation, and loss of power at every step that touches the disk.

One run is recorded to find the steps; then, for each, a new copy of the repository is struck there,
and a new process looks: all versions load, bit for bit; what was killed is whole or unseen; the
next save succeeds; gc clears the rest.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from tests.torture.children import Ended, start
from tests.torture.kinds import DATABASES, Dialect, Ground, Outcome, Verdict
from tests.torture.loss import Disk
from tests.torture.operations import OPERATIONS, Operation, check
from tests.torture.sites import Mould, Site
from tests.torture.steps import Steps, begun, done

__all__ = ["Kills", "Point", "kinds"]

# What is left of the disk: all that was written; of the last write, half; nothing that was not
# synced; or of that, a part.
Left = Literal["all", "torn", "synced", "some"]
PATIENCE = timedelta(seconds=3)  # of ranks for one another
LONG_PATIENCE = timedelta(seconds=30)
# How many points the short form tries.
SHORT = {
    ("save", "sqlite"): 3,
    ("save", "postgres"): 2,
    ("save on two ranks", "sqlite"): 2,
    ("first save", "sqlite"): 1,
    ("compact", "sqlite"): 3,
    ("gc: repack", "postgres"): 1,
}
LONG = 64  # of each operation on each database


@dataclass(frozen=True, slots=True)
class Point:
    """A step to die at, of one rank, and what the disk keeps."""

    number: int
    what: str
    rank: int
    left: Left
    is_end: bool

    @property
    def is_power(self) -> bool:
        """Whether power is lost: then all ranks die at once."""
        return self.left in ("synced", "some")

    def __str__(self) -> str:
        return f"rank {self.rank} at step {self.number} ({self.what}), {self.left} left"


class Kills:
    """The kills of one operation, on one kind of database."""

    def __init__(self, ground: Ground, operation: Operation, dialect: Dialect) -> None:
        self._ground, self._operation, self._dialect = ground, operation, dialect
        self.name = f"kill: {operation.name}, {dialect}"
        # Each point works in processes of its own, and ranks mostly wait for a dead one.
        self.at_once = 2 if operation.ranks == 1 else 6

    @cached_property
    def _mould(self) -> Mould:
        return Mould(self._ground, self._dialect, self._operation.prepare)

    def points(self) -> Sequence[Point]:
        """Return where to kill it, spread over its steps."""
        few = SHORT.get((self._operation.name, self._dialect), 1)
        return self._ground.pick(self.every_point(), few, LONG)

    def every_point(self) -> list[Point]:
        """Run the operation once, and return its steps."""
        site = self._mould.copy()
        ended = self._strike(site, None, LONG_PATIENCE)
        for one in ended:
            assert (one.code, one.error) == (0, ""), one
        points = list(_points(self._logs(site), Disk(site.root, self._mould.before)))
        self._mould.discard(site)
        return points

    def try_point(self, point: Point) -> Outcome:
        """Kill a rank there, leave what the disk keeps, and look."""
        site = self._mould.copy()
        struck = self._strike(site, point, PATIENCE)
        if self._operation.ranks > 1 and struck[point.rank].code != -signal.SIGKILL:
            # On a busy machine they may have waited in vain for one another before that.
            self._mould.discard(site)
            site = self._mould.copy()
            struck = self._strike(site, point, LONG_PATIENCE)
        for rank, ended in enumerate(struck):
            if ended.hung:
                return Outcome(Verdict.HUNG, f"rank {rank} waits")
            if rank == point.rank and ended.code != -signal.SIGKILL:
                return Outcome(Verdict.LOST, f"it did not come so far: {ended}")
            if rank == point.rank or point.is_power:  # which takes all ranks along
                continue
            if ended.error and f"rank {point.rank}" not in ended.error:
                return Outcome(Verdict.LOST, f"rank {rank} does not say who died: {ended.error}")
        if point.is_power:
            chance = random.Random(point.number)
            disk = Disk(site.root, self._mould.before)
            for step in done(self._logs(site)):
                disk.take(step)
            disk.lose_power(lambda: point.left == "some" and chance.random() < 0.5)
        looked = start(check, self._operation, site, point.is_end).end()
        if looked.hung:
            return Outcome(Verdict.HUNG, "the look afterwards waits")
        if looked.error or looked.code:
            last = "".join(looked.error.splitlines(keepends=True)[-8:])
            return Outcome(Verdict.LOST, f"exit code {looked.code}\n{last}")
        self._mould.discard(site)
        return Outcome(Verdict.SURVIVED)

    def _strike(self, site: Site, point: Point | None, patience: timedelta) -> list[Ended]:
        children = [
            start(_work, self._operation, site, rank, point, patience)
            for rank in range(self._operation.ranks)
        ]
        return [child.end() for child in children]

    def _logs(self, site: Site) -> list[Path]:
        return [_log(site, rank) for rank in range(self._operation.ranks)]


def kinds(ground: Ground) -> Iterator[Kills]:
    """Yield the kills of every operation on both databases; in the short form, of some."""
    for operation in OPERATIONS:
        for dialect in DATABASES:
            if ground.long or (operation.name, dialect) in SHORT:
                yield Kills(ground, operation, dialect)


def _points(logs: Sequence[Path], disk: Disk) -> Iterator[Point]:
    """Yield the points of all ranks; loss of power only where it changes something new."""
    steps = [(step, rank) for rank, log in enumerate(logs) for step in begun(log)]
    last = {rank: step for step, rank in steps}
    ended = [(step, rank) for rank, log in enumerate(logs) for step in done([log])]
    touched = True
    for step, rank in sorted(steps + ended, key=lambda one: one[0].at):
        if step.done:
            disk.take(step)
            touched |= bool(step.path)
            continue
        what = f"{step.what} {step.path.rsplit('/', 1)[-1]}".strip()
        lefts: list[Left] = ["all"]
        if step.what in ("write", "pwrite"):
            lefts.append("torn")
        is_end = step is last[rank]  # then all that was promised must be there
        if (touched or is_end) and not disk.is_synced:
            lefts += ["synced", "some"]
        yield from (Point(step.number, what, rank, left, is_end) for left in lefts)
        touched = False


def _log(site: Site, rank: int) -> Path:
    return site.root.parent / f"steps-{rank}"


def _work(
    operation: Operation, site: Site, rank: int, point: Point | None, patience: timedelta
) -> None:
    """Do the operation as one rank, and die where the point says."""
    torch.set_num_threads(1)
    fellows: list[int] = []
    if operation.ranks > 1:
        pids = [site.root.parent / f"pid-{rank}" for rank in range(operation.ranks)]
        pids[rank].write_text(str(os.getpid()))
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        meeting = site.root.parent / "meeting"
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=operation.ranks,
            timeout=patience,
        )  # who has met the others finds their pids
        if point is not None and point.is_power:
            fellows = [int(pid.read_text()) for pid in pids if pid != pids[rank]]
    die_at, tear = None, False
    if point is not None and point.rank == rank:
        die_at, tear = point.number, point.left == "torn"
    # One order of all ranks' steps is needed where the disk is replayed, and costs time.
    is_ordered = operation.ranks > 1 and (point is None or point.is_power)
    steps = Steps(
        site.root,
        _log(site, rank),
        die_at=die_at,
        tear=tear,
        turns=site.root.parent / "turns" if is_ordered else None,
        fellows=fellows,
    )
    steps.watch()
    operation.act(site, rank)
    steps.take("end")
