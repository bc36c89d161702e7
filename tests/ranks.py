"""Real ranks for tests: processes in one gloo group, started once and asked again and again."""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

ROOT = Path(__file__).parent.parent
PATIENCE = 120.0  # seconds; then the ranks are killed and the test fails


class RankPool:
    """`size` processes, each a rank of one gloo group.

    They find one another by the URL `rendezvous`, or else by a file in `folder`.
    """

    def __init__(self, size: int, folder: Path, *, rendezvous: str | None = None) -> None:
        self.size = size
        place = rendezvous or f"file://{folder / 'rendezvous'}"
        # From a process that has loaded all, or each rank would load it for seconds.
        context = multiprocessing.get_context("forkserver")
        loaded = [
            "dcpstore.api",
            "dcpstore.asynchronous.async_save",
            "numpy",
            "torch._dynamo",
            "tests.frozen",
        ]
        context.set_forkserver_preload(loaded)
        self._pipes = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, place, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, call: Callable[..., Any], *args: Any, dying: Collection[int] = ()) -> list[Any]:
        """Return what `call(rank, *args)` returns on each rank; it must be importable by name.

        Ranks that are `dying` must end meanwhile, and return nothing.
        """
        for pipe in self._pipes:
            pipe.send((call, args))
        results, errors = [], []
        deadline = time.monotonic() + PATIENCE
        for rank, pipe in enumerate(self._pipes):
            if rank in dying:
                self._processes[rank].join(max(deadline - time.monotonic(), 0))
                assert self._processes[rank].exitcode is not None, f"rank {rank} lives"
                continue
            if not pipe.poll(max(deadline - time.monotonic(), 0)):
                self.close()
                raise TimeoutError(f"rank {rank} did not answer in {PATIENCE} s; all were killed")
            result, error = pipe.recv()
            results.append(result)
            if error:
                errors.append(f"rank {rank}:\n{error}")
        if errors:
            raise AssertionError("\n".join(errors))
        return results

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, size: int, rendezvous: str, pipe: Any) -> None:
    sys.path.insert(0, str(ROOT))
    # a rank may start processes of its own, as torch's asynchronous save does
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
    while True:
        try:
            call, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = (call(rank, *args), None)
        except Exception:
            answer = (None, traceback.format_exc())
        pipe.send(answer)


@cache
def mesh(shape: tuple[int, ...]) -> Any:
    """Return the device mesh of this shape over the first ranks; every rank calls it."""
    return DeviceMesh("cpu", torch.arange(math.prod(shape)).reshape(shape))


@cache
def first_ranks(count: int) -> Any:
    """Return the group of the first `count` ranks; every rank calls it."""
    return dist.new_group(list(range(count)))
