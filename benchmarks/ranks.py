"""Real ranks: processes in one gloo group, started once and asked again and again."""

from __future__ import annotations

import math
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Ranks", "first_ranks", "mesh", "started"]

_PATIENCE = 300.0  # seconds that one job may take


class Ranks:
    """Processes, each a rank, by the pipes to them."""

    def __init__(self, pipes: list[Any]) -> None:
        self._pipes = pipes

    def run(self, call: Callable[..., Any], *args: Any, ranks: int | None = None) -> list[Any]:
        """Return what `call(rank, *args)` returns on the first `ranks`; None is all of them."""
        pipes = self._pipes[:ranks]
        for pipe in pipes:
            pipe.send((call, args))
        answers = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(_PATIENCE):
                raise SystemExit(f"rank {rank} did not answer {call.__name__} in {_PATIENCE:.0f} s")
            answer, error = pipe.recv()
            if error:
                raise SystemExit(f"rank {rank} failed in {call.__name__}:\n{error}")
            answers.append(answer)
        return answers


@contextmanager
def started(size: int, folder: Path) -> Iterator[Ranks]:
    """Start `size` ranks, which share the cores; end them after."""
    context = multiprocessing.get_context("spawn")
    folder.mkdir()
    meeting = folder.resolve() / "meeting"  # a relative path in a URL would be taken for a host
    threads = max(1, len(os.sched_getaffinity(0)) // size)
    pipes, processes = [], []
    try:
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, threads, meeting, theirs), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        yield Ranks(pipes)
    finally:
        for process in processes:
            process.kill()
            process.join()


@cache
def mesh(shape: tuple[int, ...]) -> DeviceMesh:
    """Return the mesh of this shape over the first ranks; the first time all ranks must ask."""
    return DeviceMesh("cpu", torch.arange(math.prod(shape)).reshape(shape))


@cache
def first_ranks(count: int) -> dist.ProcessGroup:
    """Return the group of the first ranks; the first time all ranks must ask."""
    group: dist.ProcessGroup = dist.new_group(list(range(count)))
    return group


def _serve(rank: int, size: int, threads: int, meeting: Path, pipe: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    while True:
        try:
            call, args = pipe.recv()
        except EOFError:  # the benchmark has ended
            return
        answer: tuple[Any, str | None]
        try:
            answer = (call(rank, *args), None)
        except Exception:
            answer = (None, traceback.format_exc())
        pipe.send(answer)
