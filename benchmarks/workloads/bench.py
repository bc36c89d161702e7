"""`Bench`: what every workload is given."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.files import remove
from benchmarks.scale import Scale
from benchmarks.table import Row
from benchmarks.timing import Contender, Measured, in_turns

__all__ = ["Bench", "Workload"]


@dataclass(frozen=True, slots=True)
class Bench:
    """Where, how large and how often; `say` tells of progress."""

    folder: Path
    scale: Scale
    rounds: int
    say: Callable[[str], None]

    @contextmanager
    def place(self, name: str) -> Iterator[Path]:
        """Yield a path where nothing is yet, and remove what was made there."""
        path = self.folder / "run" / name
        shutil.rmtree(path, ignore_errors=True)  # of a run that was killed
        path.parent.mkdir(exist_ok=True)
        yield path
        if path.exists():
            remove(path)

    def in_turns(self, contenders: Mapping[str, Contender]) -> Measured:
        """Run every contender once a round."""
        return in_turns(contenders, rounds=self.rounds, say=self.say)


Workload = Callable[[Bench], list[Row]]
