"""What changed between versions: by digest from the catalog, and in numbers from chunks.

The diff itself needs neither torch nor NumPy. `measure` does, and `plots` needs matplotlib, so each
is imported only when it is used.
"""

from __future__ import annotations

from dcpstore.history.diff import Diff, EntryDiff, ModuleDiff, TensorStats, diff_versions, fold_diff

__all__ = ["Diff", "EntryDiff", "ModuleDiff", "TensorStats", "diff_versions", "fold_diff"]
