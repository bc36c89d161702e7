"""(g) How long an asynchronous save keeps its caller, against one memcpy of the state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save

import dcpstore
from benchmarks.states import layer_of, nbytes_of, random_gpt
from benchmarks.table import Row
from benchmarks.timing import seconds
from benchmarks.workloads.bench import Bench

__all__ = ["measure_blocked"]

MEMCPY, DCP = "one memcpy of the state", "DCP async_save"


def measure_blocked(bench: Bench) -> list[Row]:
    """(g) From the call until it returned and `staged` is done, from the second save on.

    The memcpy is torch's `copy_` of the same tensors into buffers that are there already. Each save
    ends before the next contender begins, and some of the state changes before each.
    """
    state = random_gpt(bench.scale)
    buffers = {fqn: torch.empty_like(tensor).zero_() for fqn, tensor in state.items()}

    def copy() -> None:
        for fqn, tensor in state.items():
            buffers[fqn].copy_(tensor)

    def memcpy(number: int) -> Mapping[str, float]:
        return {"blocked": seconds(copy)}

    def dcp(number: int) -> Mapping[str, float]:
        with bench.place("whole") as place, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            kept: list[Future[object]] = []

            def begin() -> None:
                writer = FileSystemWriter(place)
                answer = dcp_async_save(state, storage_writer=writer, no_dist=True)
                assert isinstance(answer, Future)
                kept.append(answer)

            found = {"blocked": seconds(begin)}
            kept.pop().result()
            return found

    with bench.place("repository") as place, dcpstore.open(place) as repo:
        kept: list[dcpstore.PendingSave] = []

        def begin() -> None:
            kept.append(dcpstore.async_save(state, repo))
            kept[0].staged.result()

        def ours(number: int) -> Mapping[str, float]:
            for tensor in layer_of(state, 0).values():
                tensor.add_(1e-3)
            found = {"blocked": seconds(begin)}
            kept.pop().result()
            return found

        for contender in (memcpy, dcp, ours):  # the first makes the buffers
            contender(0)
        measured = bench.in_turns({MEMCPY: memcpy, DCP: dcp, "dcpstore": ours})
    row = partial(
        Row,
        "g",
        "caller blocked by async_save",
        ours=measured["dcpstore"]["blocked"],
        least_work={"copy": nbytes_of(state)},
    )
    return [
        row(MEMCPY, measured[MEMCPY]["blocked"], kind="share", target=1.5),
        row(DCP, measured[DCP]["blocked"]),
    ]
