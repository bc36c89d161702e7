"""How far a long save or load has come, for a person at a terminal.

A bar is drawn by the coordinator alone, only where standard error is a terminal, and only once the
work has lasted a while; elsewhere nothing is imported and nothing printed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

__all__ = ["ProgressBar"]

_PATIENCE = 1.0  # seconds before a bar appears
_QUIET = 2.0  # seconds between two reports of one phase


class ProgressBar:
    """Counts bytes of one phase after another; a context manager.

    `tell` hears of the phase, the bytes done and the total: as a phase begins and ends, and now and
    then between.
    """

    def __init__(
        self,
        what: str,
        *,
        shown: bool,
        publish: Callable[[str, int, int], None] = lambda phase, done, total: None,
    ) -> None:
        self._publish = publish
        self._told = 0.0
        self._what = what
        self._shown = shown and sys.stderr.isatty()
        self._began = time.monotonic()
        self._bar: RichProgress | None = None
        self._phase = ""
        self._total = self._done = 0

    def begin(self, phase: str, total: int) -> None:
        """Start a phase of `total` bytes."""
        self._phase, self._total, self._done = phase, total, 0
        self._report()
        if self._bar is not None:
            self._bar.reset(self._task, description=self._title, total=total)

    def advance(self, nbytes: int) -> None:
        """Count `nbytes` more as done."""
        self._done += nbytes
        if self._done >= self._total or time.monotonic() - self._told > _QUIET:
            self._report()
        if not self._shown:
            return
        if self._bar is None:
            if time.monotonic() - self._began < _PATIENCE:
                return
            self._draw()
        assert self._bar is not None
        self._bar.update(self._task, completed=self._done)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _report(self) -> None:
        self._told = time.monotonic()
        self._publish(self._phase, self._done, self._total)

    @property
    def _title(self) -> str:
        return f"{self._what}: {self._phase}"

    def _draw(self) -> None:
        from rich.console import Console  # noqa: PLC0415 (most saves draw nothing)
        from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn  # noqa: PLC0415

        self._bar = Progress(
            "{task.description}",
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task(self._title, total=self._total)
        self._bar.start()
