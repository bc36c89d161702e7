"""One figure, and the table of all: bytes, rows, statements, processor time, ratios.

Invariant: every figure stands in the table whether it meets its target or not. A target is the most
that a figure may be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from benchmarks.table import aligned

__all__ = ["FULL", "SMALL", "Figure", "Part", "Run", "Size", "as_json", "line", "render"]

Unit = Literal["bytes", "rows", "statements", "errors", "s", "times", "share", "saves/s"]


@dataclass(frozen=True, slots=True)
class Size:
    """How far everything grows.

    Attributes:
        tensors: of the state whose versions are weighed, one chunk each.
        many_tensors: of the state that is saved beside torch's DCP, 5 kB each.
        versions: of the two histories that are compared.
        ranks: of one simulated save, and its tensors.
        planned: the ranks whose planning alone is simulated, and their tensors.
        writers: the numbers of processes that save at once.
        saves: of each of them.
        rounds: how often what takes time is repeated.
        together: seconds of processor time that are measured as one, of what takes less.
    """

    tensors: int
    many_tensors: int
    versions: tuple[int, int]
    ranks: tuple[int, int]
    planned: tuple[int, int]
    writers: tuple[int, ...]
    saves: int
    rounds: int
    together: float


FULL = Size(
    tensors=5_000,
    many_tensors=50_000,
    versions=(100, 100_000),
    ranks=(1024, 1000),
    planned=(16_384, 100),
    writers=(1, 8, 32),
    saves=6,
    rounds=3,
    together=0.2,
)
SMALL = Size(
    tensors=200,
    many_tensors=200,
    versions=(20, 60),
    ranks=(4, 8),
    planned=(8, 8),
    writers=(1, 2),
    saves=2,
    rounds=1,
    together=0.0,
)


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing measured, in a unit, on a database if that matters; `note` says what is in it."""

    what: str
    value: float
    unit: Unit
    target: float | None = None
    database: str = ""
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """Whether the target is met, where there is one."""
        return None if self.target is None else self.value <= self.target


@dataclass(frozen=True, slots=True)
class Run:
    """What every part gets: an empty folder of its own, and how large a run is."""

    folder: Path
    size: Size
    say: Callable[[str], None]


Part = Callable[[Run], Iterator[Figure]]
_HEADER = ("part", "measured", "database", "figure", "target", "met", "in it")


def render(about: Mapping[str, str], parts: Mapping[str, Sequence[Figure]], *, small: bool) -> str:
    """Return the table as Markdown that reads well in a terminal too."""
    head = "small sizes, which say nothing about growth" if small else "full sizes"
    machine = ", ".join(f"{name} {value}" for name, value in about.items())
    rows = [_cells(part, figure) for part, figures in parts.items() for figure in figures]
    return f"{head}. {machine}.\n\n{aligned([_HEADER, *rows])}"


def as_json(
    about: Mapping[str, str], parts: Mapping[str, Sequence[Figure]], *, small: bool
) -> dict[str, object]:
    """Return the table as what JSON can carry."""
    return {
        "machine": dict(about),
        "small": small,
        "figures": [
            {"part": part, **asdict(figure), "met": figure.is_met}
            for part, figures in parts.items()
            for figure in figures
        ],
    }


def line(figure: Figure) -> str:
    """Return a figure in one line, for those who wait for the table."""
    facts = (figure.what, figure.database, _shown(figure.value, figure.unit), figure.note)
    return ", ".join(filter(None, facts))


def _cells(part: str, figure: Figure) -> tuple[str, ...]:
    target = "" if figure.target is None else f"<= {_shown(figure.target, figure.unit)}"
    met = {None: "", True: "yes", False: "NO"}[figure.is_met]
    value = _shown(figure.value, figure.unit)
    return (part, figure.what, figure.database, value, target, met, figure.note)


def _shown(value: float, unit: Unit) -> str:
    if unit == "share":
        return f"{100 * value:.3g} %"
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
    if unit == "bytes":
        size, name = next(
            (pair for pair in ((1e6, "MB"), (1e3, "kB")) if abs(value) >= pair[0]), (1, "B")
        )
        return f"{value / size:.3g} {name}"
    number = f"{value:,.0f}" if unit in ("rows", "statements", "errors") else f"{value:.3g}"
    return f"{number} {unit}"
