"""The machine that a run is made on, and what it can do at most.

Invariant: the limits are measured in the same run and in the same folder as everything else, so
that a row can be read as a share of them.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import blake3
import torch

from benchmarks.files import sync
from benchmarks.timing import Samples, in_turns, seconds

__all__ = ["describe", "probe"]

_BLOCK = 8 << 20
_LIBRARIES = ("torch", "safetensors", "zarr", "numcodecs", "blake3", "sqlalchemy", "numpy")


def describe(folder: Path) -> dict[str, str]:
    """Return what the machine, its filesystem at `folder` and the libraries are."""
    return {
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "filesystem": _filesystem(folder),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch threads": str(torch.get_num_threads()),
        **{name: version(name) for name in _LIBRARIES},
    }


def probe(
    folder: Path, *, nbytes: int, rounds: int, say: Callable[[str], None]
) -> dict[str, Samples]:
    """Measure what the machine can do at most, in bytes a second.

    Direct writing is left out where the filesystem refuses it.
    """
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    target = torch.zeros_like(source)
    path = folder / "probe"
    whole, filled = source.numpy().data, target.numpy().data
    path.write_bytes(whole)
    block = _aligned_block(source)

    def write_direct() -> None:
        _write(path, block, nbytes // len(block), flags=os.O_DIRECT)

    def write_buffered() -> None:
        _write(path, block, nbytes // len(block), flags=0)

    def read_mapped() -> None:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            target[: len(mapped)].copy_(torch.frombuffer(mapped, dtype=torch.uint8))

    def read_copied() -> None:
        with path.open("rb", buffering=0) as file:
            file.readinto(filled)

    def hash_on_all_cores() -> None:
        blake3.blake3(whole, max_threads=blake3.blake3.AUTO)

    calls: dict[str, Callable[[], object]] = {
        "direct write, fsync": write_direct,
        "buffered write, fsync": write_buffered,
        "read, mapped": read_mapped,
        "read, copied": read_copied,
        "memcpy": lambda: target.copy_(source),
        "BLAKE3, one core": lambda: blake3.blake3(whole),
        "BLAKE3, all cores": hash_on_all_cores,
    }
    try:
        write_direct()
    except OSError:
        del calls["direct write, fsync"]
        write_buffered()

    def rate(call: Callable[[], object]) -> Callable[[int], dict[str, float]]:
        return lambda _: {"rate": nbytes / seconds(call)}

    measured = in_turns({name: rate(c) for name, c in calls.items()}, rounds=rounds, say=say)
    path.unlink()
    sync(folder)
    return {name: found["rate"] for name, found in measured.items()}


def _write(path: Path, block: memoryview, count: int, *, flags: int) -> None:
    path.unlink()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o644)
    try:
        for _ in range(count):
            os.write(descriptor, block)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync(path.parent)


def _aligned_block(source: torch.Tensor) -> memoryview:
    """Return a block of huge pages, as direct writing likes it best, with random content."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    mapped = mmap.mmap(-1, min(_BLOCK, len(source)), flags=flags)
    with contextlib.suppress(OSError):  # a kernel built without them
        mapped.madvise(mmap.MADV_HUGEPAGE)
    mapped[:] = source[: len(mapped)].numpy().tobytes()
    return memoryview(mapped)


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _filesystem(folder: Path) -> str:
    """Return the type of the filesystem that a folder lies on."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    whole = folder.resolve()
    above = [(len(place), kind) for _, place, kind, *_ in mounts if whole.is_relative_to(place)]
    return max(above)[1]
