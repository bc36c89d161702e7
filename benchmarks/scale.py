"""How large a run is: `FULL` is what the targets are about, `TINY` only shows that it works."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FULL", "TINY", "Scale"]


@dataclass(frozen=True, slots=True)
class Scale:
    """The sizes of everything that a run measures.

    `planned` are the (ranks, tensors) of which planning is simulated; `planned_in_part` those of
    which torch would take minutes. `probe` is the bytes that the machine's limits are measured
    with.
    """

    vocabulary: int
    context: int
    width: int
    layers: int
    small_tensors: int
    small_elements: int
    training_steps: int
    planned: tuple[tuple[int, int], ...]
    planned_in_part: tuple[tuple[int, int], ...]
    probe: int


FULL = Scale(
    vocabulary=50_257,
    context=1024,
    width=768,
    layers=12,
    small_tensors=5000,
    small_elements=1024,
    training_steps=300,
    planned=((8, 1000), (64, 1000), (256, 1000)),
    planned_in_part=((1024, 1000),),
    probe=1 << 30,
)
TINY = Scale(
    vocabulary=64,
    context=16,
    width=16,
    layers=1,
    small_tensors=4,
    small_elements=16,
    training_steps=2,
    planned=((2, 4),),
    planned_in_part=((4, 4),),
    probe=1 << 20,
)
