"""A file written from its beginning to its end, past the page cache where the filesystem allows it.

Bytes are gathered in aligned blocks, and threads write full ones while the next fills, so that
hashing, encoding and the disk work at once, in bounded memory. Full blocks go straight to the disk
(O_DIRECT: about twice as fast as through the page cache); what fills none, and all of it where the
filesystem refuses, goes through the page cache, so a small file needs no thread and no extra copy.

Invariant: after `sync` the file holds what was written, durable; an error of a thread
is raised by a later `write` or by `sync`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from typing_extensions import Buffer

__all__ = ["BLOCK", "StreamedFile"]

BLOCK = 8 << 20  # bytes; a multiple of every disk's sector and of the page
_BLOCKS = 4  # one fills, two are being written, one waits
_WRITERS = 2  # keep the disk busy between two calls
_LONG = 64 << 10  # bytes whose copy is worth letting other threads run
_DIRECT = getattr(os, "O_DIRECT", 0)  # not every system has it


class StreamedFile:
    """A new file that is written by one caller, and durable when `sync` returns.

    Args:
        path: of a file that does not exist.
        block: bytes that are written at once, a multiple of the page.
    """

    def __init__(self, path: Path, *, block: int = BLOCK) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o666)
        self._is_direct = False
        self._is_open = True
        self._size = block
        self._block = _new_block(block)
        self._made = 1
        self._filled = 0
        self._sent = 0
        self._writing: deque[tuple[memoryview, Future[None]]] = deque()
        self._threads: ThreadPoolExecutor | None = None

    def write(self, data: Buffer) -> None:
        """Append contiguous bytes; they are copied, and may change on return."""
        rest = memoryview(data).cast("B")
        while rest:
            piece = rest[: self._size - self._filled]
            filled = self._filled + len(piece)
            _copy(piece, self._block[self._filled : filled])
            self._filled, rest = filled, rest[len(piece) :]
            if filled == self._size:
                self._send()

    def sync(self) -> None:
        """Write what is left, and wait until the disk has it all."""
        while self._writing:
            self._writing.popleft()[1].result()
        self._leave_direct()  # what is left may end anywhere
        self._put(self._block[: self._filled], self._sent)
        self._sent += self._filled
        self._filled = 0
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file and end the threads; writes that have begun end first."""
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None
        if self._is_open:
            self._is_open = False
            os.close(self._descriptor)

    def _send(self) -> None:
        """Hand the full block to the threads, and take another one to fill."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_WRITERS, "dcpstore-disk")
            self._try_direct()
        future = self._threads.submit(self._put, self._block, self._sent)
        self._writing.append((self._block, future))
        self._sent += self._filled
        self._filled = 0
        if self._made < _BLOCKS:
            self._block = _new_block(self._size)
            self._made += 1
        else:
            self._block, future = self._writing.popleft()
            future.result()

    def _put(self, rest: memoryview, offset: int) -> None:
        """Write bytes at an offset, all of them."""
        was_refused = False
        while rest:
            try:
                done = os.pwrite(self._descriptor, rest, offset)
            except OSError as error:
                # some filesystems take O_DIRECT and refuse only the write itself
                if error.errno != errno.EINVAL or was_refused:
                    raise
                was_refused = True
                self._leave_direct()
                continue
            if not self._is_direct and hasattr(os, "posix_fadvise"):
                # has the kernel write now, so that `sync` waits for the rest only
                os.posix_fadvise(self._descriptor, offset, done, os.POSIX_FADV_DONTNEED)
            rest, offset = rest[done:], offset + done

    def _try_direct(self) -> None:
        try:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | _DIRECT)
            self._is_direct = bool(_DIRECT)
        except OSError:  # not supported by tmpfs, some overlays and network mounts
            self._is_direct = False

    def _leave_direct(self) -> None:
        if self._is_direct:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
            self._is_direct = False


def _new_block(size: int) -> memoryview:
    """Return a block aligned to a page, which takes no memory before it is used.

    It is made of huge pages where the kernel has them: a disk takes a few long runs of memory a
    tenth faster than two thousand single pages.
    """
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            block.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(block)


def _copy(source: memoryview, target: memoryview) -> None:
    if len(source) < _LONG:
        target[:] = source
        return
    import numpy as np  # noqa: PLC0415 (a command that writes a few bytes need not load it)

    # numpy copies outside the interpreter lock, a memoryview does not
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
