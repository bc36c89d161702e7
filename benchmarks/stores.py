"""The ways to keep a checkpoint that are measured side by side; every save is durable on return.

Invariant: each takes the same flat state, and each load fills the same tensors in place, so that
all end with the same bytes in the same memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import zarr
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from zarr.storage import LocalStore

import dcpstore
from benchmarks.files import make_durable, sync
from benchmarks.states import State

__all__ = [
    "DCP_DEFAULT",
    "DCP_THREADS",
    "OURS",
    "PEERS",
    "UNVERIFIED",
    "Opened",
    "Store",
    "Work",
    "open_dcp",
    "open_ours",
]

OURS = "dcpstore"
UNVERIFIED = "load, verify=False"  # a way to load that only ours has, for only ours verifies
DCP_DEFAULT = "DCP, default"
DCP_THREADS = {DCP_DEFAULT: 1, "DCP, 2 threads": 2, "DCP, 4 threads": 4}


# Saves or loads a state; ours tells the seconds that it spent by phase.
Work = Callable[[State], Mapping[str, float] | None]


@dataclass(frozen=True, slots=True)
class Opened:
    """A place to save to, ready; `loads` are the ways to fill a state from it."""

    save: Work
    loads: Mapping[str, Work] = field(default_factory=dict)


Store = Callable[[Path], AbstractContextManager[Opened]]


def open_dcp(threads: int) -> Store:
    """Return torch's DCP with so many writing threads; only the default one loads.

    DCP fsyncs its files but not the folder, in which it renames one: that is added.
    """

    @contextmanager
    def opened(place: Path) -> Iterator[Opened]:
        def save(state: State) -> None:
            with _quiet():
                writer = FileSystemWriter(place, thread_count=threads)
                dcp_save(state, storage_writer=writer, no_dist=True)
            sync(place)
            sync(place.parent)

        def load(state: State) -> None:
            with _quiet():
                dcp_load(state, storage_reader=FileSystemReader(place), no_dist=True)

        yield Opened(save, {"load": load} if threads == 1 else {})

    return opened


@contextmanager
def open_torch_file(place: Path) -> Iterator[Opened]:
    """torch.save, and torch.load of the mapped file, copied into the state."""
    path = place / "state.pt"
    place.mkdir()

    def save(state: State) -> None:
        torch.save(state, path)
        make_durable(place)

    def load(state: State) -> None:
        _copy_into(state, torch.load(path, mmap=True, weights_only=True))

    yield Opened(save, {"load": load})


@contextmanager
def open_safetensors(place: Path) -> Iterator[Opened]:
    """One safetensors file, loaded and copied into the state."""
    path = place / "state.safetensors"
    place.mkdir()

    def save(state: State) -> None:
        safetensors.torch.save_file(state, path)
        make_durable(place)

    def load(state: State) -> None:
        _copy_into(state, safetensors.torch.load_file(path))

    yield Opened(save, {"load": load})


@contextmanager
def open_zarr(place: Path) -> Iterator[Opened]:
    """zarr-python, array by array, at its fastest: one chunk an array, not compressed.

    It never fsyncs; doing so for every file and folder after it is part of the save. It has no
    bfloat16, so that goes in as uint16.
    """
    place.mkdir()

    def save(state: State) -> None:
        group = zarr.open_group(LocalStore(place / "group"), mode="w")
        for fqn, tensor in state.items():
            array = _as_array(tensor)
            group.create_array(fqn, data=array, chunks=array.shape, compressors=None)
        make_durable(place)

    def load(state: State) -> None:
        group = zarr.open_group(LocalStore(place / "group", read_only=True), mode="r")
        for fqn, tensor in state.items():
            stored = group[fqn]
            assert isinstance(stored, zarr.Array)
            np.copyto(_as_array(tensor), np.asarray(stored[...]))

    yield Opened(save, {"load": load})


@contextmanager
def open_ours(place: Path) -> Iterator[Opened]:
    """dcpstore: a new repository on SQLite, opened before, as a training job has it open.

    Loads open it by its path, as the other stores do.
    """
    with dcpstore.open(place) as repo:
        yield Opened(
            lambda state: dcpstore.save(state, repo).seconds,
            {
                "load": lambda state: dcpstore.load(state, place).seconds,
                UNVERIFIED: lambda state: dcpstore.load(state, place, verify=False).seconds,
            },
        )


PEERS: Mapping[str, Store] = {
    **{name: open_dcp(threads) for name, threads in DCP_THREADS.items()},
    "torch.save": open_torch_file,
    "safetensors": open_safetensors,
    "zarr-python": open_zarr,
}


def _copy_into(state: State, loaded: State) -> None:
    for fqn, tensor in state.items():
        tensor.copy_(loaded[fqn])


def _as_array(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    array = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    return array.numpy()


@contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns that it works in one process, which is what is asked of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
