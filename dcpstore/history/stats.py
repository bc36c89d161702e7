"""Numbers about how a tensor changed, kept as sums, so that parts of tensors add up to modules."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["TensorStats"]


@dataclass(frozen=True, slots=True)
class TensorStats:
    """How the elements of a tensor changed, over the chunks that differ.

    Chunks that are the same are not read: they add nothing to a difference, and are left out of
    what it is held against (`relative`, `cosine`, the NaN and Inf counts). Norms are over elements
    that are finite in both versions; `changed` counts elements whose bits differ.
    """

    elements: int = 0
    compared: int = 0
    changed: int = 0
    squared_difference: float = 0.0
    squared_old: float = 0.0
    squared_new: float = 0.0
    product: float = 0.0
    max_abs: float = 0.0
    nan_old: int = 0
    nan_new: int = 0
    inf_old: int = 0
    inf_new: int = 0

    @property
    def l2(self) -> float:
        """The L2 norm of the difference."""
        return math.sqrt(self.squared_difference)

    @property
    def relative(self) -> float:
        """The L2 norm of the difference over that of the old values."""
        if not self.squared_difference:
            return 0.0
        return math.inf if not self.squared_old else self.l2 / math.sqrt(self.squared_old)

    @property
    def cosine(self) -> float:
        """The cosine of the angle between old and new; NaN where either is zero."""
        if not self.squared_old or not self.squared_new:
            return math.nan
        lengths = math.sqrt(self.squared_old) * math.sqrt(self.squared_new)
        return max(-1.0, min(1.0, self.product / lengths))

    @property
    def share_changed(self) -> float:
        """The share of all elements of the tensor whose bits differ."""
        return self.changed / self.elements if self.elements else 0.0

    def __add__(self, other: TensorStats) -> TensorStats:
        """Return the numbers of both together."""
        return TensorStats(
            elements=self.elements + other.elements,
            compared=self.compared + other.compared,
            changed=self.changed + other.changed,
            squared_difference=self.squared_difference + other.squared_difference,
            squared_old=self.squared_old + other.squared_old,
            squared_new=self.squared_new + other.squared_new,
            product=self.product + other.product,
            max_abs=max(self.max_abs, other.max_abs),
            nan_old=self.nan_old + other.nan_old,
            nan_new=self.nan_new + other.nan_new,
            inf_old=self.inf_old + other.inf_old,
            inf_new=self.inf_new + other.inf_new,
        )
