"""The progress of a long save, load or upgrade, as a bar on a terminal and as reports.

Only the coordinator draws a bar, only if standard error is a terminal, and only after the work has
run for a second; otherwise rich is not imported and nothing is printed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

__all__ = ["ProgressBar"]

_BAR_AFTER = 1.0  # seconds of work before a bar appears
_REPORT_EVERY = 2.0  # seconds between two reports of one phase


class ProgressBar:
    """Counts bytes, or entries, of one phase after another; a context manager.

    Args:
        title: what the work is, such as "save".
        shown: whether a bar may be drawn.
        unit: what is counted.
        publish: called with the phase, the bytes done and the total when a phase begins and ends,
            and every few seconds in between.
    """

    def __init__(
        self,
        title: str,
        *,
        shown: bool,
        unit: Literal["bytes", "entries"] = "bytes",
        publish: Callable[[str, int, int], None] = lambda phase, done, total: None,
    ) -> None:
        self._publish = publish
        self._reported = 0.0
        self._title, self._unit = title, unit
        self._shown = shown and sys.stderr.isatty()
        self._began = time.monotonic()
        self._bar: RichProgress | None = None
        self._phase = ""
        self._total = self._done = 0

    def begin(self, phase: str, total: int) -> None:
        """Start a phase of `total` bytes or entries."""
        self._phase, self._total, self._done = phase, total, 0
        self._report()
        if self._bar is not None:
            self._bar.reset(self._task, description=self._description, total=total)

    def advance(self, count: int) -> None:
        """Count so many more as done."""
        self._done += count
        if self._done >= self._total or time.monotonic() - self._reported > _REPORT_EVERY:
            self._report()
        if not self._shown:
            return
        if self._bar is None:
            if time.monotonic() - self._began < _BAR_AFTER:
                return
            self._draw()
        assert self._bar is not None
        self._bar.update(self._task, completed=self._done)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _report(self) -> None:
        self._reported = time.monotonic()
        self._publish(self._phase, self._done, self._total)

    @property
    def _description(self) -> str:
        return f"{self._title}: {self._phase}"

    def _draw(self) -> None:
        from rich.console import Console  # noqa: PLC0415 (most saves draw nothing)
        from rich.progress import (  # noqa: PLC0415
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            (DownloadColumn(), TransferSpeedColumn())
            if self._unit == "bytes"
            else (MofNCompleteColumn(), TimeRemainingColumn())
        )
        self._bar = Progress(
            "{task.description}",
            BarColumn(),
            *columns,
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task(self._description, total=self._total)
        self._bar.start()
