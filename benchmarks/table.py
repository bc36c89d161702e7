"""The table: one row for each thing measured against one peer.

Invariant: a row stands there whether it reaches its target or not; `reached` follows from the
medians and from nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.timing import Samples

__all__ = ["BEGIN", "END", "Row", "aligned", "as_json", "render", "replace_table"]

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

# How ours is held to a peer's: how many times as fast, as a share of it, or as an amount alone.
Kind = Literal["faster", "share", "amount"]
HEADER = (
    "",
    "measured",
    "peer",
    "peer's (least..most)",
    "ours (least..most)",
    "ratio",
    "target",
    "reached",
    "of the limit",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One thing measured: what a peer took, what ours took, and what it must reach.

    `least_work` is what any implementation must do: bytes by the name of one of `LIMITS`. It makes
    a row a share of the machine's limit.
    """

    workload: str
    what: str
    peer: str
    theirs: Samples
    ours: Samples
    unit: Literal["s", "bytes"] = "s"
    kind: Kind = "faster"
    target: float | None = None
    least_work: Mapping[str, int] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """How many times faster ours is, or what share of the peer's it is; from the medians."""
        if self.kind == "faster":
            return self.theirs.median / self.ours.median
        return self.ours.median / self.theirs.median if self.theirs.median else float("inf")

    @property
    def is_reached(self) -> bool | None:
        """Whether the target is reached, where there is one."""
        if self.target is None:
            return None
        if self.kind == "faster":
            return self.ratio >= self.target
        return (self.ours.median if self.kind == "amount" else self.ratio) <= self.target


# A limit by name, and the probes of which the fastest is it.
LIMITS = {
    "write": ("direct write, fsync", "buffered write, fsync"),
    "read": ("read, mapped", "read, copied"),
    "copy": ("memcpy",),
    "digest": ("BLAKE3, all cores",),
}


def share_of_limit(row: Row, probed: Mapping[str, Samples]) -> float | None:
    """Return how much of the time that ours took the machine needs at the least, if that is known.

    One kind of work after the other: a share past 1 means that ours did them at once, or wrote
    less than there was.
    """
    if not row.least_work:
        return None
    needed = sum(
        nbytes / max(probed[name].median for name in LIMITS[limit] if name in probed)
        for limit, nbytes in row.least_work.items()
    )
    return needed / row.ours.median


def render(
    machine: Mapping[str, str],
    probed: Mapping[str, Samples],
    rows: Sequence[Row],
    *,
    rounds: int,
    is_tiny: bool,
) -> str:
    """Return the whole report as Markdown that reads well in a terminal too."""
    size = "tiny sizes, which say nothing about speed" if is_tiny else f"{rounds} rounds"
    about = ", ".join(f"{name} {value}" for name, value in machine.items())
    limits = [("the machine's limit", "bytes a second (least..most)")] + [
        (name, _spread(rate, ("GB/s", 1e9))) for name, rate in probed.items()
    ]
    return "\n\n".join(
        [
            f"Medians of {size}. {about}.",
            aligned(limits),
            aligned([HEADER, *(_cells(row, probed) for row in rows)]),
        ]
    )


def as_json(
    machine: Mapping[str, str],
    probed: Mapping[str, Samples],
    rows: Sequence[Row],
    *,
    rounds: int,
    is_tiny: bool,
) -> dict[str, object]:
    """Return the whole report as what JSON can carry, with every sample."""
    return {
        "machine": dict(machine),
        "rounds": rounds,
        "tiny": is_tiny,
        "limits": {name: list(rate.values) for name, rate in probed.items()},
        "rows": [
            {
                **asdict(row),
                "theirs": list(row.theirs.values),
                "ours": list(row.ours.values),
                "ratio": row.ratio,
                "reached": row.is_reached,
                "of_the_limit": share_of_limit(row, probed),
            }
            for row in rows
        ],
    }


def replace_table(page: Path, report: str) -> None:
    """Put a report between the two marks of a page."""
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{page} lacks the lines {BEGIN!r} and {END!r}; add them where it belongs")
    head, tail = text.partition(BEGIN)[0], text.partition(END)[2]
    page.write_text(f"{head}{BEGIN}\n\n{report}\n\n{END}{tail}")


def _cells(row: Row, probed: Mapping[str, Samples]) -> tuple[str, ...]:
    units = _SECONDS if row.unit == "s" else _BYTES
    share, reached = share_of_limit(row, probed), row.is_reached
    return (
        f"({row.workload})",
        row.what,
        row.peer,
        _spread(row.theirs, _unit(row.theirs.median, units)),
        _spread(row.ours, _unit(row.ours.median, units)),
        f"{row.ratio:.2f}" + ("x" if row.kind == "faster" else ""),
        "" if row.target is None else _target(row, row.target),
        "" if reached is None else ("yes" if reached else "NO"),
        "" if share is None else f"{100 * share:.0f} %",
    )


def _target(row: Row, target: float) -> str:
    if row.kind == "faster":
        return f"{target:g}x"
    if row.kind == "share":
        return f"<= {target:.2f}"
    name, size = _unit(target, _BYTES[1:])
    return f"<= {target / size:g} {name}"


def _spread(samples: Samples, unit: tuple[str, float]) -> str:
    """Return the median, and the least and the most in the same unit."""
    name, size = unit
    median, least, most = (
        f"{value / size:.3g}" for value in (samples.median, samples.least, samples.most)
    )
    if len(samples.values) == 1:
        return f"{median} {name} (once)"
    return f"{median} {name}" + ("" if least == most else f" ({least}..{most})")


_SECONDS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
_BYTES = (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10), ("B", 1.0))


def _unit(value: float, units: Sequence[tuple[str, float]]) -> tuple[str, float]:
    """Return the largest unit that a value reaches, or the smallest."""
    return next((unit for unit in units if abs(value) >= unit[1]), units[-1])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns are aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        "| "
        + " | ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([padded[0], rule, *padded[1:]])
